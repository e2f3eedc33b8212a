"""Pure loss functions: of logits, for more than one method; of images and features, for `inversion`."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


def logit_distillation(
    student: Tensor, teacher: Tensor, *, distill_type: str, tau: float = 1.0, reduction: str = "classes"
) -> Tensor:
    """`distill_type` "soft" or "hard"; the latter knows neither temperature nor reduction."""
    if distill_type == "soft":
        return soft_distillation(student, teacher, tau=tau, reduction=reduction)
    return hard_distillation(student, teacher)


def standardise_logits(logits: Tensor, eps: float = 1e-6) -> Tensor:
    """(B, C) with mean 0 and standard deviation 1 (of C - 1) for every image: Sun et al., CVPR 2024 (arXiv 2403.01427), eq. 13.

    The student then need not match the size of the teacher's logits. eps as in the official code.
    """
    return (logits - logits.mean(1, keepdim=True)) / (logits.std(1, keepdim=True) + eps)


# Inversion


def batchnorm_loss(inputs: Sequence[Tensor], norms: Sequence[nn.BatchNorm2d], first: float = 1.0) -> Tensor:
    """R of `inversion`, in float32: inputs (B, C_l, h_l, w_l) of the batch norms; `first` is c_1, all other c_l are 1."""
    terms = []
    for x, norm in zip(inputs, norms, strict=True):
        rows = x.float().movedim(1, -1).flatten(0, -2)  # a third of the time of torch.var_mean on a CPU
        mean = rows.mean(0)
        var = (rows - mean).square().mean(0)
        terms.append((mean - norm.running_mean.float()).norm() + (var - norm.running_var.float()).norm())
    terms[0] = terms[0] * first
    return torch.stack(terms).sum()


def total_variation(images: Tensor) -> Tensor:
    """Sum of the norms of the differences of neighbours along rows, columns and both diagonals; (B, C, h, w) -> scalar."""
    x = images
    steps = (
        x[..., 1:] - x[..., :-1],
        x[..., 1:, :] - x[..., :-1, :],
        x[..., 1:, 1:] - x[..., :-1, :-1],
        x[..., 1:, :-1] - x[..., :-1, 1:],
    )
    return torch.stack([step.norm() for step in steps]).sum()


def competition_loss(teacher: Tensor, student: Tensor) -> Tensor:
    """1 - JS(teacher, student), the Jensen-Shannon divergence of the classes by logits (B, K) in nats, in float32."""
    p, q = (logits.float().softmax(1) for logits in (teacher, student))
    m = ((p + q) / 2).clamp_min(1e-12).log()
    return 1 - (F.kl_div(m, p, reduction="batchmean") + F.kl_div(m, q, reduction="batchmean")) / 2


def intra_divergence_loss(
    features: Tensor, labels: Tensor, margin: float = 0.2, weight: float = 1.0, *, check: bool = True
) -> Tensor:
    """L_BPID of DearKD (arXiv 2204.12997): classes stay apart by a margin, and within it images of one class spread.

    OUR CHOICE, form, margin and weight: of the paper's loss only its name and purpose are known.

    With z the features of unit length, D_ij = |z_i - z_j|, hp_i the farthest of i's class and hn_i the nearest of the others:

        L_BP = mean_i max(0, hp_i - hn_i + margin)
        L_ID = -mean over the i with hp_i + margin < hn_i of the mean D_ij over i's class;        L_BPID = L_BP + weight L_ID

    so that the spread ends where it reaches the nearest other class.

    Args:
        features: (B, D) of the teacher, before its classifier.
        labels: (B,), as many of each class, at least two of at least two classes.
        check: whether that is checked, for which the device is waited for.

    Raises:
        ValueError: the classes are not balanced.
    """
    if check:
        check_balance(labels)
    z = F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=1)
    with torch.autocast(z.device.type, enabled=False):
        squared = 2 - 2 * z @ z.T
    distance = squared.clamp_min(1e-8).sqrt()  # the root has no gradient at 0
    same = labels[:, None] == labels
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    positives = same & ~itself
    farthest = distance.masked_fill(~positives, -math.inf).amax(1)
    nearest = distance.masked_fill(same, math.inf).amin(1)
    boundary = (farthest - nearest + margin).relu().mean()
    is_inside = (farthest.detach() + margin < nearest.detach()).to(distance.dtype)
    spread = (distance * positives).sum(1) / positives.sum(1)
    return boundary - weight * (spread * is_inside).sum() / is_inside.sum().clamp_min(1)


def check_balance(labels: Tensor) -> None:
    counts = labels.unique(return_counts=True)[1]
    if len(counts) < 2 or counts.min() < 2 or counts.min() != counts.max():
        raise ValueError(
            "the intra-divergence loss needs a batch with equally many images, at least two, of each of at least two classes "
            f"(got {counts.tolist()})"
        )
