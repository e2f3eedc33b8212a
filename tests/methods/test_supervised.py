"""Training alone, and linear probing."""

import torch
from torch.testing import assert_close

from hdkd_lib import models
from hdkd_lib.methods import Supervised


def train(task: Supervised, steps: int = 3) -> None:
    optimizer = torch.optim.SGD([p for p in task.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        task.train()
        optimizer.zero_grad()
        task(torch.randn(4, 3, 32, 32), torch.arange(4))["loss"].backward()
        optimizer.step()


def test_a_probe_changes_the_classifier_and_nothing_else():
    model = models.create("resnet10t", num_classes=4, drop_rate=0.5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train(Supervised(student=model, probe=True))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"fc.weight", "fc.bias"}  # batch norm's statistics stay, too


def test_a_probe_trains_both_heads_of_a_student_of_two():
    model = models.create("hdkd_student_distilled_nano", num_classes=3, img_size=32)
    Supervised(student=model, probe=True)
    learning = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert len(learning) == 2
    assert all(p.requires_grad for head in model.get_classifier() for p in head.parameters())


def test_without_a_probe_everything_learns():
    model = models.create("resnet10t", num_classes=4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train(Supervised(student=model))
    assert all(not torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_probe_sees_what_evaluation_sees():
    model = models.create("resnet10t", num_classes=4, drop_rate=0.5)
    task, images = Supervised(student=model, probe=True).train(), torch.randn(4, 3, 32, 32)
    assert_close(task(images, torch.arange(4))["output"], task.eval().predict(images))


def test_whether_it_probes_is_part_of_the_description():
    model = models.create("hdkd_teacher_nano", num_classes=4)
    assert Supervised(student=model).describe()["probe"] is False
    assert Supervised(student=model, probe=True).describe()["probe"] is True
