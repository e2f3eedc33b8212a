"""CSKD's cost: its spatial term against the head before the pooling, and its step against DeiT's with the same networks.

    python tests/benchmarks/cskd_step.py [--batch 32] [--device cuda] [--precision bf16]

Prints one JSON line. The spatial term is the student's side, forward and backward, of ViT-Ti's tokens and 1,000 classes; both
ways give the same loss, which is checked first. A step is zero_grad, forward, backward and AdamW of DeiT-Ti at 224 px that a
ResNet-18 teaches.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from hdkd_lib import models, runs
from hdkd_lib.methods import CSKD, DeiT
from hdkd_lib.methods.cskd import spatial_loss
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
    torch.manual_seed(0)
    teacher = models.create("resnet18", num_classes=1000)
    student = models.create("deit_tiny_distilled_patch16_224", num_classes=1000)
    tasks = {method.__name__: method(student=student, teacher=teacher).to(device).train() for method in (CSKD, DeiT)}
    images = torch.randn(options.batch, 3, 224, 224, device=device)
    labels = torch.randint(1000, (options.batch,), device=device)
    tokens = torch.randn(options.batch, 198, 192, device=device, requires_grad=True)
    fused = torch.randn(options.batch, 7, 7, 1000, device=device).movedim(3, 1)  # as `local_responses` gives them

    def pooled_first() -> torch.Tensor:
        with autocast(device, precision):
            return spatial_loss(tasks["CSKD"].patch_logits(tokens, images, (7, 7)), fused)

    def head_first() -> torch.Tensor:
        with autocast(device, precision):
            return spatial_loss(student.head_dist(tokens[:, 2:]).unflatten(1, (14, 14)).movedim(3, 1), fused)

    losses = pooled_first().item(), head_first().item()
    assert abs(losses[0] - losses[1]) < 1e-2 * losses[1], losses
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, fused=True)

    def step(task) -> None:
        optimizer.zero_grad()
        with autocast(device, precision):
            loss = task(images, labels)["loss"]
        loss.backward()
        optimizer.step()

    actions = {
        "pooled_first": lambda: pooled_first().backward(),
        "head_first": lambda: head_first().backward(),
        **{name: lambda task=task: step(task) for name, task in tasks.items()},
    }
    seconds = dict.fromkeys(actions, float("inf"))
    for _ in range(options.repeats + 1):  # in turn, so that a slower minute hits all alike; the first round warms up
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    result = {
        "benchmark": "cskd_step",
        "batch": options.batch,
        "precision": precision,
        "milliseconds": {name: round(1000 * value, 1) for name, value in seconds.items()},
        "spatial_speedup": round(seconds["head_first"] / seconds["pooled_first"], 2),
        "step_over_deit": round(seconds["CSKD"] / seconds["DeiT"], 3),
        "environment": runs.environment(device),
    }
    print(json.dumps(result))
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
