"""Several processes: what they do to the networks and to sums. Runs in two processes: test_training and test_dearkd."""

import os
import signal

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from hdkd_lib import distributed, training
from hdkd_lib.methods import DearKD, Supervised


def _end_by_the_system(job) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_process_that_was_killed_is_an_error_in_one_line(build):
    job = training.Training(Supervised(student=build("hdkd_teacher_nano")), None, None, None, 0, torch.device("cpu"), "float32")
    with pytest.raises(RuntimeError, match=r"^process 0 terminated with signal SIGKILL$"):
        distributed.spawn(_end_by_the_system, job, 1)


@pytest.fixture
def of_two(monkeypatch):
    """This process is the first of two, which do not talk."""
    monkeypatch.setattr(distributed, "rank_and_count", lambda: (0, 2))


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "regnety_002", "hdkd_teacher_nano"])
def test_synchronised_batch_norms_keep_their_activations(name, build, of_two):
    task = DearKD(student=build("deit_tiny_distilled_patch16_224", img_size=32, depth=4), teacher=build("resnet10t"))
    task.trainable_module.student = build(name).eval()
    images = torch.randn(2, 3, 32, 32)
    before = task.student(images)
    distributed.sync_batch_norms(task, torch.device("cuda"))
    assert_close(task.student(images), before)
    norms = [m for m in task.trainable_module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert all(isinstance(norm, nn.SyncBatchNorm) for norm in norms)
    assert any(isinstance(norm, nn.SyncBatchNorm) for norm in task.auxiliary.modules())


def test_batch_norms_are_synchronised_on_gpus_alone(build, of_two):
    task = Supervised(student=build("hdkd_teacher_nano"))
    distributed.sync_batch_norms(task, torch.device("cpu"))
    assert any(isinstance(m, nn.BatchNorm2d) for m in task.modules())
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in task.modules())


def test_one_process_trains_the_task_as_it_is(build):
    assert distributed.rank_and_count() == (0, 1)
    task = Supervised(student=build("hdkd_teacher_nano"))
    learner = task.trainable_module
    distributed.sync_batch_norms(task, torch.device("cuda"))
    distributed.prepare(task, torch.device("cuda"))
    assert task.trainable_module is learner
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in task.modules())


@pytest.mark.parametrize("option", ["forward_sync_buffers", "broadcast_buffers"])  # its name before torch 2.13
def test_buffers_are_each_processs_own_whatever_torch_calls_that(option, build, of_two, monkeypatch):
    monkeypatch.setattr(distributed, "DDP_OPTIONS", [option])
    task, asked = Supervised(student=build("hdkd_teacher_nano")), {}
    monkeypatch.setattr(task, "prepare_distributed", lambda **options: asked.update(options))
    distributed.prepare(task, torch.device("cuda", 1))
    assert asked == {"device_ids": [torch.device("cuda", 1)], option: False}


def test_sums_are_over_processes(of_two, monkeypatch):
    monkeypatch.setattr(distributed.dist, "all_reduce", lambda total: total.mul_(2))
    assert torch.equal(distributed.sum_over_processes(torch.tensor([1.5, 3.0])), torch.tensor([3.0, 6.0]))


def test_in_one_process_sums_are_its_own():
    assert torch.equal(distributed.sum_over_processes(torch.tensor([1.5])), torch.tensor([1.5]))


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
