"""Several processes: what they do to the networks and to sums. Runs in two processes: test_training and test_dearkd."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from hdkd_lib import distributed
from hdkd_lib.methods import DearKD, Supervised


@pytest.fixture
def of_two(monkeypatch):
    """This process is the first of two, which do not talk."""
    monkeypatch.setattr(distributed, "rank_and_count", lambda: (0, 2))
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", lambda task, **options: nn.Sequential(task))


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "regnety_002", "hdkd_teacher_nano"])
def test_synchronised_batch_norms_keep_their_activations(name, build, of_two):
    task = DearKD(student=build("deit_tiny_distilled_patch16_224", img_size=32, depth=4), teacher=build("resnet10t"))
    task.trainable_module = build(name).eval()
    images = torch.randn(2, 3, 32, 32)
    before = task.student(images)
    [wrapped] = distributed.wrap(task, torch.device("cuda"))
    assert wrapped is task
    assert_close(task.student(images), before)
    norms = [
        m for part in (task.student, task.auxiliary) for m in part.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
    ]
    assert all(isinstance(norm, nn.SyncBatchNorm) for norm in norms)
    assert any(isinstance(norm, nn.SyncBatchNorm) for norm in task.auxiliary.modules())


def test_batch_norms_are_synchronised_on_gpus_alone(build, of_two):
    task = Supervised(student=build("hdkd_teacher_nano"))
    distributed.wrap(task, torch.device("cpu"))
    assert any(isinstance(m, nn.BatchNorm2d) for m in task.modules())
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in task.modules())


def test_one_process_trains_the_task_itself(build):
    assert distributed.rank_and_count() == (0, 1)
    task = Supervised(student=build("hdkd_teacher_nano"))
    assert distributed.wrap(task, torch.device("cuda")) is task
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in task.modules())


def test_totals_are_summed_and_images_counted_over_processes(of_two, monkeypatch):
    monkeypatch.setattr(distributed.dist, "all_reduce", lambda total: total.mul_(2))
    totals = {"loss": torch.tensor(1.5), "accuracy": torch.tensor(3.0)}
    assert distributed.sum_over_processes(totals, 7) == 14
    assert totals == {"loss": 3.0, "accuracy": 6.0}


def test_in_one_process_sums_are_its_own():
    totals = {"loss": torch.tensor(1.5)}
    assert distributed.sum_over_processes(totals, 7) == 7
    assert totals == {"loss": 1.5}


@pytest.mark.parametrize(
    ("device", "count", "most"), [("cpu", 0, 0), ("cpu", -1, -1), ("mps", 2, 1), ("cuda", 3, 2), ("cuda", 0, 2)]
)
def test_counts_that_cannot_be_are_refused(device, count, most, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=rf"num_processes must be .* \(got {count}, {most} of {device}\)"):
        distributed.check_count(count, torch.device(device))


@pytest.mark.parametrize(("device", "count"), [("cpu", 1), ("cpu", 64), ("mps", 1), ("cuda", 2)])
def test_counts_that_can_be_pass(device, count, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    distributed.check_count(count, torch.device(device))
