"""What the benchmarks share: their options, a race of actions, and the line of JSON at the end."""

import argparse
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from hdkd_lib import runs
from hdkd_lib.device import autocast, resolve_device, resolve_precision
from hdkd_lib.methods.base import Method


def options(description: str, *positional: str, batch: int = 32, **named: dict) -> argparse.Namespace:
    """--batch, --repeats, --device and --precision (both resolved), --out, what is said without a name, and further options
    by name, each with its arguments of `add_argument`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in positional:
        parser.add_argument(name)
    for name, arguments in named.items():
        parser.add_argument(f"--{name}", **arguments)
    parser.add_argument("--batch", type=int, default=batch)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    chosen.device = resolve_device(chosen.device)
    chosen.precision = resolve_precision(chosen.precision, chosen.device)
    return chosen


def training_step(task, images: torch.Tensor, labels: torch.Tensor, precision: str) -> Callable[[], None]:
    """zero_grad, forward, backward and AdamW of a timm task as `fit` trains it, with an optimiser of its own."""
    task.to(images.device, memory_format=torch.channels_last).train()
    images = images.contiguous(memory_format=torch.channels_last)
    if isinstance(task, Method):
        task.set_progress(task.progress)
    optimizer = torch.optim.AdamW(task.get_trainable_module().parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        with autocast(images.device, precision):
            loss = task(images, labels)["loss"]
        loss.backward()
        optimizer.step()

    return step


def race(actions: Mapping[str, Callable[[], object]], device: torch.device, repeats: int) -> dict[str, float]:
    """Seconds of each action, its best of some rounds, in turn, so that a slower minute hits all alike."""
    seconds = dict.fromkeys(actions, float("inf"))
    for _ in range(repeats + 1):  # the first round warms up
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds


def report(result: dict, device: torch.device, out: Path | None) -> None:
    """Prints the result with its environment, and writes it if a file is named."""
    result |= {"environment": runs.environment(device)}
    print(json.dumps(result))
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1) + "\n")
