"""DeiT's distillation, through a token and without one."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from hdkd_lib.losses import soft_distillation, standardise_logits
from hdkd_lib.methods import DeiT
from hdkd_lib.methods.teacher import Teacher
from hdkd_lib.training import fit

TINY = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
STUDENTS = {"deit_tiny_distilled_patch16_224": TINY, "hdkd_student_distilled_nano": {}, "test_resnet": {}}


@pytest.fixture(params=STUDENTS)
def networks(request, build, batch):
    """Students with a distillation token, timm's and ours, and one without; a teacher with decisions of every kind."""
    student, teacher = build(request.param, **STUDENTS[request.param]), build("hdkd_teacher_nano", seed=7)
    with torch.no_grad():
        for _ in range(20):
            teacher.train()(batch[0])  # its batch norm knows these images
        teacher.head.bias -= Teacher(teacher, student)(batch[0])[0].mean(0)  # so that its decisions differ
    return {"student": student, "teacher": teacher}


def heads(student, images):
    """Class and distillation logits of a student in training, without a trace in its batch norm."""
    before = {name: value.clone() for name, value in student.state_dict().items()}
    logits = student.train()(images)
    student.load_state_dict(before)
    return logits if isinstance(logits, tuple) else (logits, logits)


@pytest.mark.parametrize("alpha", [0.3, 0.5, 1.0])
def test_hard_distillation_is_cross_entropy_with_the_teachers_decisions(alpha, networks, batch):
    task = DeiT(**networks, alpha=alpha).train()
    classes, distilled = heads(task.student, batch[0])
    decisions = task.teacher(batch[0])[0].argmax(1)
    assert len(decisions.unique()) > 1
    result = task(*batch)
    assert result.keys() == {"loss", "output", "class_loss", "distillation_loss"}
    assert_close(result["class_loss"], F.cross_entropy(classes, batch[1]))
    assert_close(result["distillation_loss"], F.cross_entropy(distilled, decisions))
    assert_close(result["loss"], (1 - alpha) * result["class_loss"] + alpha * result["distillation_loss"])
    assert_close(result["output"], (classes + distilled) / 2)
    assert (classes is distilled) == (not hasattr(task.student, "set_distilled_training"))
    assert classes is distilled or not torch.allclose(classes, distilled)


@pytest.mark.parametrize(("reduction", "divisor"), [("classes", 80), ("batchmean", 8)])
def test_soft_distillation_is_the_divergence_from_the_teacher_at_its_temperature(reduction, divisor, networks, batch):
    task = DeiT(**networks, distill_type="soft", alpha=0.3, tau=3.0, reduction=reduction).train()
    classes, distilled = heads(task.student, batch[0])
    p, q = ((logits / 3).log_softmax(1) for logits in (task.teacher(batch[0])[0], distilled))
    divergence = 9 * (p.exp() * (p - q)).sum() / divisor
    result = task(*batch)
    assert_close(result["distillation_loss"], divergence)
    assert_close(result["loss"], 0.7 * F.cross_entropy(classes, batch[1]) + 0.3 * divergence)


def test_without_alpha_it_is_cross_entropy_of_the_class_head(networks, batch):
    task = DeiT(**networks, alpha=0.0).train()
    classes, _ = heads(task.student, batch[0])
    result = task(*batch)
    assert_close(result["loss"], F.cross_entropy(classes, batch[1]))
    result["loss"].backward()
    if hasattr(task.student, "head_dist"):
        assert not task.student.head_dist.weight.grad.any()


def test_it_is_deits_own_setting_by_default(networks):
    assert DeiT(**networks).settings() == {
        **{"distill_type": "hard", "alpha": 0.5, "tau": 1.0, "reduction": "classes"},
        **{"standardise_logits": False, "distill_until": 1.0},
    }


def test_it_predicts_by_the_mean_of_both_heads(networks, batch):
    task = DeiT(**networks).eval()
    student = task.student
    features = student.forward_features(batch[0])
    expected = student(batch[0])
    if hasattr(student, "head_dist"):
        expected = (student.head(features[:, 0]) + student.head_dist(features[:, 1])) / 2
    assert_close(task.predict(batch[0]), expected)
    assert_close(task(*batch)["output"], expected)


def test_training_leaves_the_teacher_bitwise_as_it_was(networks, batch):
    task = DeiT(**networks)
    before = {name: value.clone() for name, value in task.teacher.network.state_dict().items()}
    optimizer = torch.optim.AdamW(task.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(2):
        task.train()
        optimizer.zero_grad()
        task(*batch)["loss"].backward()
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in task.teacher.network.state_dict().items())
    trained = [p.grad for p in task.student.parameters() if p.requires_grad]
    assert all(gradient is not None for gradient in trained)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"distill_type": "medium"}, r"distill_type must be 'soft' or 'hard' \(got 'medium'\)"),
        ({"alpha": -0.1}, r"alpha must be in \[0, 1\] and tau above 0 \(got -0.1 and 1.0\)"),
        ({"alpha": 1.1}, r"alpha must be in \[0, 1\] and tau above 0 \(got 1.1 and 1.0\)"),
        ({"tau": 0}, r"tau above 0 \(got 0.5 and 0\)"),
        ({"reduction": "mean"}, r"reduction must be 'classes' or 'batchmean' \(got 'mean'\)"),
    ],
)
def test_arguments_out_of_range_are_refused(settings, message, build):
    with pytest.raises(ValueError, match=message):
        DeiT(student=build("test_resnet"), teacher=build("hdkd_teacher_nano"), **settings)


def test_fit_trains_both_heads_and_the_run_gives_back_what_was_measured(build, digits, recipe, tmp_path):
    student = build("deit_tiny_distilled_patch16_224", **TINY)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    task = DeiT(student=student, teacher=build("hdkd_teacher_nano", seed=7))
    run = fit(task, digits, recipe, tmp_path, device="cpu", precision="float32", force=True)
    history = run.history
    mean = (history.train_class_loss + history.train_distillation_loss) / 2
    assert (history.train_loss - mean).abs().max() < 1e-4
    assert history.train_loss.iloc[-1] < history.train_loss.iloc[0]
    trained = student.state_dict()
    assert all(not torch.equal(trained[name], before[name]) for name in ("head.weight", "head_dist.weight", "dist_token"))
    assert run.config["method"]["name"] == "DeiT"
    images = digits.test.images[:].float()
    task.eval()
    assert_close(run.student()(images), task.student(images))


def test_standardised_logits_are_distilled_where_it_is_asked(build, batch):
    networks = {"student": build(), "teacher": build("hdkd_teacher_nano", seed=7)}
    task = DeiT(**networks, distill_type="soft", tau=2.0, standardise_logits=True)
    student, teacher = torch.randn(2, 8, 10)
    expected = soft_distillation(standardise_logits(student), standardise_logits(teacher), tau=2.0)
    assert_close(task.logit_loss(student, teacher), expected)
    assert task.settings()["standardise_logits"] is True
    assert DeiT(**networks).settings()["standardise_logits"] is False
