"""Locality guidance: tokens of a transformer imitate the maps of a CNN.

Li, Wang, Qin, Chen, "Locality Guidance for Improving Vision Transformers on Tiny Datasets", ECCV 2022 (arXiv 2207.10026). With
z the student's logits, S_l the tokens after block l on their grid, T_l the teacher's map for it and P_l a 1x1 convolution that
is used in training only:

    L = CE(z, y) + beta sum_l MSE(P_l(S_l), T_l)          both interpolated bilinearly to the larger of their grids

Facts were read in the official code (lkhl/tiny-transformers, as kept in sunshangquan/logit-standardization-KD at 2ba3954): beta
= 2.5 for DeiT-Ti, constant over training; blocks 1, 7 and 12 learn from the three stages of a ResNet-56 at 32 px, of strides 1,
2 and 4 there. OUR CHOICE: the teacher sees the student's images, not smaller ones; taps name strides; a student with a
distillation token answers by the mean of its heads.
"""

from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from hdkd_lib.methods.base import Distillation


def guidance_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of maps (B, C, h, w) and (B, C, h', w') on the larger grid, per side."""
    grid = tuple(max(sides) for sides in zip(student.shape[2:], teacher.shape[2:], strict=True))
    maps = [F.interpolate(of, size=grid, mode="bilinear", align_corners=False) for of in (student, teacher)]
    return F.mse_loss(*maps)


class LocalityGuidance(Distillation):
    """`LocalityGuidance(student=..., teacher=...)(images, target)` gives `loss`, `output`, `class_loss`, and `guidance_loss`
    (before beta).

    Args:
        student: any timm vision transformer.
        teacher: any timm CNN that has the strides of the taps.
        guidance_weight: beta, at least 0.
        taps: the student's block (from 0) -> the stride of the teacher's map that teaches it; the default is for 12 blocks.
        distill_until: share of training after which the teacher stops (`Distillation`).

    Raises:
        ValueError: an argument is out of range, or the networks have no such block or stride.
    """

    def __init__(
        self,
        *,
        student: nn.Module,
        teacher: nn.Module,
        guidance_weight: float = 2.5,
        taps: Mapping[int, int] = {0: 1, 6: 2, 11: 4},
        distill_until: float = 1.0,
        total_steps: int | None = None,
    ):
        super().__init__(student=student, teacher=teacher, distill_until=distill_until, total_steps=total_steps)
        if guidance_weight < 0:
            raise ValueError(f"guidance_weight must be at least 0 (got {guidance_weight})")
        self.guidance_weight = guidance_weight
        for block, widths in self.set_taps(taps).items():
            self.auxiliary[f"projection{block}"] = nn.Conv2d(*widths, 1)

    @staticmethod
    def student_pass(student: nn.Module, auxiliary: nn.ModuleDict, images: Tensor, *, taps: Sequence[int] = ()) -> dict:
        """Logits (B, C) as `output`, and `projected` maps of the blocks `taps`, one by one."""
        if not taps:
            return {"output": student(images), "projected": []}
        tokens, hidden = student.forward_intermediates(images, list(taps))
        projected = [auxiliary[f"projection{block}"](maps) for block, maps in zip(taps, hidden, strict=True)]
        return {"output": student.forward_head(tokens), "projected": projected}

    def asks(self, teacher: dict | None) -> dict:
        return {} if teacher is None else {"taps": tuple(self.taps)}

    def teach(self, images: Tensor) -> dict:
        return self.taps_of_teacher(images)

    def terms(self, outputs: dict, teacher: dict | None, target: Tensor) -> dict[str, Tensor]:
        class_loss = self.cross_entropy(outputs["output"], target)
        if teacher is None:
            return {"loss": class_loss, "class_loss": class_loss}
        guidance = class_loss.new_zeros(())
        for own, taught in zip(outputs["projected"], teacher["maps"], strict=True):
            guidance = guidance + guidance_loss(own, taught)
        return {"loss": class_loss + self.guidance_weight * guidance, "class_loss": class_loss, "guidance_loss": guidance}
