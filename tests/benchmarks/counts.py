"""What a training step launches, computes and moves on a GPU, counted without one, and the time that an H100 needs at least.

    make benchmark NAME=counts ARGUMENTS="--out results/benchmarks/counts.json"

Prints one JSON line. A step is zero_grad, forward, backward and fused AdamW in bf16 autocast at 224 px with the published
networks (DeiT-Ti taught by RegNetY-16GF, 1,000 classes; HDKD's pair, 7). The batch is prepared; augmentation is counted apart.

A kernel is an operation of ATen that is no view: attention is one, and so is the backward pass of a convolution, which are
several launches. Bytes are what each of them reads and writes, as if nothing stayed in a cache. Milliseconds are the sum over
the kernels of the longer of bytes over 3.35 TB/s and operations over 989 TFLOP/s (H100 SXM, dense bf16): a bound, which no
kernel reaches, and which leaves out the time that the host needs to launch them.
"""

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path

import timing
import torch
from timm.utils import random_seed

from hdkd_lib import models
from hdkd_lib.data.augment import AUGMENTATIONS, Augmentation
from hdkd_lib.data.batches import Preprocess
from hdkd_lib.methods import CSKD, HDKD, DearKD, DeiT, Supervised
from hdkd_lib.methods.base import Method
from tests.fake_cuda import Counts, FakeCuda

BATCHES = (16, 128)


def tasks() -> dict:
    """By name: a task and the augmentation of its recipe; 1,000 classes as ImageNet, or 7 as HAM10000."""
    teacher = models.create("regnety_160", num_classes=1000)

    def deit(method, name: str = "deit_tiny_distilled_patch16_224", **options) -> tuple:
        return method(student=models.create(name, num_classes=1000), teacher=teacher, **options), "deit"

    pair = {"student": "hdkd_student_distilled", "teacher": "hdkd_teacher"}
    return {
        "DeiT": deit(DeiT),
        "CSKD": deit(CSKD),
        "DearKD": deit(DearKD, "dearkd_tiny_patch16_224", distill_until=1.0),
        "DearKD, stage II": deit(DearKD, "dearkd_tiny_patch16_224", distill_until=0.0),
        "HDKD": (HDKD(**{role: models.create(name, num_classes=7) for role, name in pair.items()}), "hdkd"),
        "HDKD's teacher": (Supervised(student=models.create("hdkd_teacher", num_classes=7)), "hdkd"),
    }


def summary(counts: Counts) -> dict:
    return {
        "kernels": counts.kernels,
        "teraflop": round(counts.flops / 1e12, 3),
        "gigabytes": round(counts.bytes / 1e9, 2),
        "milliseconds": round(1000 * counts.seconds, 2),
    }


def actions(task: Method, augmentation: Augmentation, batch: int) -> dict[str, Callable[[], object]]:
    """A training step, and the preparation of its images."""
    images = torch.zeros(batch, 3, 224, 224, dtype=torch.uint8, device="cuda")
    labels = torch.zeros(batch, dtype=torch.long, device="cuda")
    prepare = Preprocess(task.student, augmentation).to("cuda")
    random_seed(0)  # how much DeiT's augmentation does is drawn
    step = timing.training_step(task, prepare(images), labels, "bf16")
    return {"step": step, "augmentation": lambda: prepare(images)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    result = {
        "benchmark": "counts",
        "precision": "bf16",
        "image_size": 224,
        "counted": " ".join(" ".join(__doc__.split("\n\n")[2:]).split()),
    }
    result |= {"steps": {}, "augmentation": {}}
    with FakeCuda() as gpu:
        for (name, (task, augment)), batch in itertools.product(tasks().items(), BATCHES):
            of = actions(task, AUGMENTATIONS[augment](), batch)
            of["step"]()  # makes the optimiser's state
            counts = {key: summary(gpu.count(action)) for key, action in of.items()}
            result["steps"].setdefault(name, {})[batch] = counts["step"]
            result["augmentation"].setdefault(augment, {})[batch] = counts["augmentation"]
    timing.report(result, torch.device("cpu"), options.out)


if __name__ == "__main__":
    main()
