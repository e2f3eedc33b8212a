"""DearKD's cost: its two stages against training alone, and convolutional attention against plain attention.

    python tests/benchmarks/dearkd_step.py [--batch 32] [--device cuda] [--precision bf16]

Prints one JSON line. A step is zero_grad, forward, backward and AdamW of DeiT-Ti with convolutional attention at 224 px that a
ResNet-18 teaches; in stage II it should cost what the same student costs alone, and on a GPU leave the teacher's memory.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from hdkd_lib import models, runs
from hdkd_lib.methods import DearKD, DeiT, Supervised
from hdkd_lib.training import autocast, resolve_device, resolve_precision


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = resolve_device(options.device)
    precision = resolve_precision(options.precision, device)

    def student(name: str = "dearkd_tiny_patch16_224", **arguments) -> torch.nn.Module:
        torch.manual_seed(0)
        return models.create(name, num_classes=1000, **arguments)

    teacher = models.create("resnet18", num_classes=1000)
    tasks = {
        "stage_1": DearKD(student=student(), teacher=teacher, stage1_fraction=1.0),
        "stage_2": DearKD(student=student(), teacher=teacher, stage1_fraction=0.0),
        "alone": Supervised(student=student()),
        "alone_add": Supervised(student=student(conv_mode="add")),
        "alone_plain": Supervised(student=student(conv_blocks=0)),
        "deit_plain": DeiT(student=student(conv_blocks=0), teacher=teacher),
    }
    images = torch.randn(options.batch, 3, 224, 224, device=device)
    labels = torch.randint(1000, (options.batch,), device=device)
    optimizers = {}
    for name, task in tasks.items():
        task.to(device).train()
        task.set_progress(0.0)
        parameters = [*task.student.parameters(), *task.auxiliary.parameters()]
        optimizers[name] = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    seconds = dict.fromkeys(tasks, float("inf"))
    for _ in range(options.repeats + 1):  # in turn, so that a slower minute hits all alike; the first round warms up
        for name, task in tasks.items():
            start = time.perf_counter()
            optimizers[name].zero_grad()
            with autocast(device, precision):
                loss = task(images, labels)["loss"]
            loss.backward()
            optimizers[name].step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    result = {
        "benchmark": "dearkd_step",
        "batch": options.batch,
        "precision": precision,
        "milliseconds": {name: round(1000 * value, 1) for name, value in seconds.items()},
        "stage_2_over_alone": round(seconds["stage_2"] / seconds["alone"], 3),
        "gate_over_plain": round(seconds["alone"] / seconds["alone_plain"], 3),
        "add_over_plain": round(seconds["alone_add"] / seconds["alone_plain"], 3),
        "environment": runs.environment(device),
    }
    print(json.dumps(result))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
