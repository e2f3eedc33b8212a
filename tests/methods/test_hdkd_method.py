"""HDKD's losses, gradients and cost against the official code's values and faults."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from hdkd_lib.losses import soft_distillation
from hdkd_lib.methods import HDKD
from hdkd_lib.methods.hdkd import feature_loss
from hdkd_lib.models.official import convert_official_state_dict


@pytest.fixture
def networks(build):
    return {"student": build(), "teacher": build("hdkd_teacher_nano", seed=7)}


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_losses_and_gradients_are_the_official_codes(kind, golden, golden_network, golden_images, official_weights):
    expected = golden["values"][f"train_{kind}"]
    task = HDKD(student=golden_network("distilled"), teacher=golden_network("teacher"), distill_type=kind).train()
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
    task = HDKD(**networks, distill_type="hard", alpha=0.3, feature_weight=2.5, stages=(2, 3)).eval()
    result = task(images, labels)
    tokens, maps = networks["student"].forward_intermediates(images, [1, 2])
    features, teacher_maps = networks["teacher"].forward_intermediates(images, [1, 2])
    decisions = networks["teacher"].forward_head(features).argmax(1)
    class_logits, distillation_logits = networks["student"].head(tokens[:, 0]), networks["student"].head_dist(tokens[:, 1])
    logit_loss = 0.7 * F.cross_entropy(class_logits, labels) + 0.3 * F.cross_entropy(distillation_logits, decisions)
    mse = [(t - s).square().mean() for t, s in zip(teacher_maps, maps, strict=True)]
    assert_close(result["logit_loss"], logit_loss)
    assert_close(result["feature_loss"], mse[0] + 2 * mse[1])
    assert_close(result["loss"], logit_loss + 2.5 * (mse[0] + 2 * mse[1]))
    assert_close(result["output"], (class_logits + distillation_logits) / 2)
    assert feature_loss([], []) == 0
    assert_close(feature_loss(teacher_maps, maps, (2, 3)), 2 * mse[0] + 3 * mse[1])
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
        ({"alpha": -0.1}, r"alpha must be in \[0, 1\] and tau above 0 \(got -0.1 and 1.0\)"),
        ({"alpha": 1.5}, r"alpha must be in \[0, 1\] and tau above 0 \(got 1.5 and 1.0\)"),
        ({"prediction": -0.1}, r"prediction must be in \[0, 1\] .* \(got -0.1 and 10.0\)"),
        ({"prediction": 1.1}, r"prediction must be in \[0, 1\] .* \(got 1.1 and 10.0\)"),
        ({"stage_weighting": "depth"}, r"stage_weighting must be 'index' or 'number' \(got 'depth'\)"),
        ({"distill_type": "medium"}, "distill_type must be 'soft' or 'hard'"),
        ({"tau": 0}, "tau above 0"),
        ({"reduction": "mean", "distill_type": "hard"}, r"reduction must be 'classes' or 'batchmean' \(got 'mean'\)"),
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
    with pytest.raises(ValueError, match=r"HDKD needs a student such as hdkd_student_distilled \(got ResNet\)"):
        HDKD(student=build("test_resnet"), teacher=networks["teacher"])
    with pytest.raises(ValueError, match="stage 3 has 48 channels at stride 8 in the student and 40 channels at stride 8 in"):
        HDKD(student=networks["student"], teacher=build("hdkd_teacher_nano", widths=(16, 24, 40)))
    with pytest.raises(ValueError, match="stage 1 has 16 channels at stride 2 in the student and 16 channels at stride 4 in"):
        HDKD(student=networks["student"], teacher=build("hdkd_teacher_nano", stem_stride=4, img_size=32))
    with pytest.raises(ValueError, match="the teacher has 4 classes and the student 10"):
        HDKD(student=networks["student"], teacher=build("hdkd_teacher_nano", num_classes=4))


# Variants


@pytest.mark.parametrize(("weighting", "weights"), [("index", (1, 2)), ("number", (2, 3))])
def test_chosen_stages_are_weighted_by_their_index_or_their_number(weighting, weights, networks, batch):
    task = HDKD(**networks, stages=(2, 3), stage_weighting=weighting).eval()
    ours, teachers = (net.forward_intermediates(batch[0], [1, 2])[1] for net in (task.student, task.teacher.network))
    mse = [(t - s).square().mean() for t, s in zip(teachers, ours, strict=True)]
    assert_close(task(*batch)["feature_loss"], weights[0] * mse[0] + weights[1] * mse[1])


@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize("weight", [0.0, 0.25, 0.5, 1.0])
def test_the_prediction_weighs_the_distillation_head_where_it_is_trained(weight, alpha, networks, batch):
    task = HDKD(**networks, alpha=alpha, prediction=weight).eval()
    tokens = task.student.forward_features(batch[0])
    classes, distilled = task.student.head(tokens[:, 0]), task.student.head_dist(tokens[:, 1])
    expected = (1 - weight) * classes + weight * distilled if alpha else classes
    assert_close(task.predict(batch[0]), expected)
    assert_close(task(*batch)["output"], expected)


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_a_student_without_a_distillation_token_learns_all_by_its_class_token(kind, build, batch):
    student, teacher = build("hdkd_student_nano"), build("hdkd_teacher_nano", seed=7)
    task = HDKD(student=student, teacher=teacher, distill_type=kind, alpha=0.3, tau=2.0).eval()
    result, logits, answers = task(*batch), student(batch[0]), teacher(batch[0])
    distillation = soft_distillation(logits, answers, tau=2.0) if kind == "soft" else F.cross_entropy(logits, answers.argmax(1))
    assert_close(result["logit_loss"], 0.7 * F.cross_entropy(logits, batch[1]) + 0.3 * distillation)
    assert_close(result["loss"], result["logit_loss"] + 10 * result["feature_loss"])
    assert_close(result["output"], logits)
    assert_close(task.predict(batch[0]), logits)
    result["loss"].backward()
    assert student.head.weight.grad.any()


def test_without_alpha_features_alone_are_distilled(networks, batch):
    task = HDKD(**networks, alpha=0.0).eval()
    result = task(*batch)
    logits = task.student.head(task.student.forward_features(batch[0])[:, 0])
    assert_close(result["logit_loss"], F.cross_entropy(logits, batch[1]))
    assert_close(result["loss"], result["logit_loss"] + 10 * result["feature_loss"])
    result["loss"].backward()
    assert not task.student.head_dist.weight.grad.any()
    assert next(task.student.stages.parameters()).grad.any()


@pytest.mark.parametrize(
    ("teacher", "stages", "shapes"),
    [
        (
            "resnet18",
            (1, 2, 3),
            "stage 1 has 16 channels at stride 2 in the student and 64 channels at stride 2 in the teacher",
        ),
        ("resnet18", (3,), "stage 3 has 48 channels at stride 8 in the student and 128 channels at stride 8 in the teacher"),
        (
            "test_convnext",
            (2,),
            "stage 2 has 24 channels at stride 4 in the student and 32 channels at stride 8 in the teacher",
        ),
    ],
)
def test_stages_of_other_shapes_are_refused_with_both(teacher, stages, shapes, build, networks):
    message = f"{shapes}; take a teacher with the student's stages, such as hdkd_teacher"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        HDKD(student=networks["student"], teacher=build(teacher), stages=stages)


def test_stages_that_the_teacher_does_not_have_are_refused(build, networks):
    teacher = build("hdkd_teacher_nano")
    teacher.feature_info = teacher.feature_info[:2]
    with pytest.raises(ValueError, match="stage 3 has 48 channels at stride 8 in the student and 0 channels at stride 0 in"):
        HDKD(student=networks["student"], teacher=teacher)
    assert HDKD(student=networks["student"], teacher=teacher, stages=(1, 2)).stages == (1, 2)


@pytest.mark.parametrize(
    ("stages", "momenta"), [((1, 2, 3), (0.3439, 0.271, 0.19)), ((2,), (0.19, 0.19, 0.1)), ((), (0.1, 0.1, 0.1))]
)
def test_following_the_paper_moves_statistics_as_often_as_its_code_runs_each_stage(stages, momenta, networks, batch):
    task = HDKD(**networks, stages=stages)
    repeated = copy.deepcopy(task.student).train()
    task.follow_paper()
    for stage, momentum in zip(task.student.stages, momenta, strict=True):
        found = {m.momentum for m in stage.modules() if isinstance(m, torch.nn.BatchNorm2d)}
        assert [*found] == pytest.approx([momentum], abs=1e-12)
    task.train()(*batch)
    repeated(batch[0])
    for last in stages:
        x = batch[0]
        for stage in repeated.stages[:last]:
            x = stage(x)
    ours, theirs = ({k: v for k, v in n.state_dict().items() if "running" in k} for n in (task.student, repeated))
    assert ours
    assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
