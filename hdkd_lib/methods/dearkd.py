"""DearKD: early layers of a CNN teach early blocks of a transformer, which then trains alone.

Chen et al., "DearKD: Data-Efficient Early Knowledge Distillation for Vision Transformers", CVPR 2022 (arXiv 2204.12997).
Re-implemented from descriptions: no code is public. Known [paper]: two stages, the first distils early intermediate layers
beside the logits, the second trains without distillation; [second-hand summary] an aligner joins maps and tokens. With z_c, z_d
the student's class and distillation logits, t the teacher's logits, S_l tokens after block l and T_l the teacher's map for it:

    stage I   L = (1 - alpha) CE(z_c, y) + alpha L_KD(z_d, t) + w mean_l MSE(A_l(S_l), standardise(T_l))
    stage II  L = (1 - alpha) CE(z_c, y) + alpha CE(z_d, y)

OUR CHOICE, all of it: hard labels and alpha = 1/2 as DeiT; w = 1 on teacher channels of mean 0 and variance 1 over batch and
places, so that the term starts near 1 whatever the teacher; block 1 learns from stride 4, block 3 from stride 8; maps meet on
the student's grid; A_l is a depthwise 3x3 convolution, batch norm, GELU and a 1x1 convolution; stage II begins at 5/6 of the
epochs (with the first epoch that begins there or later) and trains both heads on labels, since inference averages them. Its
steps run neither teacher nor aligners.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hdkd_lib.methods.base import Distillation, answers
from hdkd_lib.models.dearkd import ConvAttention


class Aligner(nn.Sequential):
    """Tokens on their grid (B, D, h, w) to the widths of a teacher's map (B, C, h, w); of use in training alone."""

    def __init__(self, tokens: int, channels: int):
        depthwise = nn.Conv2d(tokens, tokens, 3, padding=1, groups=tokens, bias=False)
        super().__init__(depthwise, nn.BatchNorm2d(tokens), nn.GELU(), nn.Conv2d(tokens, channels, 1))


def standardise(maps: Tensor, eps: float = 1e-6) -> Tensor:
    """(B, C, h, w) with mean 0 and variance 1 in every channel over batch and places, in float32 at least."""
    maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
    variance, mean = torch.var_mean(maps, (0, 2, 3), correction=0, keepdim=True)
    return (maps - mean) * (variance + eps).rsqrt()


def to_grid(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """Average-pooled to the grid (rows, columns), or interpolated where the maps (B, C, h, w) are coarser."""
    if maps.shape[2] >= grid[0] and maps.shape[3] >= grid[1]:
        return F.adaptive_avg_pool2d(maps, grid)
    return F.interpolate(maps, size=grid, mode="bilinear", align_corners=False)


class DearKD(Distillation):
    """`DearKD(student=..., teacher=...)(images, target)` gives `loss`, `output`, `class_loss`; in stage I `distillation_loss`
    and `hidden_loss` (before its weight); and `gate`, the mean weight of position in convolutional attention.

    Args:
        student: any timm vision transformer; best one with convolutional attention, such as dearkd_tiny_patch16_224.
        teacher: any timm CNN that has the strides of the taps.
        distill_type: "hard" or "soft" distillation of logits; soft divides the KL divergence by B.
        alpha: weight of the distillation token's loss against the class token's, in [0, 1].
        tau: temperature of soft distillation.
        hidden_weight: w, at least 0.
        taps: the student's block (from 0) -> the stride of the teacher's map that teaches it; {}: logits alone teach.
        distill_until: share of training after which stage II begins (`Distillation`).
        stage2: which tokens learn from labels in stage II: "both" or the "class" token alone.

    Raises:
        ValueError: an argument is out of range, or the networks have no such block or stride.
    """

    def __init__(
        self,
        *,
        student: nn.Module,
        teacher: nn.Module,
        distill_type: str = "hard",
        alpha: float = 0.5,
        tau: float = 1.0,
        hidden_weight: float = 1.0,
        taps: Mapping[int, int] = {1: 4, 3: 8},
        distill_until: float = 5 / 6,
        stage2: str = "both",
        total_steps: int | None = None,
    ):
        super().__init__(student=student, teacher=teacher, distill_until=distill_until, total_steps=total_steps)
        self.set_logit_distillation(distill_type=distill_type, alpha=alpha, tau=tau, reduction="batchmean")
        if hidden_weight < 0 or stage2 not in ("both", "class"):
            raise ValueError(
                f"hidden_weight must be at least 0 and stage2 'both' or 'class' (got {hidden_weight} and {stage2!r})"
            )
        self.hidden_weight, self.stage2 = hidden_weight, stage2
        for block, widths in self.set_taps(taps).items():
            self.auxiliary[f"aligner{block}"] = Aligner(*widths)
        self.attentions = [
            module for module in student.modules() if isinstance(module, ConvAttention) and module.mode == "gate"
        ]
        if hasattr(student, "set_distilled_training"):
            student.set_distilled_training(True)  # both heads' logits in training, their mean in eval mode

    @staticmethod
    def student_pass(
        student: nn.Module, auxiliary: nn.ModuleDict, images: Tensor, *, taps: Sequence[int] = (), is_class_alone: bool = False
    ) -> dict:
        """The answers, and `aligned` maps of the blocks `taps`, one by one; `is_class_alone`: no other head learns."""
        if taps:
            tokens, hidden = student.forward_intermediates(images, list(taps))
        else:
            tokens, hidden = student.forward_features(images), []
        logits = student.forward_head(tokens)
        if is_class_alone and isinstance(logits, tuple):
            logits = logits[0], logits[1].detach()
        return answers(logits) | {
            "aligned": [auxiliary[f"aligner{block}"](maps) for block, maps in zip(taps, hidden, strict=True)]
        }

    def asks(self, teacher: dict | None) -> dict:
        return {"is_class_alone": self.stage2 == "class"} if teacher is None else {"taps": tuple(self.taps)}

    def teach(self, images: Tensor) -> dict:
        return self.taps_of_teacher(images)

    def terms(self, outputs: dict, teacher: dict | None, target: Tensor) -> dict[str, Tensor]:
        class_loss = self.cross_entropy(outputs["class_logits"], target)
        terms = {"class_loss": class_loss}
        if self.attentions:
            terms["gate"] = torch.stack([attention.gate.detach().sigmoid().mean() for attention in self.attentions]).mean()
        if teacher is None:
            return {**terms, "loss": class_loss} if self.stage2 == "class" else {**terms, **self.label_terms(outputs, target)}
        terms["distillation_loss"] = self.logit_loss(outputs["distillation_logits"], teacher["logits"])
        loss = (1 - self.alpha) * class_loss + self.alpha * terms["distillation_loss"]
        if self.taps:
            terms["hidden_loss"] = hidden_loss(outputs["aligned"], teacher["maps"])
            loss = loss + self.hidden_weight * terms["hidden_loss"]
        return {"loss": loss, **terms}


def hidden_loss(aligned: Sequence[Tensor], maps: Sequence[Tensor]) -> Tensor:
    """Mean over the taps of the mean squared difference of aligned tokens (B, C, h, w) and the teacher's maps there."""
    losses = []
    for own, taught in zip(aligned, maps, strict=True):
        target = standardise(to_grid(taught, tuple(own.shape[2:])))
        losses.append(F.mse_loss(own.to(target.dtype), target))
    return torch.stack(losses).mean()
