"""DearKD's cost: its two stages against training alone, and convolutional attention against plain attention.

    python tests/benchmarks/dearkd_step.py [--batch 32] [--device cuda] [--precision bf16]

Prints one JSON line. A step is zero_grad, forward, backward and AdamW of DeiT-Ti with convolutional attention at 224 px that a
ResNet-18 teaches; in stage II it should cost what the same student costs alone.
"""

import timing
import torch

from hdkd_lib import models
from hdkd_lib.methods import DearKD, DeiT, Supervised


def main() -> None:
    options = timing.options(__doc__)
    device = options.device

    def student(**arguments) -> torch.nn.Module:
        torch.manual_seed(0)
        return models.create("dearkd_tiny_patch16_224", num_classes=1000, **arguments)

    teacher = models.create("resnet18", num_classes=1000)
    tasks = {
        "stage_1": DearKD(student=student(), teacher=teacher, distill_until=1.0),
        "stage_2": DearKD(student=student(), teacher=teacher, distill_until=0.0),
        "alone": Supervised(student=student()),
        "alone_add": Supervised(student=student(conv_mode="add")),
        "alone_plain": Supervised(student=student(conv_blocks=0)),
        "deit_plain": DeiT(student=student(conv_blocks=0), teacher=teacher),
    }
    images = torch.randn(options.batch, 3, 224, 224, device=device)
    labels = torch.randint(1000, (options.batch,), device=device)
    steps = {name: timing.training_step(task, images, labels, options.precision) for name, task in tasks.items()}
    seconds = timing.race(steps, device, options.repeats)
    result = {
        "benchmark": "dearkd_step",
        "batch": options.batch,
        "precision": options.precision,
        "milliseconds": {name: round(1000 * value, 1) for name, value in seconds.items()},
        "stage_2_over_alone": round(seconds["stage_2"] / seconds["alone"], 3),
        "gate_over_plain": round(seconds["alone"] / seconds["alone_plain"], 3),
        "add_over_plain": round(seconds["alone_add"] / seconds["alone_plain"], 3),
    }
    timing.report(result, device, options.out)


if __name__ == "__main__":
    main()
