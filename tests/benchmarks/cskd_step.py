"""CSKD's cost: its spatial term against the head before the pooling, and its step against DeiT's with the same networks.

    python tests/benchmarks/cskd_step.py [--batch 32] [--device cuda] [--precision bf16]

Prints one JSON line. The spatial term is the student's side, forward and backward, of ViT-Ti's tokens and 1,000 classes, with
the teacher's decisions at hand; both ways give the library's loss, which is checked first. A step is zero_grad, forward,
backward and AdamW of DeiT-Ti at 224 px that a ResNet-18 teaches.
"""

import timing
import torch
import torch.nn.functional as F

from hdkd_lib import models
from hdkd_lib.device import autocast
from hdkd_lib.methods import CSKD, DeiT
from hdkd_lib.methods.cskd import spatial_loss


def main() -> None:
    options = timing.options(__doc__)
    device, precision = options.device, options.precision
    torch.manual_seed(0)
    teacher = models.create("resnet18", num_classes=1000)
    student = models.create("deit_tiny_distilled_patch16_224", num_classes=1000)
    tasks = {method.__name__: method(student=student, teacher=teacher).to(device).train() for method in (CSKD, DeiT)}
    images = torch.randn(options.batch, 3, 224, 224, device=device)
    labels = torch.randint(1000, (options.batch,), device=device)
    tokens = torch.randn(options.batch, 198, 192, device=device, requires_grad=True)
    fused = torch.randn(options.batch, 7, 7, 1000, device=device).movedim(3, 1)  # as `local_responses` gives them
    decided = fused.argmax(1).flatten()

    def pooled_first() -> torch.Tensor:
        with autocast(device, precision):
            logits = tasks["CSKD"].patch_logits(tokens, images, (7, 7))
            return F.cross_entropy(logits.movedim(1, 3).flatten(0, 2), decided)

    def head_first() -> torch.Tensor:
        with autocast(device, precision):
            logits = F.adaptive_avg_pool2d(student.head_dist(tokens[:, 2:]).unflatten(1, (14, 14)).movedim(3, 1), 7)
            return F.cross_entropy(logits.movedim(1, 3).flatten(0, 2), decided)

    with autocast(device, precision):
        own = spatial_loss(tasks["CSKD"].patch_logits(tokens, images, (7, 7)), fused).item()
    losses = pooled_first().item(), head_first().item()
    assert max(abs(loss - own) for loss in losses) < 1e-2 * own, (own, losses)

    actions = {
        "pooled_first": lambda: pooled_first().backward(),
        "head_first": lambda: head_first().backward(),
        **{name: timing.training_step(task, images, labels, precision) for name, task in tasks.items()},
    }
    seconds = timing.race(actions, device, options.repeats)
    result = {
        "benchmark": "cskd_step",
        "batch": options.batch,
        "precision": precision,
        "milliseconds": {name: round(1000 * value, 1) for name, value in seconds.items()},
        "spatial_speedup": round(seconds["head_first"] / seconds["pooled_first"], 2),
        "step_over_deit": round(seconds["CSKD"] / seconds["DeiT"], 3),
    }
    timing.report(result, device, options.out)


if __name__ == "__main__":
    main()
