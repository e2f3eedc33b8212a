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

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hdkd_lib.methods.base import Distillation
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
    ):
        super().__init__(student=student, teacher=teacher, distill_until=distill_until)
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

    def forward(self, images: Tensor, target: Tensor) -> dict[str, Tensor]:
        if self.in_stage2:
            tokens = self.student.forward_features(images)
        else:
            tokens, hidden = self.student.forward_intermediates(images, list(self.taps) or [0])
        logits = self.student.forward_head(tokens)
        class_logits, distillation_logits = logits if isinstance(logits, tuple) else (logits, logits)
        class_loss = self.cross_entropy(class_logits, target)
        terms = {"output": (class_logits + distillation_logits) / 2, "class_loss": class_loss}
        if self.attentions:
            terms["gate"] = torch.stack([attention.gate.detach().sigmoid().mean() for attention in self.attentions]).mean()
        if self.in_stage2:
            if self.stage2 == "class":
                return {"loss": class_loss, **terms}
            return {**terms, **self.label_terms(class_logits, distillation_logits, target)}
        teacher_logits, maps = self.teacher_outputs(images)
        terms["distillation_loss"] = self.logit_loss(distillation_logits, teacher_logits)
        loss = (1 - self.alpha) * class_loss + self.alpha * terms["distillation_loss"]
        if self.taps:
            terms["hidden_loss"] = self.hidden_loss(hidden, maps)
            loss = loss + self.hidden_weight * terms["hidden_loss"]
        return {"loss": loss, **terms}

    def hidden_loss(self, hidden: list[Tensor], maps: list[Tensor]) -> Tensor:
        """Mean over the taps of the mean squared difference of aligned tokens (B, D, h, w) and the teacher's maps."""
        losses = []
        for block, tokens, taught in zip(self.taps, hidden, maps, strict=True):
            target = standardise(to_grid(taught, tuple(tokens.shape[2:])))
            losses.append(F.mse_loss(self.auxiliary[f"aligner{block}"](tokens).to(target.dtype), target))
        return torch.stack(losses).mean()
