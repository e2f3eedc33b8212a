"""A training step of HDKD's full pair, ours beside the official code's: same weights, same batch, same loss.

    git clone https://github.com/omarsherif200/HDKD /some/where && pip install einops
    python tests/benchmarks/hdkd_step.py --official /some/where [--batch 16] [--device cuda] [--precision bf16]

Prints one JSON line. A step is zero_grad, forward, backward and AdamW on a batch that is on the device already. The losses are
compared in float32 before anything is timed; the official code is timed as it is, in float32. Each side is measured in a
process of its own, so that `memory_ratio` compares peaks (ours over the official: allocated on a GPU, resident on a CPU).
"""

import argparse
import importlib
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import timing
import torch

from hdkd_lib import models
from hdkd_lib.device import autocast, resolve_device, resolve_precision
from hdkd_lib.methods import HDKD
from hdkd_lib.models.official import convert_official_state_dict


def official(path: Path):
    """(student, teacher, step function) of the repository at `path`, with its own modules."""
    sys.path.insert(0, str(path))
    losses = importlib.import_module("losses")
    student = importlib.import_module("models.student_model").HDKD(num_classes=7)
    teacher = importlib.import_module("models.teacher_model").teacher_model(num_classes=7).eval().requires_grad_(False)
    logit = losses.LogitDistillationLoss(torch.nn.CrossEntropyLoss(), teacher, "soft", 0.5, 1.0)
    total = losses.TotalDistillationLoss(logit, losses.FeatureDistillationLoss(teacher, student, 1.0))
    return student, teacher, lambda images, labels: total(images, student(images), labels)


def ours(weights: dict):
    """(student, teacher, step function) with the official weights."""
    student, teacher = models.create("hdkd_student_distilled", num_classes=7), models.create("hdkd_teacher", num_classes=7)
    student.load_state_dict(convert_official_state_dict(weights["student"]))
    teacher.load_state_dict(convert_official_state_dict(weights["teacher"]))
    task = HDKD(student=student, teacher=teacher).train()
    return student, teacher, lambda images, labels: task(images, labels)["loss"]


def measure(side: str, options: argparse.Namespace) -> dict:
    """The loss of one batch, images per second and peak memory."""
    torch.manual_seed(0)
    theirs = official(options.official)
    if side == "official":
        student, teacher, loss = theirs
    else:
        student, teacher, loss = ours({"student": theirs[0].state_dict(), "teacher": theirs[1].state_dict()})
    del theirs
    device, precision = torch.device(options.device), options.precision if side == "ours" else "float32"
    layout = torch.channels_last if side == "ours" else torch.contiguous_format
    student.train().to(device, memory_format=layout)
    teacher.to(device, memory_format=layout)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(options.batch, 3, 224, 224, generator=generator).to(device, memory_format=layout)
    labels = torch.randint(7, (options.batch,), generator=generator).to(device)
    with torch.no_grad():
        first = loss(images, labels).item()
    optimizer = torch.optim.AdamW(
        student.parameters(), lr=5e-5, weight_decay=0.05, **({"fused": True} if side == "ours" else {})
    )

    def step() -> None:
        optimizer.zero_grad()
        with autocast(device, precision):
            value = loss(images, labels)
        value.backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    step()
    best = float("inf")
    for _ in range(options.steps):
        start = time.perf_counter()
        step()
        best = min(best, time.perf_counter() - start)
    peak = (
        torch.cuda.max_memory_allocated(device)
        if device.type == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    return {"loss": first, "images_per_second": options.batch / best, "peak_bytes": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", type=Path, required=True, help="a checkout of github.com/omarsherif200/HDKD")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto", help="ours: auto, float32 or bf16")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--side", choices=["official", "ours"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    device = resolve_device(options.device)
    options.device, options.precision = str(device), resolve_precision(options.precision, device)
    if options.side:
        print(json.dumps(measure(options.side, options)))
        return
    given = [f"--{name}={getattr(options, name)}" for name in ("official", "batch", "steps", "device", "precision")]
    sides = {}
    for side in ("official", "ours"):
        answer = subprocess.run([sys.executable, __file__, *given, f"--side={side}"], capture_output=True, text=True)
        if answer.returncode:
            sys.exit(f"the {side} side failed:\n{answer.stderr}")
        sides[side] = json.loads(answer.stdout.splitlines()[-1])
    difference = abs(sides["ours"]["loss"] - sides["official"]["loss"]) / abs(sides["official"]["loss"])
    if difference > 1e-4:
        sys.exit(f"the losses differ by {difference:.1e} of their size: {sides}")
    result = {
        "benchmark": "hdkd_step",
        "batch": options.batch,
        "precision": options.precision,
        "loss_official": sides["official"]["loss"],
        "loss_ours": sides["ours"]["loss"],
        "official_images_per_second": round(sides["official"]["images_per_second"], 2),
        "ours_images_per_second": round(sides["ours"]["images_per_second"], 2),
        "speedup": round(sides["ours"]["images_per_second"] / sides["official"]["images_per_second"], 2),
        "memory_ratio": round(sides["ours"]["peak_bytes"] / sides["official"]["peak_bytes"], 3),
    }
    timing.report(result, device, options.out)


if __name__ == "__main__":
    main()
