"""What a GPU makes of a training step: timm's networks, every method with its paper's networks, an epoch of `fit`.

    make bench DEVICE=cuda [ARGUMENTS="--official /some/where"]         on one H100 in under eight minutes
    make bench DEVICE=cpu ARGUMENTS="--size 32 --batch 4 --repeats 1"   does it run?

On a GPU the result goes to results/benchmarks/gpu-NAME.json. A step is zero_grad, forward, backward and AdamW on random images
that are on the device already: timm's networks in timm's own task at twice the batch, the methods at the batch. DeiT-S without
its distillation token is ViT-S. `published` holds what others measured on other machines, in images per second. The share of
peak is FLOPs (two per multiplication and addition, teacher and backward pass included) over what the GPU's tensor cores can do
in bf16. `official` is hdkd_step.py's comparison with the official code, at its batch of 16.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import timing
import torch
from timm.task import ClassificationTask, TrainingTask
from torch.utils.flop_counter import FlopCounterMode

from hdkd_lib import models, recipes, runs
from hdkd_lib.data import Data
from hdkd_lib.data.batches import Part
from hdkd_lib.methods import CSKD, HDKD, DearKD, DeiT, LocalityGuidance
from hdkd_lib.training import fit
from tests.fake_cuda import convolution_backward_flops

# Dense bf16 on tensor cores with sums in float32, TFLOP/s, as the makers' data sheets have it.
PEAKS = {
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H200": 989,
    "NVIDIA A100-SXM4-40GB": 312,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA GeForce RTX 3090": 71,
}
PUBLISHED = {
    "DeiT-Ti": {"RTX 3090, AMP (timm's benchmark table)": 2290},
    "DeiT-S": {"RTX 3090, AMP (timm's benchmark table)": 1051, "H100": [1608, 2305]},
    "DeiT-S compiled": {"H100": [5560, 7716]},
    "ResNet-50": {"A100": 2470},
}


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def networks(size: int) -> dict[str, Callable[[], TrainingTask]]:
    """timm's tasks by name, each made when it is called."""

    def task(name: str) -> Callable[[], TrainingTask]:
        return lambda: ClassificationTask(models.create(name, img_size=size), verbose=False)

    names = {"DeiT-Ti": "deit_tiny_patch16_224", "DeiT-S": "deit_small_patch16_224", "ResNet-50": "resnet50"}
    return {name: task(network) for name, network in (names | {"DeiT-S compiled": names["DeiT-S"]}).items()}


def methods(size: int) -> dict[str, Callable[[], TrainingTask]]:
    """The library's tasks by name, each made when it is called. Locality guidance's ResNet-56 is a ResNet-18 here."""

    def task(method: type, student: str, teacher: str = "regnety_160", classes: int = 1000, **options):
        size_and_classes = {"img_size": size, "num_classes": classes}
        pair = {"student": student, "teacher": teacher}
        return lambda: method(**{role: models.create(name, **size_and_classes) for role, name in pair.items()}, **options)

    tiny = "deit_tiny_distilled_patch16_224"
    return {
        "HDKD": task(HDKD, "hdkd_student_distilled", "hdkd_teacher", classes=7),
        "CSKD": task(CSKD, tiny),
        "DearKD stage I": task(DearKD, "dearkd_tiny_patch16_224", distill_until=1.0),
        "DearKD stage II": task(DearKD, "dearkd_tiny_patch16_224", distill_until=0.0),
        "DeiT": task(DeiT, tiny),
        "LocalityGuidance": task(LocalityGuidance, "deit_tiny_patch16_224", "resnet18", taps={0: 4, 6: 8, 11: 16}),
    }


def step(make: Callable[[], TrainingTask], batch: int, options: argparse.Namespace, compiled: bool = False) -> dict:
    """Images per second, arithmetic and memory of a task's training step."""
    task = make()
    device, is_cuda = options.device, options.device.type == "cuda"
    images = torch.randn(batch, 3, options.size, options.size, device=device)
    labels = torch.randint(7, (batch,), device=device)
    one = timing.training_step(task, images, labels, options.precision)
    right = {torch.ops.aten.convolution_backward: convolution_backward_flops}  # torch's leaves out the groups
    with FlopCounterMode(display=False, custom_mapping=right) as counter:
        one()
    if compiled:
        task.compile()
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    count = 10 if is_cuda else 1  # the host may run ahead of the GPU, as in training
    seconds = timing.race({"": lambda: [one() for _ in range(count)]}, device, options.repeats)[""] / count
    tflop, peak = counter.get_total_flops() / 1e12, PEAKS.get(device_name(device))
    return {
        "batch": batch,
        "images_per_second": round(batch / seconds, 1),
        "milliseconds": round(1000 * seconds, 2),
        "tflop": float(f"{tflop:.4g}"),
        **({"share_of_peak": float(f"{tflop / seconds / peak:.3g}")} if peak and options.precision == "bf16" else {}),
        **({"gigabytes": round(torch.cuda.max_memory_allocated(device) / 1e9, 1)} if is_cuda else {}),
    }


def epoch(make: Callable[[], TrainingTask], recipe: str, options: argparse.Namespace) -> dict:
    """Images per second in the second epoch of `fit` on generated images: with what a recipe does to them, and reports."""
    task = make()
    classes = [str(number) for number in range(task.student.num_classes)]
    count = options.batch * (16 if options.device.type == "cuda" else 2)

    def part(name: str, count: int) -> Part:
        images = torch.randint(256, (count, 3, options.size, options.size), dtype=torch.uint8)
        labels = torch.arange(count) % len(classes)
        return Part(images, labels, [f"{name}{number}" for number in range(count)], np.arange(count))

    sizes = {"train": count, "val": options.batch, "test": options.batch}
    config = {"dataset": "generated", "image_size": options.size, "classes": classes}
    parts = {name: part(name, size) for name, size in sizes.items()}
    data = Data(**parts, classes=classes, card={}, config=config, source=None)
    short = recipes.get(recipe, epochs=2, batch_size=options.batch)
    with tempfile.TemporaryDirectory() as folder:
        run = fit(task, data, short, folder, device=str(options.device), precision=options.precision, force=True)
        return {"batch": options.batch, "images_per_second": round(count / run.history.seconds.iloc[-1], 1)}


def official(options: argparse.Namespace) -> dict:
    """hdkd_step.py's numbers, of processes of their own."""
    chosen = [f"--{name}={getattr(options, name)}" for name in ("official", "device", "precision")]
    program = [sys.executable, str(Path(__file__).with_name("hdkd_step.py")), *chosen]
    answer = subprocess.run(program, capture_output=True, text=True)
    if answer.returncode:
        raise RuntimeError(answer.stderr.strip().splitlines()[-1])
    return json.loads(answer.stdout.splitlines()[-1])


def attempt(name: str, action: Callable[..., dict], *arguments) -> dict:
    """What the action gives, or its error, such as too little memory: the rest is measured all the same."""
    try:
        found = action(*arguments)
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    torch.cuda.empty_cache()
    print(f"{name}: {json.dumps(found)}", file=sys.stderr, flush=True)
    return found


def main() -> None:
    named = {"size": {"type": int, "default": 224}, "official": {"type": Path, "help": "a checkout of omarsherif200/HDKD"}}
    options, start = timing.options(__doc__, batch=128, **named), time.perf_counter()
    torch.backends.cudnn.benchmark = True  # as timm's train.py
    torch.manual_seed(0)
    by_timm, ours = networks(options.size), methods(options.size)
    result = {"benchmark": "gpu", "size": options.size, "precision": options.precision}
    result["networks"] = {
        name: attempt(name, step, make, 2 * options.batch, options, "compiled" in name) | {"published": PUBLISHED[name]}
        for name, make in by_timm.items()
    }
    result["methods"] = {name: attempt(name, step, make, options.batch, options) for name, make in ours.items()}
    result["epochs"] = {
        name: attempt(f"an epoch of {name}", epoch, ours[name], recipe, options)
        for name, recipe in {"HDKD": "hdkd_student", "DeiT": "deit"}.items()
    }
    if options.official:
        result["official"] = {"official HDKD": attempt("official HDKD", official, options)}
    sections = [result[name] for name in ("networks", "methods", "epochs", "official") if name in result]
    failed = [f"{name} ({found['error']})" for section in sections for name, found in section.items() if "error" in found]
    result["seconds"] = round(time.perf_counter() - start)
    if options.out is None and options.device.type == "cuda":
        name = device_name(options.device).lower().replace(" ", "-")
        options.out = runs.ROOT / "results" / "benchmarks" / f"gpu-{name}.json"
    timing.report(result, options.device, options.out)
    if failed:
        sys.exit(f"not measured: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
