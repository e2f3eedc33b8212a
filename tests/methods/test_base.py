"""What every method shares: above all a teacher that nothing changes."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from hdkd_lib import models
from hdkd_lib.methods import CSKD, HDKD, DearKD, DeiT, Supervised
from hdkd_lib.methods.teacher import Teacher


def test_training_leaves_the_teacher_bitwise_as_it_was(make_task, batch):
    task = make_task()
    before = {name: value.clone() for name, value in task.teacher.network.state_dict().items()}
    answers = task.teacher(batch[0])[0]
    optimizer = torch.optim.AdamW(task.parameters(), lr=0.1, weight_decay=0.5)  # even where someone hands it everything
    student = {name: value.clone() for name, value in task.student.state_dict().items()}
    for _ in range(3):
        task.train()
        task.teacher.network.train()
        optimizer.zero_grad()
        task(*batch)["loss"].backward()
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in task.teacher.network.state_dict().items())
    assert torch.equal(task.teacher(batch[0])[0], answers)
    assert not task.teacher.network.training
    assert all(p.grad is None for p in task.teacher.parameters())
    assert not torch.equal(task.student.head.weight, student["head.weight"])


def test_the_teacher_is_no_part_of_what_is_trained_and_saved(make_task):
    task = make_task()
    teachers = {id(p) for p in task.teacher.parameters()}
    assert teachers
    assert not teachers & {id(p) for p in task.trainable_module.parameters()}
    assert not any(p.requires_grad for p in task.teacher.parameters())
    saved = task.get_checkpoint_state()["state_dict"]
    assert saved.keys() == models.create("hdkd_student_distilled_nano").state_dict().keys()


def test_the_teacher_answers_in_eval_mode_whatever_train_is_called_on(make_task, batch):
    task = make_task()
    expected = task.teacher.network.eval()(batch[0])
    for module in (task, task.teacher, task.teacher.network):
        module.train()
        assert module is task.teacher.network or not any(m.training for m in task.teacher.modules())
        logits, maps = task.teacher(batch[0], [0, 2])
        assert_close(logits, expected, rtol=0, atol=0)
        assert not logits.requires_grad
        assert [m.shape[1] for m in maps] == [16, 48]


def test_a_teacher_of_another_normalisation_sees_the_images_in_its_own(build, batch):
    student = build()
    network = build("test_resnet").eval()
    mean, std = ([[[value]] for value in student.pretrained_cfg[key]] for key in ("mean", "std"))
    assert network.pretrained_cfg["mean"] != student.pretrained_cfg["mean"]
    pixels = batch[0] * torch.tensor(std) + torch.tensor(mean)
    own_mean, own_std = (torch.tensor([[[value]] for value in network.pretrained_cfg[key]]) for key in ("mean", "std"))
    expected = network((pixels - own_mean) / own_std)
    assert_close(Teacher(network, student)(batch[0])[0], expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(network(batch[0]), expected, rtol=1e-2)


def test_a_description_is_plain_and_tells_settings_student_and_teacher(build):
    task = HDKD(student=build(), teacher=build("hdkd_teacher_nano"), alpha=0.25, stages=(1, 2))
    description = json.loads(json.dumps(task.describe()))
    assert description == {
        **{"name": "HDKD", "distill_type": "soft", "alpha": 0.25, "tau": 1.0, "feature_weight": 10.0},
        **{"reduction": "classes", "stages": [1, 2], "stage_weighting": "index", "prediction": 0.5},
        "distill_until": 1.0,
        "student": {"name": "hdkd_student_distilled_nano", "num_classes": 10, "img_size": 16},
        "teacher": {"name": "hdkd_teacher_nano", "num_classes": 10, "img_size": 16},
    }


@pytest.mark.parametrize("name", ["hdkd_teacher_nano", "hdkd_student_distilled_nano", "test_vit"])
def test_supervised_training_is_cross_entropy_of_any_network(name, build, batch):
    task = Supervised(student=build(name, **({"img_size": 16} if name == "test_vit" else {}))).eval()
    result = task(*batch)
    assert result.keys() == {"loss", "output"}
    assert_close(result["loss"], F.cross_entropy(task.student(batch[0]), batch[1]))
    assert_close(task.predict(batch[0]), result["output"])
    task.set_progress(0.5)
    assert task.progress == 0.5


WEIGHTS = torch.tensor([0.5, 2.0, 1.0, 0.25, 3.0, 1.0, 0.1, 1.5, 1.0, 0.75])


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_cross_entropy_takes_class_weights_and_smooths_labels(weights, smoothing, build, batch):
    task, logits, labels = Supervised(student=build()), torch.randn(8, 10, generator=torch.Generator().manual_seed(0)), batch[1]
    task.class_weights, task.label_smoothing = weights, smoothing
    expected = F.cross_entropy(logits, labels, weights, label_smoothing=smoothing)
    assert_close(task.cross_entropy(logits, labels), expected)
    if weights is not None and not smoothing:
        own = F.cross_entropy(logits, labels, reduction="none")
        assert_close(expected, (own * weights[labels]).sum() / weights[labels].sum())


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_the_cross_entropy_does_not_smooth_probabilities_a_second_time(weights, build):
    logits, target = (torch.randn(8, 10, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    target = target.softmax(1)
    task = Supervised(student=build())
    task.class_weights, task.label_smoothing = weights, 0.1
    each = 1 if weights is None else weights
    assert_close(task.cross_entropy(logits, target), -(each * target * logits.log_softmax(1)).sum(1).mean())


@pytest.mark.parametrize("is_soft", [False, True])
@pytest.mark.parametrize("name", ["Supervised", "HDKD", "DeiT"])
def test_every_method_uses_the_weighted_and_smoothed_cross_entropy(name, is_soft, build, batch):
    images, target = batch[0], F.one_hot(batch[1], 10).float().mul(0.8).add(0.02) if is_soft else batch[1]
    teacher = build("hdkd_teacher_nano", seed=7)
    if name == "HDKD":
        task = HDKD(student=build(), teacher=teacher, alpha=0.0, stages=()).eval()  # its cross-entropy alone
    elif name == "DeiT":
        task = DeiT(student=build("hdkd_student_nano"), teacher=teacher, alpha=0.0).eval()
    else:
        task = Supervised(student=build("hdkd_student_nano")).eval()
    plain = task(images, target)
    task.class_weights, task.label_smoothing = WEIGHTS, 0.1
    result = task(images, target)
    expected = F.cross_entropy(result["output"], target, WEIGHTS, label_smoothing=0.0 if is_soft else 0.1)
    assert_close(result["loss"], expected)
    assert (result["loss"] - plain["loss"]).abs() > 1e-3


@pytest.mark.parametrize("kind", ["soft", "hard"])
@pytest.mark.parametrize("method", [HDKD, DeiT])
def test_class_weights_do_not_reach_distillation(method, kind, build, batch):
    task = method(student=build(), teacher=build("hdkd_teacher_nano", seed=7), distill_type=kind, alpha=1.0).eval()
    before = task(*batch)["loss"]
    task.class_weights, task.label_smoothing = WEIGHTS, 0.1
    assert_close(task(*batch)["loss"], before)


def test_a_pretrained_teacher_with_a_random_head_is_refused(build):
    teacher = build("test_resnet", num_classes=10)
    teacher.creation["pretrained"] = True
    with pytest.raises(ValueError, match=r"knows 1000 classes; its head for 10 is random: train it first"):
        HDKD(student=build(), teacher=teacher)
    plain = build("vit_tiny_patch16_224", num_classes=10, img_size=32)
    with pytest.raises(ValueError, match="its head for 10 is random"):
        DeiT(student=plain, teacher=teacher)
    DeiT(student=plain, teacher=models.load_weights(teacher, teacher.state_dict()))  # whoever has its weights has its head


@pytest.mark.parametrize("method", [CSKD, DearKD, DeiT, HDKD])
def test_every_method_can_stop_its_teacher(method, build, batch, monkeypatch):
    own = {"taps": {}} if method is DearKD else {}
    task = method(student=build(), teacher=build("hdkd_teacher_nano", seed=7), alpha=0.3, distill_until=0.5, **own)
    task.student.set_distilled_training(True)
    task.set_progress(0.49)
    assert "distillation_loss" in task(*batch) or "feature_loss" in task(*batch)
    task.set_progress(0.5)
    monkeypatch.setattr(task.teacher.network, "forward", None)
    monkeypatch.setattr(task.teacher.network, "forward_features", None)
    result = task.train()(*batch)
    class_logits, distillation_logits = task.student(batch[0])
    expected = 0.7 * F.cross_entropy(class_logits, batch[1]) + 0.3 * F.cross_entropy(distillation_logits, batch[1])
    assert_close(result["loss"], expected)
    assert_close(result["output"], (class_logits + distillation_logits) / 2)
    assert result.keys() == {"loss", "output", "class_loss"}


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_a_teacher_stops_within_training(share, build):
    with pytest.raises(ValueError, match=r"distill_until must be in \[0, 1\]"):
        DeiT(student=build(), teacher=build("hdkd_teacher_nano"), distill_until=share)
