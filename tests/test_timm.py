"""The methods in timm's own loop: the calls of its train.py (1.0.31) in their order, in one process and in two."""

import argparse
import copy
import re
import tempfile
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from timm.optim import create_optimizer_v2
from timm.task import load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import CheckpointSaver, dispatch_clip_grad, unwrap_model
from torch import nn
from torch.testing import assert_close

from hdkd_lib import methods, models
from hdkd_lib.methods import CSKD, HDKD, DearKD

ROOT = Path(__file__).parents[1]
STEPS = 4
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "num_heads": 3, "depth": 4, "num_classes": 5}
OPTIONS = {
    "CSKD": {},
    "DearKD": {"distill_until": 0.5, "taps": {0: 4, 2: 8}},
    "DeiT": {},
    "HDKD": {},
    "LocalityGuidance": {"taps": {0: 4, 2: 8}},
    "Supervised": {},
}


def make(name: str, seed: int = 0, **arguments) -> methods.base.Method:
    torch.manual_seed(seed)
    if name in ("HDKD", "Supervised"):
        student = models.create("hdkd_student_distilled_nano", num_classes=5, img_size=32)
    elif name == "DearKD":
        student = models.create("dearkd_tiny_patch16_224", conv_blocks=2, conv_options={"pos_drop": 0.0}, **VIT)
    else:
        student = models.create("deit_tiny_distilled_patch16_224", **VIT)
    networks = {"student": student}
    if name != "Supervised":
        networks["teacher"] = models.create("hdkd_teacher_nano", num_classes=5, img_size=32)
    return methods.find(name)(**networks, **OPTIONS[name], **{"total_steps": STEPS} | arguments)


def generated(labels_seed: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    images = torch.randn(STEPS, 6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(5, (STEPS, 6), generator=torch.Generator().manual_seed(labels_seed))
    return list(zip(images, labels, strict=True))


def train(task, batches, *, backend: str | None = None, seen=lambda task: None):
    """An epoch as timm's train.py has it; `seen` is called after each backward pass. Gives optimiser and eval model."""
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt="adamw", lr=2e-3, weight_decay=0.05)
    task.setup_ema(decay=0.9)
    if backend:
        task.compile(backend=backend)
        task.compile_ema(backend=backend)
    task.get_trainable_module().train()
    for number, (images, labels) in enumerate(batches, start=1):
        result = task(images, labels)
        result["loss"].backward()
        seen(task)
        dispatch_clip_grad(task.get_clip_parameters(), value=5.0)
        optimizer.step()
        optimizer.zero_grad()
        task.update_ema(step=number)
    return optimizer, task.get_eval_model()


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("name", methods.NAMES)
def test_in_timms_loop_all_that_learns_moves_and_nothing_else(name):
    task, images = make(name), generated()[0][0]
    before, teacher = weights(task.trainable_module), weights(task.teacher) if hasattr(task, "teacher") else {}
    learned = set()

    def seen(task) -> None:
        learned.update(key for key, p in task.trainable_module.named_parameters() if p.grad is not None and p.grad.any())

    _, eval_model = train(task, generated(), seen=seen)
    after = weights(task.trainable_module)
    assert eval_model is task.student
    assert {key for key, p in task.trainable_module.named_parameters() if not torch.equal(before[key], after[key])} >= learned
    assert learned >= {"student.head.weight", *(f"auxiliary.{key}" for key, _ in task.auxiliary.named_parameters())}
    if teacher:
        assert_close(weights(task.teacher), teacher, rtol=0, atol=0)
        assert not any(module.training for module in task.teacher.network.modules())
    assert task.progress == (STEPS - 1) / STEPS
    averaged = task.get_eval_model(ema=True)
    assert averaged is not eval_model
    assert averaged.state_dict().keys() == eval_model.state_dict().keys()
    key = next(key for key in before if key.endswith("head.weight"))
    own = averaged.state_dict()[key.removeprefix("student.")]
    assert not torch.equal(own, before[key])
    assert not torch.equal(own, after[key])
    assert eval_model.eval()(images).shape == averaged(images).shape == (6, 5)


@pytest.mark.parametrize("name", ["DearKD", "HDKD"])
def test_timms_checkpoint_holds_the_student_and_beside_it_what_learns(name, tmp_path):
    task = make(name)
    optimizer, _ = train(task, generated())
    saver = CheckpointSaver(task.get_trainable_module(), optimizer, checkpoint_dir=str(tmp_path), task=task)
    saver.save_checkpoint(0, metric=1.0)
    state = torch.load(tmp_path / "last.pth.tar", weights_only=True)
    assert state["state_dict"].keys() == task.student.state_dict().keys() == state["state_dict_ema"].keys()
    resumed = make(name, seed=9)
    other = create_optimizer_v2(resumed.get_trainable_module(), opt="adamw", lr=2e-3, weight_decay=0.05)
    assert resume_task_checkpoint(resumed, str(tmp_path / "last.pth.tar"), optimizer=other, log_info=False) == 1
    resumed.setup_ema(decay=0.9)
    load_task_ema_checkpoint(resumed, str(tmp_path / "last.pth.tar"))
    assert_close(weights(resumed.trainable_module), weights(task.trainable_module), rtol=0, atol=0)
    assert_close(weights(resumed.trainable_module_ema), weights(task.trainable_module_ema), rtol=0, atol=0)
    assert resumed.step == STEPS


@pytest.mark.slow  # dynamo traces each network
@pytest.mark.parametrize("name", methods.NAMES)
def test_a_compiled_task_trains_the_same(name):
    plain, compiled = make(name), make(name)
    train(plain, generated())
    _, eval_model = train(compiled, generated(), backend="eager")
    assert unwrap_model(eval_model) is compiled.student
    assert hasattr(compiled.trainable_module, "_orig_mod")
    assert_close(weights(unwrap_model(compiled.trainable_module)), weights(plain.trainable_module), rtol=1e-4, atol=1e-5)
    expected = plain.get_eval_model(ema=True)(generated()[0][0])
    assert_close(compiled.get_eval_model(ema=True)(generated()[0][0]), expected, rtol=1e-4, atol=1e-5)


# Several processes


def still_norms(task) -> None:
    """Batch norm counts a process's own images on CPUs: it is left out of what must be equal."""
    for module in unwrap_model(task.trainable_module).modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def gradients(task) -> dict[str, torch.Tensor]:
    own = unwrap_model(task.trainable_module).named_parameters()
    return {name: torch.zeros(()) if p.grad is None else p.grad.clone() for name, p in own}


def of_one_of_two(rank: int, folder: str, names: list[str]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.set_num_threads(1)
    for name in names:
        task, found = make(name), []
        task.prepare_distributed(device_ids=[torch.device("cpu")])
        task.trainable_module.train()
        for images, labels in generated(labels_seed=rank):
            still_norms(task)
            task(images, labels)["loss"].backward()
            found.append(gradients(task))
            task.zero_grad()
        torch.save(found, f"{folder}/{name}-{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_two():
    """A folder with the gradients of each method and step, from two processes that have the same images and other labels."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(of_one_of_two, (folder, methods.NAMES), nprocs=2)
        yield folder


@pytest.mark.slow
@pytest.mark.parametrize("name", methods.NAMES)
def test_gradients_are_averaged_over_processes(name, of_two):
    own, others = (torch.load(f"{of_two}/{name}-{rank}") for rank in (0, 1))
    task = make(name)
    task.trainable_module.train()
    for step, batches in enumerate(zip(generated(labels_seed=0), generated(labels_seed=1), strict=True)):
        still_norms(task)
        images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        task(images, labels)["loss"].backward()
        expected = gradients(task)
        task.zero_grad()
        assert_close(own[step], expected, rtol=1e-3, atol=1e-6)
        assert_close(others[step], own[step], rtol=0, atol=0)


# What a loop has to say


def test_an_optimiser_without_the_aligners_is_refused_before_its_first_step():
    task, (images, labels) = make("DearKD"), generated()[0]
    optimizer = create_optimizer_v2(task.student, opt="adamw", lr=1e-3)
    before = weights(task.student)
    for _ in range(2):
        task(images, labels)["loss"].backward()
        with pytest.raises(ValueError, match=r"does not hold what DearKD trains beside its student \(aligner0.*get_trainable"):
            optimizer.step()
    assert_close(weights(task.student), before, rtol=0, atol=0)
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt="adamw", lr=1e-3)
    optimizer.step()
    assert not torch.equal(task.student.head.weight, before["head.weight"])


def test_an_optimiser_of_another_network_is_not_looked_at():
    task, (images, labels), other = make("DearKD"), generated()[0], nn.Linear(2, 2)
    task(images, labels)
    other(torch.ones(1, 2)).sum().backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()


@pytest.mark.parametrize("name", ["CSKD", "DearKD"])
def test_a_method_that_changes_over_training_has_to_be_told_how_far_it_is(name):
    task, (images, labels) = make(name, total_steps=None), generated()[0]
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt="adamw", lr=1e-3)
    task(images, labels)["loss"].backward()
    with pytest.raises(ValueError, match=rf"{name} changes over training; create it with total_steps=STEPS, or call"):
        optimizer.step()
    task.set_progress(0.0)
    optimizer.step()


@pytest.mark.parametrize(
    ("make_options", "changes"), [({"schedule": "local"}, False), ({"distill_until": 0.5}, True), ({}, True)]
)
def test_whether_a_method_changes_over_training(make_options, changes):
    made = make("CSKD")
    assert CSKD(student=made.student, teacher=made.teacher.network, **make_options).changes_over_training == changes
    assert not make("HDKD").changes_over_training


def test_a_task_that_is_not_told_counts_its_own_steps():
    counting, told = make("CSKD"), make("CSKD", total_steps=None)
    for number, batch in enumerate(generated()):
        told.set_progress(number / STEPS)
        assert_close(counting(*batch)["loss"], told(*batch)["loss"], rtol=0, atol=0)
    counting.eval()(*generated()[0])
    assert counting.step == STEPS, "what is not training is not counted"
    assert counting.train()(*generated()[0])["loss"].isfinite(), "more steps than were said"
    assert counting.progress == 1.0
    counting.set_progress(0.25)
    counting(*generated()[0])
    assert counting.progress == 0.25, "who is told does not count"


def test_a_probe_stays_one_where_the_loop_trains_what_learns():
    task = methods.Supervised(student=models.create("resnet10t", num_classes=5), probe=True)
    before = weights(task.student)
    train(task, generated())
    changed = {name for name, value in task.student.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"fc.weight", "fc.bias"}


def test_names_of_what_is_not_decayed_are_those_of_all_that_learns():
    learner = make("DearKD").trainable_module
    student = learner.student.no_weight_decay()
    assert "pos_embed" in student
    assert learner.no_weight_decay() == {f"student.{name}" for name in student}


@pytest.mark.parametrize("method", [HDKD, DearKD])
def test_a_copy_of_a_task_is_whole(method):
    task = make(method.__name__)
    again = copy.deepcopy(task)
    assert_close(task(*generated()[0]), again(*generated()[0]), rtol=0, atol=0)
    assert again.student is not task.student


def test_the_lines_that_the_docs_put_into_train_py_work(tmp_path, monkeypatch):
    text = (ROOT / "docs" / "timm.md").read_text()
    [lines] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    save_file(models.create("hdkd_teacher_nano", num_classes=5).state_dict(), "teacher.safetensors")
    args = argparse.Namespace(num_classes=5, epochs=2, smoothing=0.1)
    given = {"args": args, "device": torch.device("cpu"), "loader_train": generated()}
    size = {"img_size": 64}  # --model-kwargs img_size=64
    given["model"] = timm.create_model("hdkd_student_distilled_nano", num_classes=5, drop_rate=0.0, **size)  # as train.py does
    exec(lines, given)
    task = given["task"]
    assert (task.total_steps, task.label_smoothing, task.student) == (2 * STEPS, 0.1, given["model"])
    train(task, [(torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 3]))])
