"""What every method shares: above all a teacher that nothing changes."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from hdkd_lib import models
from hdkd_lib.methods import HDKD, Supervised
from hdkd_lib.methods.base import Teacher


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
    assert task.trainable_module.state_dict().keys() == models.create("hdkd_student_distilled_nano").state_dict().keys()


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
        **{"name": "HDKD", "kind": "soft", "alpha": 0.25, "tau": 1.0, "feature_weight": 10.0, "stage_exponent": 1.0},
        **{"reduction": "classes", "stages": [1, 2]},
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
