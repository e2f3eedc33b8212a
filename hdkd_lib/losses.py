"""Loss functions used by more than one method: pure functions of logits."""

import torch.nn.functional as F
from torch import Tensor


def soft_distillation(student: Tensor, teacher: Tensor, *, tau: float = 1.0, reduction: str = "classes") -> Tensor:
    """tau^2 KL(softmax(teacher / tau) || softmax(student / tau)), Hinton et al. 2015 (arXiv 1503.02531), eq. 3.

    Args:
        student, teacher: logits (B, C).
        reduction: "classes" divides the sum by B * C, as DeiT's and HDKD's codes do; "batchmean" divides it by B.
    """
    if reduction not in ("classes", "batchmean"):
        raise ValueError(f"reduction must be 'classes' or 'batchmean' (got {reduction!r})")
    total = F.kl_div(F.log_softmax(student / tau, 1), F.log_softmax(teacher / tau, 1), reduction="sum", log_target=True)
    return total * tau**2 / (student.numel() if reduction == "classes" else len(student))


def hard_distillation(student: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy with the teacher's decisions, Touvron et al. 2021 (DeiT, arXiv 2012.12877), eq. 3; logits (B, C)."""
    return F.cross_entropy(student, teacher.argmax(1))


def logit_distillation(student: Tensor, teacher: Tensor, *, kind: str, tau: float = 1.0, reduction: str = "classes") -> Tensor:
    """`kind` "soft" or "hard"; the latter knows neither temperature nor reduction."""
    if kind == "soft":
        return soft_distillation(student, teacher, tau=tau, reduction=reduction)
    return hard_distillation(student, teacher)
