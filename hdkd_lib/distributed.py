"""One run in several processes of this machine, each with its share of every batch."""

import copy
import inspect
import tempfile
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from timm.task import TrainingTask
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from hdkd_lib.device import tune

DDP_OPTIONS = inspect.signature(DistributedDataParallel).parameters


def rank_and_count() -> tuple[int, int]:
    """The number of this process, counted from 0, and of all."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def check_count(count: int, device: torch.device) -> None:
    """Whether so many processes can train here.

    Raises:
        ValueError: fewer than one, or more than there are GPUs.
    """
    most = {"cuda": torch.cuda.device_count(), "mps": 1}.get(device.type, count)
    if not 1 <= count <= max(1, most):
        raise ValueError(
            f"num_processes must be at least 1, and on GPUs at most their number (got {count}, {most} of {device.type})"
        )


def spawn(train: Callable, job, count: int) -> None:
    """`train(job)` in `count` processes that can average gradients (`prepare`); `job` is a dataclass with a task and a device.

    Raises:
        RuntimeError: one of them failed or was killed; the message is its error's last line.
    """
    with tempfile.TemporaryDirectory() as folder:
        if job.device.type == "cuda":
            torch.cuda.empty_cache()  # the first process works on the same GPU
        arguments = (count, f"file://{folder}/rendezvous", train, replace(job, task=job.task.cpu()))
        try:
            torch.multiprocessing.spawn(_start, arguments, nprocs=count)
        except (torch.multiprocessing.ProcessRaisedException, torch.multiprocessing.ProcessExitedException) as error:
            raise RuntimeError(str(error).strip().splitlines()[-1]) from error


def _start(rank: int, count: int, rendezvous: str, train: Callable, job) -> None:
    is_cuda = job.device.type == "cuda"
    device = torch.device("cuda", rank) if is_cuda else job.device
    torch.set_num_threads(max(1, torch.get_num_threads() // count))
    if is_cuda:
        torch.cuda.set_device(device)
        tune(device)
    dist.init_process_group("nccl" if is_cuda else "gloo", init_method=rendezvous, rank=rank, world_size=count)
    try:
        task = copy.deepcopy(job.task).to(device, memory_format=torch.channels_last)  # what was sent is in shared memory
        train(replace(job, task=task, device=device))
    finally:
        dist.destroy_process_group()


def prepare(task: TrainingTask, device: torch.device) -> None:
    """Lets gradients be averaged over all processes after each backward pass, where there are several."""
    if rank_and_count()[1] > 1:
        own = "forward_sync_buffers" if "forward_sync_buffers" in DDP_OPTIONS else "broadcast_buffers"  # torch before 2.13
        task.prepare_distributed(device_ids=[device], **{own: False})


def sync_batch_norms(task: TrainingTask, device: torch.device) -> None:
    """On GPUs the batch norms of what learns count the images of all processes."""
    if rank_and_count()[1] > 1 and device.type == "cuda":  # timm's conversion keeps the activation that some of its norms hold
        task.trainable_module = convert_sync_batchnorm(task.trainable_module)


def sum_over_processes(total: Tensor) -> Tensor:
    """The sum of each process's tensor, in all of them."""
    if rank_and_count()[1] > 1:
        dist.all_reduce(total)
    return total
