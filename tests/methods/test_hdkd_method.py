"""HDKD's losses, gradients and cost against the official code's values and faults."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from hdkd_lib.methods import HDKD
from hdkd_lib.methods.hdkd import feature_loss
from hdkd_lib.models.hdkd import convert_official_state_dict


@pytest.fixture
def networks(build):
    return {"student": build(), "teacher": build("hdkd_teacher_nano", seed=7)}


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_losses_and_gradients_are_the_official_codes(kind, golden, golden_network, golden_images, official_weights):
    expected = golden["values"][f"train_{kind}"]
    task = HDKD(student=golden_network("distilled"), teacher=golden_network("teacher"), kind=kind).train()
    result = task(golden_images, torch.tensor([0, 1]))
    result["loss"].backward()
    for ours, official in (("loss", "total"), ("logit_loss", "logit_loss"), ("feature_loss", "feature_loss")):
        assert result[ours].item() == pytest.approx(expected[official], rel=0, abs=1e-8)
    official = official_weights("distilled")
    official_name = {id(tensor): name for name, tensor in official.items()}
    name_of = {official_name[id(tensor)]: name for name, tensor in convert_official_state_dict(official).items()}
    parameters = dict(task.student.named_parameters())
    norms = {name: parameters[name_of[name]].grad.norm().item() for name in expected["grad_norm"]}
    assert norms == pytest.approx(expected["grad_norm"], rel=0, abs=1e-8)


def test_every_stage_of_both_networks_runs_once_a_step(networks, batch):
    """The official code runs stages 1, 2, 3 four, three and two times, and moves batch norm's statistics as often."""
    task = HDKD(**networks).train()
    ran = []
    for which, network in networks.items():
        for i, stage in enumerate(network.stages):
            stage.register_forward_hook(lambda *_, name=(which, i): ran.append(name))
    task(*batch)["loss"].backward()
    assert sorted(ran) == [(which, i) for which in ("student", "teacher") for i in range(3)]
    assert {int(v) for k, v in networks["student"].state_dict().items() if k.endswith("num_batches_tracked")} == {1}
    assert {int(v) for k, v in networks["teacher"].state_dict().items() if k.endswith("num_batches_tracked")} == {0}


def test_the_terms_add_up_as_the_paper_says(networks, batch):
    images, labels = batch
    task = HDKD(**networks, kind="hard", alpha=0.3, feature_weight=2.5, stages=(2, 3), stage_exponent=2).eval()
    result = task(images, labels)
    tokens, maps = networks["student"].forward_intermediates(images, [1, 2])
    features, teacher_maps = networks["teacher"].forward_intermediates(images, [1, 2])
    decisions = networks["teacher"].forward_head(features).argmax(1)
    class_logits, distillation_logits = networks["student"].head(tokens[:, 0]), networks["student"].head_dist(tokens[:, 1])
    logit_loss = 0.7 * F.cross_entropy(class_logits, labels) + 0.3 * F.cross_entropy(distillation_logits, decisions)
    mse = [(t - s).square().mean() for t, s in zip(teacher_maps, maps, strict=True)]
    assert_close(result["logit_loss"], logit_loss)
    assert_close(result["feature_loss"], mse[0] + 4 * mse[1])
    assert_close(result["loss"], logit_loss + 2.5 * (mse[0] + 4 * mse[1]))
    assert_close(result["output"], (class_logits + distillation_logits) / 2)
    assert feature_loss([], []) == 0
    with pytest.raises(ValueError, match="zip"):
        feature_loss(teacher_maps, maps[:1])


def test_temperature_and_reduction_reach_the_loss(networks, batch):
    loss = lambda **settings: HDKD(**networks, alpha=1, stages=(), **settings).eval()(*batch)["loss"]  # noqa: E731
    assert_close(loss(reduction="batchmean"), 10 * loss())
    assert not torch.isclose(loss(tau=4.0), loss())


def test_with_weights_of_zero_it_is_training_alone(networks, batch):
    images, labels = batch[0].double(), batch[1]
    task = HDKD(student=networks["student"].double(), teacher=networks["teacher"].double(), alpha=0, feature_weight=0).train()
    alone = copy.deepcopy(networks["student"])
    loss = F.cross_entropy(alone.head(alone.forward_features(images)[:, 0]), labels)
    loss.backward()
    result = task(images, labels)
    result["loss"].backward()
    assert_close(result["loss"], loss, rtol=0, atol=0)
    expected = {name: p.grad for name, p in alone.named_parameters() if p.grad is not None}
    gradients = {name: p.grad for name, p in task.student.named_parameters() if p.grad is not None}
    assert_close({name: gradients[name] for name in expected}, expected, rtol=1e-12, atol=1e-15)
    assert {name for name in gradients.keys() - expected.keys() if gradients[name].any()} == set()


def test_it_predicts_by_the_mean_of_both_heads_as_the_student_alone_does(networks, batch):
    task = HDKD(**networks).eval()
    with torch.no_grad():
        tokens = task.student.forward_features(batch[0])
        heads = task.student.head(tokens[:, 0]), task.student.head_dist(tokens[:, 1])
        assert_close(task.predict(batch[0]), (heads[0] + heads[1]) / 2)
        assert_close(task.predict(batch[0]), task.student(batch[0]))
        without = HDKD(**networks, alpha=0).eval()  # nothing trains its distillation head
        assert_close(without.predict(batch[0]), heads[0])
        assert_close(without(*batch)["output"], heads[0])


def test_without_stages_only_logits_are_distilled_from_any_teacher(build, batch):
    task = HDKD(student=build(), teacher=build("test_resnet"), stages=())
    result = task(*batch)
    assert result["feature_loss"] == 0
    assert_close(result["loss"], result["logit_loss"])
    result["loss"].backward()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": -0.1}, r"alpha must be in \[0, 1\] \(got -0.1\)"),
        ({"alpha": 1.5}, r"alpha must be in \[0, 1\]"),
        ({"kind": "medium"}, "kind must be 'soft' or 'hard'"),
        ({"tau": 0}, "tau must be above 0"),
        ({"feature_weight": -1}, "feature_weight at least 0"),
        ({"stages": (0, 1)}, "stages must be ascending numbers from 1 to 3"),
        ({"stages": (4,)}, "stages must be ascending numbers from 1 to 3"),
        ({"stages": (3, 1)}, "stages must be ascending"),
    ],
)
def test_arguments_out_of_range_are_refused(settings, message, networks):
    with pytest.raises(ValueError, match=message):
        HDKD(**networks, **settings)


def test_networks_that_do_not_fit_each_other_are_refused(build, networks):
    with pytest.raises(ValueError, match="needs a student with a distillation token"):
        HDKD(student=build("hdkd_student_nano"), teacher=networks["teacher"])
    with pytest.raises(ValueError, match="stage 3 has 48 channels at stride 8 in the student and 40 at stride 8 in"):
        HDKD(student=networks["student"], teacher=build("hdkd_teacher_nano", widths=(16, 24, 40)))
    with pytest.raises(ValueError, match="stage 1 has 16 channels at stride 2 in the student and 16 at stride 4 in"):
        HDKD(student=networks["student"], teacher=build("hdkd_teacher_nano", stem_stride=4, img_size=32))
    with pytest.raises(ValueError, match="the teacher has 4 classes and the student 10"):
        HDKD(student=networks["student"], teacher=build("hdkd_teacher_nano", num_classes=4))
