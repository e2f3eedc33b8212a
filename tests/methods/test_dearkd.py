"""DearKD: its loss by hand, any CNN as teacher, the switch to training alone, runs that cross it."""

import copy
import functools
import json
import math
import pickle
from dataclasses import replace

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

from hdkd_lib import models
from hdkd_lib.methods import DearKD, DeiT
from hdkd_lib.methods.dearkd import hidden_loss, standardise, to_grid
from hdkd_lib.recipes import Recipe
from hdkd_lib.training import fit

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "num_heads": 3, "depth": 4, "conv_blocks": 2}
ON_CPU = {"device": "cpu", "precision": "float32", "force": True}  # the teachers here are not trained
RECIPE = Recipe(epochs=4, batch_size=30, optimizer="adamw", lr=2e-3, weight_decay=0.05, schedule="cosine")
STEPS = 4  # of an epoch


def vit(name: str = "dearkd_tiny_patch16_224", **arguments) -> nn.Module:
    """A student of 4 x 4 patches that draws no random numbers in training."""
    torch.manual_seed(0)
    if name.startswith("dearkd"):
        return models.create(name, **{"num_classes": 5, "conv_options": {"pos_drop": 0.0}} | SMALL | arguments)
    sizes = {key: value for key, value in SMALL.items() if key != "conv_blocks"}
    return models.create(name, **{"num_classes": 5} | ({"img_size": 32} if "hdkd" in name else sizes) | arguments)


def cnn(name: str = "test_resnet", **arguments) -> nn.Module:
    """A teacher with decided opinions, and batch norm with a past."""
    torch.manual_seed(7)
    network = models.create(name, **{"num_classes": 5} | arguments)
    for parameter in network.get_classifier().parameters():
        nn.init.normal_(parameter, std=0.5)
    return network


def dearkd(**settings) -> DearKD:
    return DearKD(student=settings.pop("student", None) or vit(), teacher=settings.pop("teacher", None) or cnn(), **settings)


@pytest.fixture
def small_batch() -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(3)
    return torch.randn(6, 3, 32, 32, generator=random), torch.randint(5, (6,), generator=random)


@pytest.fixture
def caught():
    """`caught(module)`: a list that each later output of the module joins."""
    hooks = []

    def caught(module: nn.Module) -> list:
        outputs = []
        hooks.append(module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output)))
        return outputs

    yield caught
    for hook in hooks:
        hook.remove()


# Stage I


def cross_entropy(logits, target):
    return -(logits - logits.exp().sum(1, keepdim=True).log())[torch.arange(len(target)), target].mean()


def divergence(teacher, student, tau):
    p, q = (teacher / tau).softmax(1), (student / tau).softmax(1)
    return tau**2 * (p * (p / q).log()).sum(1).mean()


@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("taps", [{1: 4, 3: 8}, {0: 16}])
def test_the_loss_of_stage_1_is_its_formula(kind, taps, small_batch, caught):
    images, labels = small_batch[0].double(), small_batch[1]
    task = dearkd(distill_type=kind, alpha=0.3, tau=2.0, hidden_weight=0.7, taps=taps).double().train()
    layers = {4: task.teacher.network.layer1, 8: task.teacher.network.layer2, 16: task.teacher.network.layer3}
    tokens = {block: caught(task.student.blocks[block]) for block in taps}
    maps = {stride: caught(layers[stride]) for stride in taps.values()}
    class_head, distillation_head = caught(task.student.head), caught(task.student.head_dist)
    result = task(images, labels)

    hidden = []
    for block, stride in taps.items():
        [S], [T] = tokens[block], maps[stride]
        S = S[:, 2:].transpose(1, 2).reshape(6, 24, 4, 4)
        T = F.avg_pool2d(T, 2) if stride == 4 else T if stride == 8 else F.interpolate(T, (4, 4), mode="bilinear")
        T = T - T.mean((0, 2, 3), keepdim=True)
        T = T / (T.square().mean((0, 2, 3), keepdim=True) + 1e-6).sqrt()
        hidden.append((task.auxiliary[f"aligner{block}"](S) - T).square().mean())
    [z_c], [z_d] = class_head, distillation_head
    t = task.teacher.network(task.teacher.prepare(images))
    distillation = cross_entropy(z_d, t.argmax(1)) if kind == "hard" else divergence(t, z_d, 2.0)
    assert_close(result["class_loss"], cross_entropy(z_c, labels))
    assert_close(result["distillation_loss"], distillation)
    assert_close(result["hidden_loss"], sum(hidden) / len(hidden))
    assert_close(result["loss"], 0.7 * cross_entropy(z_c, labels) + 0.3 * distillation + 0.7 * sum(hidden) / len(hidden))
    assert_close(result["output"], (z_c + z_d) / 2)
    assert result["loss"].dtype == torch.float64
    assert result.keys() == {"loss", "output", "class_loss", "distillation_loss", "hidden_loss", "gate"}
    mean, std = (torch.tensor(task.student.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    own = (images * std + mean - 0.5) / 0.5  # the teacher's, and not the student's
    assert_close(task.teacher.prepare(images), own, rtol=1e-5, atol=1e-6)


def test_the_hidden_loss_starts_near_one_whatever_the_teachers_scale(small_batch):
    task = dearkd(teacher=cnn("hdkd_teacher_nano")).train()
    before = task(*small_batch)["hidden_loss"]
    _, maps = task.teacher(small_batch[0], [1, 2])
    aligned = task.trainable_module(small_batch[0], taps=[1, 3])["aligned"]
    scaled, moved = (hidden_loss(aligned, [a * m + b for m in maps]) for a, b in ((30, 0), (300, 5)))
    assert 0.9 < before < 1.7
    assert_close(scaled, before, rtol=1e-2, atol=0)
    assert_close(moved, scaled, rtol=1e-3, atol=0)


def test_the_gate_is_the_mean_weight_of_positions(small_batch):
    task = dearkd()
    gates = [task.student.blocks[i].attn.gate for i in range(2)]
    with torch.no_grad():
        for gate, values in zip(gates, ([0.0, 1.0, 2.0], [-1.0, -2.0, -3.0]), strict=True):
            gate.copy_(torch.tensor(values))
    expected = sum(1 / (1 + math.exp(-g)) for g in (0, 1, 2, -1, -2, -3)) / 6
    assert task(*small_batch)["gate"].item() == pytest.approx(expected, abs=1e-6)
    assert not task(*small_batch)["gate"].requires_grad
    for student in (vit(conv_mode="add"), vit("deit_tiny_distilled_patch16_224")):
        assert "gate" not in dearkd(student=student)(*small_batch)


def test_labels_may_be_probabilities_and_weights_and_smoothing_are_the_tasks(small_batch):
    images, labels = small_batch
    task = dearkd().train()
    plain, mixed = task(images, labels), task(images, F.one_hot(labels, 5).float())
    assert_close(plain["loss"], mixed["loss"])
    task.class_weights, task.label_smoothing = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), 0.1
    task.set_progress(0.9)
    both = task(images, labels)
    logits = task.student(images)
    expected = [F.cross_entropy(z, labels, task.class_weights, label_smoothing=0.1) for z in logits]
    assert_close(both["loss"], sum(expected) / 2)


def test_standardised_maps_have_mean_0_and_variance_1_in_each_channel():
    maps = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([1, 2, 10, 100])[:, None, None]
    maps = maps + torch.tensor([0, 5, -3, 1000])[:, None, None]
    result = standardise(maps)
    assert_close(result.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-4)
    assert_close(result.square().mean((0, 2, 3)), torch.ones(4), rtol=0, atol=1e-4)
    assert result.std((2, 3)).sub(1).abs().max() > 0.02, "over batch and places together"
    maps[:, 1] = 7.0
    assert_close(standardise(maps)[:, 1], torch.zeros(3, 5, 6))
    assert_close(standardise(maps)[:, 2], result[:, 2])
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)):
        assert standardise(torch.randn(2, 3, 4, 4).to(dtype)).dtype == wide


def test_maps_are_pooled_or_interpolated_to_the_grid():
    maps = torch.arange(32.0).reshape(1, 1, 4, 8)
    assert_close(to_grid(maps, (2, 4))[0, 0], torch.tensor([[4.5, 6.5, 8.5, 10.5], [20.5, 22.5, 24.5, 26.5]]))
    assert torch.equal(to_grid(maps, (4, 8)), maps)
    assert to_grid(torch.randn(2, 3, 7, 7), (3, 5)).shape == (2, 3, 3, 5)
    coarse = torch.tensor([[0.0, 4.0]]).expand(1, 1, 2, 2)
    assert_close(to_grid(coarse, (4, 4))[0, 0], torch.tensor([0.0, 1.0, 3.0, 4.0]).expand(4, 4))
    assert to_grid(torch.randn(1, 2, 8, 2), (4, 4)).shape == (1, 2, 4, 4)


# Taps

CNNS = [
    "convnext_atto", "densenet121", "efficientnet_b0", "hdkd_teacher_nano", "mobilenetv3_small_050", "poolformer_s12",
    "regnety_002", "repvgg_a0", "resnet18", "tf_efficientnet_lite0", "vgg11_bn",
]  # fmt: skip


@pytest.mark.parametrize("name", CNNS)
def test_maps_are_found_by_their_stride_in_every_family(name, monkeypatch):
    options = {"mlp_ratio": 1 / 256} if name == "vgg11_bn" else {}  # of its 120 million weights after the maps
    task = dearkd(teacher=cnn(name, **options), taps={0: 4, 2: 8}).train()
    given, terms = [], task.terms
    monkeypatch.setattr(task, "terms", lambda *of: given.append(of) or terms(*of))
    images = torch.randn(2, 3, 32, 32)
    result = task(images, torch.tensor([0, 3]))
    [(outputs, teacher, _)] = given
    maps = teacher["maps"]
    assert [tuple(m.shape[2:]) for m in maps] == [(8, 8), (4, 4)]
    for block, m in zip((0, 2), maps, strict=True):
        assert task.auxiliary[f"aligner{block}"][-1].out_channels == m.shape[1]
    with torch.no_grad():
        assert_close(teacher["logits"], task.teacher.network(task.teacher.prepare(images)))
    assert [tuple(aligned.shape) for aligned in outputs["aligned"]] == [(2, m.shape[1], 4, 4) for m in maps]
    result["hidden_loss"].backward(retain_graph=True)
    taught = [task.student.patch_embed.proj.weight, task.student.blocks[2].mlp.fc2.weight, *task.auxiliary.parameters()]
    for parameter in taught:
        assert parameter.grad.isfinite().all()
        assert parameter.grad.abs().max() > 0
    assert task.student.blocks[3].mlp.fc2.weight.grad is None
    result["loss"].backward()
    assert task.student.head_dist.weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("taps", "strides"),
    [({1: 8, 3: 4}, [8, 4]), ({3: 4, 1: 8}, [8, 4]), ({"3": 4, "1": "8"}, [8, 4]), ({0: 4, 1: 4, 2: 8}, [4, 4, 8])],
)
def test_each_block_is_taught_by_its_own_map(taps, strides, small_batch, caught, monkeypatch):
    task = dearkd(taps=taps).train()
    blocks = sorted(map(int, taps))
    assert task.taps == dict(zip(blocks, strides, strict=True))
    tokens = [caught(task.student.blocks[block]) for block in blocks]
    layers = {4: caught(task.teacher.network.layer1), 8: caught(task.teacher.network.layer2)}
    expected, given, terms = [], [], task.terms
    monkeypatch.setattr(task, "terms", lambda *of: given.append(of) or terms(*of))
    result = task(*small_batch)
    [(outputs, teacher, _)] = given
    for block, stride, [S], own, m in zip(blocks, strides, tokens, outputs["aligned"], teacher["maps"], strict=True):
        assert_close(own, task.auxiliary[f"aligner{block}"](S[:, 2:].transpose(1, 2).unflatten(2, (4, 4))))
        assert torch.equal(m, layers[stride][0])
        T = standardise(m if stride == 8 else F.avg_pool2d(m, 2))
        expected.append(F.mse_loss(own, T))
    assert_close(result["hidden_loss"], sum(expected) / len(expected))
    assert len(layers[4]) == 1, "one pass of the teacher"


def test_the_teachers_outputs_are_its_answer_and_a_map_for_each_tap(small_batch):
    task = dearkd(taps={0: 8, 1: 4, 2: 8})
    logits, maps = task.teach(small_batch[0]).values()
    sides = [32 // stride for stride in task.taps.values()]
    assert [tuple(found.shape[2:]) for found in maps] == [(side, side) for side in sides]
    assert torch.equal(maps[0], maps[2])
    assert_close(logits, task.teacher(small_batch[0])[0])
    assert dearkd(taps={}).teach(small_batch[0])["maps"] == []


def test_taps_are_in_the_order_of_blocks_not_of_their_names():
    task = dearkd(student=vit(depth=11, embed_dim=12), taps={"10": 4, "2": 8})
    assert list(task.taps.items()) == [(2, 8), (10, 4)]


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_without_taps_it_is_deits_distillation(kind, small_batch):
    task = dearkd(taps={}, distill_type=kind, alpha=0.4).train()
    result = task(*small_batch)
    assert "hidden_loss" not in result
    assert not len(task.auxiliary)
    deit = DeiT(student=task.student, teacher=task.teacher.network, distill_type=kind, alpha=0.4, reduction="batchmean").train()
    assert_close(result["loss"], deit(*small_batch)["loss"])


STUDENTS = {
    "deit_tiny_distilled_patch16_224": {},
    "hdkd_student_distilled_nano": {},
    "hdkd_student_nano": {},
    "vit_tiny_patch16_224": {"img_size": (32, 48)},
    "vit_medium_patch16_reg4_gap_256": {},
}


@pytest.mark.parametrize("name", STUDENTS)
def test_students_of_every_kind_learn(name):
    task = dearkd(student=vit(name, **STUDENTS[name]), taps={0: 4, 1: 8}).train()
    height, width = STUDENTS[name].get("img_size", (32, 32))
    images, labels = torch.randn(4, 3, height, width), torch.tensor([0, 1, 2, 3])
    for progress in (0.0, 0.9):
        task.set_progress(progress)
        task.zero_grad()
        result = task(images, labels)
        result["loss"].backward()
        assert task.student.head.weight.grad.abs().max() > 0
        if "distilled" not in name:
            logits = task.student(images)
            assert_close(result["output"], logits)
            assert progress == 0 or torch.isclose(result["loss"], F.cross_entropy(logits, labels))
    with torch.no_grad():
        assert task.eval().predict(images).shape == (4, 5)


def test_prediction_is_the_mean_of_both_heads(small_batch, caught):
    task = dearkd()
    heads = caught(task.student.head), caught(task.student.head_dist)
    prediction = task.eval().predict(small_batch[0])
    assert_close(prediction, (heads[0][0] + heads[1][0]) / 2)


# The switch


@pytest.mark.parametrize(
    ("fraction", "progress", "in_stage2"),
    [(0.5, 0.0, False), (0.5, 0.49, False), (0.5, 0.5, True), (0.5, 0.99, True), (0.0, 0.0, True), (1.0, 0.999, False)],
)
def test_stage_2_begins_at_its_share_of_training(fraction, progress, in_stage2, small_batch):
    task = dearkd(distill_until=fraction)
    task.set_progress(progress)
    assert task.in_stage2 == in_stage2
    assert ("hidden_loss" in task(*small_batch)) == (not in_stage2)
    assert ("distillation_loss" in task(*small_batch)) == (not in_stage2)


def test_a_task_without_stage_1_is_in_stage_2_before_its_first_epoch(small_batch):
    assert "distillation_loss" not in dearkd(distill_until=0.0)(*small_batch)


def test_stage_1_at_1_never_ends():
    task = dearkd(distill_until=1.0)
    task.set_progress(1.0)
    assert not task.in_stage2


def test_five_sixths_of_300_epochs_end_at_epoch_250():
    task = dearkd()
    assert task.distill_until == 5 / 6
    alone = []
    for epoch in range(300):
        task.set_progress(epoch / 300)
        alone.append(task.in_stage2)
    assert alone == [False] * 250 + [True] * 50


@pytest.fixture(scope="module")
def switching() -> DearKD:
    return dearkd()


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n - 1), st.just(n))))
def test_a_share_of_whole_epochs_ends_with_an_epoch(switching, share):
    k, n = share
    switching.distill_until = k / n
    switching.progress = k / n
    assert switching.in_stage2
    switching.progress = (k - 1) / n
    assert not switching.in_stage2


def unasked(*_, **__):
    raise AssertionError("the teacher was asked")


@pytest.mark.parametrize("stage2", ["both", "class"])
def test_in_stage_2_neither_teacher_nor_aligners_run(stage2, small_batch, monkeypatch, caught):
    task = dearkd(stage2=stage2, alpha=0.3).double().train()
    images, labels = small_batch[0].double(), small_batch[1]
    for owner, name in ((task.teacher, "forward"), (task.teacher.network, "forward_intermediates")):
        monkeypatch.setattr(owner, name, unasked)
    with pytest.raises(AssertionError, match="the teacher was asked"):
        task(images, labels)
    aligners = [caught(aligner) for aligner in task.auxiliary.values()]
    class_head, distillation_head = caught(task.student.head), caught(task.student.head_dist)
    task.set_progress(0.9)
    result = task(images, labels)
    result["loss"].backward()
    [z_c], [z_d] = class_head, distillation_head
    by_hand = 0.7 * cross_entropy(z_c, labels) + 0.3 * cross_entropy(z_d, labels)
    assert_close(result["loss"], by_hand if stage2 == "both" else cross_entropy(z_c, labels))
    assert_close(result["output"], (z_c + z_d) / 2)
    assert_close(result["class_loss"], cross_entropy(z_c, labels))
    assert result.keys() == {"loss", "output", "class_loss", "gate"}
    assert aligners == [[], []]
    assert all(parameter.grad is None for parameter in task.auxiliary.parameters())
    assert (task.student.head_dist.weight.grad is not None) == (stage2 == "both")
    assert task.student.blocks[0].attn.gate.grad.abs().max() > 0, "convolutional attention stays"


def test_in_stage_2_the_teacher_leaves_the_students_device(monkeypatch):
    task = dearkd(distill_until=0.5)
    places = []
    task.student.to("meta")
    monkeypatch.setattr(task.teacher, "move", places.append)
    for progress in (0.0, 0.49, 0.5):
        task.set_progress(progress)
    assert list(map(str, places)) == ["meta", "meta", "cpu"]


def test_a_teacher_moves_with_one_copy_for_each_type_of_number(small_batch, monkeypatch):
    teacher = dearkd().teacher
    types = {tensor.dtype for tensor in (*teacher.parameters(), *teacher.buffers())}
    copies, to = [], torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *where, **how: copies.append(where) or to(tensor, *where, **how))
    teacher.move(torch.device("cpu"))
    assert copies == []
    teacher.move(torch.device("meta"))
    assert copies == [(torch.device("meta"),)] * len(types)
    assert {str(tensor.device) for tensor in (*teacher.parameters(), *teacher.buffers())} == {"meta"}


def test_a_teacher_that_moved_is_the_same(small_batch):
    teacher = dearkd().teacher
    before, state = teacher(small_batch[0])[0], {name: value.clone() for name, value in teacher.state_dict().items()}
    teacher.move(torch.device("cpu", 0))  # not the name that tensors have, so that all of them move
    assert_close(dict(teacher.state_dict()), state, rtol=0, atol=0)
    assert torch.equal(teacher(small_batch[0])[0], before)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_an_earlier_epoch_may_follow_a_later_one(small_batch):
    task = dearkd().train()
    first = task(*small_batch)
    task.set_progress(0.9)
    alone = task(*small_batch)
    task.set_progress(0.0)
    assert_close(task(*small_batch), first)
    assert "distillation_loss" not in alone


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_without_weight_the_hidden_loss_leaves_deits_loss_and_gradients(kind, small_batch):
    task = dearkd(distill_type=kind, hidden_weight=0.0, alpha=0.4, tau=3.0).train()
    settings = {"distill_type": kind, "alpha": 0.4, "tau": 3.0, "reduction": "batchmean"}
    deit = DeiT(student=copy.deepcopy(task.student), teacher=cnn(), **settings).train()
    losses = [t(*small_batch)["loss"] for t in (task, deit)]
    assert_close(*losses)
    for loss in losses:
        loss.backward()
    for (name, ours), theirs in zip(task.student.named_parameters(), deit.student.parameters(), strict=True):
        assert_close(ours.grad, theirs.grad, msg=lambda m, name=name: f"{name}: {m}")


# Runs


@pytest.fixture(scope="module")
def make_task(build):
    """`make_task(seed)`: half of training with a teacher; positions are dropped at random."""
    student = {
        "name": "dearkd_tiny_patch16_224",
        "img_size": 16,
        "patch_size": 4,
        "embed_dim": 24,
        "depth": 2,
        "conv_blocks": 1,
    }
    settings = {"taps": {0: 4, 1: 8}, "distill_until": 0.5}
    return lambda seed=0: DearKD(
        student=build(**student, num_heads=3, seed=seed), teacher=build("hdkd_teacher_nano", seed=7), **settings
    )


@pytest.fixture(scope="module")
def whole(make_task, digits, tmp_path_factory):
    """The run without an interruption, its task, and the teacher's entries before."""
    task = make_task()
    teacher = copy.deepcopy(task.teacher.state_dict())
    return fit(task, digits, RECIPE, tmp_path_factory.mktemp("dearkd") / "run", **ON_CPU), task, teacher


def crosses_the_switch(history: pd.DataFrame) -> bool:
    taught = [history[f"train_{name}"].notna().tolist() for name in ("hidden_loss", "distillation_loss")]
    return taught == [[True, True, False, False]] * 2


def test_a_run_is_taught_first_and_then_alone(whole):
    run, task, _ = whole
    assert crosses_the_switch(run.history)
    assert task.in_stage2
    assert run.history.train_gate.between(0, 1).all()
    row = run.history.iloc[0]
    assert row.train_loss == pytest.approx((row.train_class_loss + row.train_distillation_loss) / 2 + row.train_hidden_loss)
    assert run.history.train_hidden_loss[1] < run.history.train_hidden_loss[0]
    assert run.config["method"]["taps"] == {"0": 4, "1": 8}


def test_both_stages_leave_the_teacher_as_it_was(whole):
    _, task, before = whole
    after = task.teacher.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(parameter.requires_grad for parameter in task.teacher.parameters())
    assert not any(module.training for module in task.train().teacher.modules())


def test_the_checkpoint_is_the_student_alone(whole, make_task):
    run, task, _ = whole
    weights = load_file(run.path / "last.safetensors")
    assert weights.keys() == make_task().student.state_dict().keys()
    assert any("position_weight" in name for name in weights)
    assert len(task.auxiliary) == 2
    assert run.student("last")(torch.zeros(1, 3, 16, 16)).shape == (1, 10)


def test_training_moves_students_positions_and_aligners(whole, make_task):
    _, trained, _ = whole
    for part in ("student", "auxiliary"):
        before, after = (dict(getattr(task, part).named_parameters()) for task in (make_task(), trained))
        names = [name for name in before if "attn.position" in name or "gate" in name or name.startswith(("aligner", "head"))]
        assert names
        assert not any(torch.equal(before[name], after[name]) for name in names)


def failing_after(task, steps: int):
    forward, done = task.forward, []

    def fail(images, target):
        if len(done) == steps:
            raise KeyboardInterrupt
        done.append(None)
        return forward(images, target)

    task.forward = fail
    return task


@pytest.mark.parametrize("steps", [STEPS + 2, 2 * STEPS, 3 * STEPS + 2])  # with the teacher; at the switch; alone
def test_a_run_resumed_on_either_side_of_the_switch_is_bitwise_the_whole_one(steps, whole, make_task, digits, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fit(failing_after(make_task(), steps), digits, RECIPE, tmp_path / "run", **ON_CPU)
    assert len(torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["history"]) == steps // STEPS
    torch.manual_seed(12345)
    task = make_task(seed=99)
    run = fit(task, digits, RECIPE, tmp_path / "run", **ON_CPU)
    assert_close(task.auxiliary.state_dict(), whole[1].auxiliary.state_dict(), rtol=0, atol=0)
    for which in ("last", "best"):
        resumed, expected = (load_file(r.path / f"{which}.safetensors") for r in (run, whole[0]))
        assert resumed.keys() == expected.keys()
        assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    resumed, expected = (r.history.drop(columns="seconds") for r in (run, whole[0]))
    pd.testing.assert_frame_equal(resumed, expected, check_exact=True)


def test_two_processes_go_through_the_switch(make_task, digits, tmp_path, monkeypatch):
    """Forked, which spares them the imports; `test_a_copy_of_a_task` shows what spawned ones need besides."""
    forked = functools.partial(torch.multiprocessing.start_processes, start_method="fork")
    monkeypatch.setattr(torch.multiprocessing, "spawn", forked)
    run = fit(make_task(), digits, replace(RECIPE, batch_size=60), tmp_path / "run", **ON_CPU, num_processes=2)
    assert run.environment["processes"] == 2
    assert crosses_the_switch(run.history)
    assert run.history.train_loss.notna().all()


@pytest.mark.parametrize("way", [copy.deepcopy, lambda task: pickle.loads(pickle.dumps(task))])
def test_a_copy_of_a_task_is_a_task_of_its_own(way, make_task, batch):
    task = make_task()
    other = way(task)
    torch.manual_seed(1)
    expected = task.train()(*batch)
    torch.manual_seed(1)
    assert_close(other.train()(*batch), expected)
    with torch.no_grad():
        task.student.blocks[0].attn.gate.fill_(-1e4)
    assert task(*batch)["gate"] == 0
    assert other(*batch)["gate"] > 0.5


# Descriptions and failures


def test_the_description_is_plain_and_tells_tasks_apart():
    changes = [
        {}, {"taps": {1: 4, 2: 8}}, {"taps": {1: 8, 3: 8}}, {"taps": {}}, {"distill_until": 0.5}, {"stage2": "class"},
        {"hidden_weight": 0.1}, {"alpha": 0.4}, {"tau": 2.0}, {"distill_type": "soft"}, {"student": vit(conv_mode="add")},
    ]  # fmt: skip
    described = [json.dumps(dearkd(**dict(change)).describe(), sort_keys=True) for change in changes]
    assert len(set(described)) == len(changes)
    plain = json.loads(described[0])
    assert plain["name"] == "DearKD"
    assert (plain["taps"], plain["distill_until"], plain["stage2"]) == ({"1": 4, "3": 8}, 5 / 6, "both")
    assert plain["student"]["name"] == "dearkd_tiny_patch16_224"
    assert plain["teacher"]["name"] == "test_resnet"


def test_a_task_can_be_made_again_from_its_settings():
    task = dearkd(
        taps={3: 4, 1: 8}, distill_until=0.25, distill_type="soft", tau=2.0, hidden_weight=3.0, stage2="class", alpha=0.1
    )
    settings = json.loads(json.dumps(task.settings()))
    assert dearkd(**settings).settings() == task.settings() == settings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"taps": {1: 5}}, "taps ask for the teacher's map of stride 5; ResNet has strides 2, 4, 8, 16, 32"),
        ({"taps": {4: 8}}, "taps name block 4; the student has blocks 0 to 3"),
        ({"taps": {-1: 8}}, "taps name block -1; the student has blocks 0 to 3"),
        ({"hidden_weight": -0.1}, r"hidden_weight must be at least 0.*\(got -0.1 "),
        ({"distill_until": 1.1}, r"distill_until must be in \[0, 1\].*1.1"),
        ({"distill_until": -0.1}, r"distill_until must be in \[0, 1\].*-0.1"),
        ({"stage2": "neither"}, "stage2 'both' or 'class'.*'neither'"),
        ({"alpha": 1.5}, "alpha must be in"),
        ({"tau": 0.0}, "tau above 0"),
        ({"distill_type": "medium"}, "distill_type must be 'soft' or 'hard'"),
    ],
)
def test_arguments_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dearkd(**change)


def test_networks_of_another_kind_are_refused():
    with pytest.raises(ValueError, match=r"DearKD needs a vision transformer as student \(got ResNet\)"):
        dearkd(student=cnn())
    with pytest.raises(ValueError, match=r"DearKD needs a CNN as teacher, .*\(got VisionTransformer: it has tokens\)"):
        dearkd(teacher=vit("vit_tiny_patch16_224"))
    with pytest.raises(ValueError, match="the teacher has 7 classes and the student 5"):
        dearkd(teacher=cnn(num_classes=7))
    with pytest.raises(ValueError, match="ConvNeXt has strides 4, 8, 16, 32"):
        dearkd(teacher=cnn("convnext_atto"), taps={0: 2})
