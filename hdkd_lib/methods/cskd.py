"""CSKD: cumulative spatial knowledge distillation, from any CNN to any vision transformer.

Zhao, Song, Liang, "Cumulative Spatial Knowledge Distillation for Vision Transformers", ICCV 2023 (arXiv 2307.08500). What a CNN
says at each place (its classifier on every cell of its last map) teaches the student's patch tokens there; over training the
CNN's global answer takes the place of the local ones. With z_c, z_d, z_p the logits of class, distillation and patch tokens,
local and t the teacher's local responses and its logits, and a in [0, 1] the fusion's weight, which decays by epochs:

    fused = a local + (1 - a) t                                                  cumulative knowledge fusion
    L = (1 - alpha) CE(z_c, y) + alpha CE(z_d, argmax t) + w CE(z_p, argmax fused)         alpha = 1/2, w = 1

Patch tokens share the head of the distillation token: no parameter is added, and weights fit timm's networks. Facts were read
in the official code (Zzzzz1/CSKD at fa0d8b8), which takes distilled DeiTs and RegNets alone. OUR CHOICE: a student without a
distillation token uses its one head for everything; grids of any size meet at the smaller one, per side, by adaptive average
pooling, which is the official 2x2 pooling for 14 -> 7; tokens are pooled before the head, the same for an affine head at a
quarter of its cost; t is the teacher's own answer (the official code's mean of the local ones is the same for its RegNets,
but not where a nonlinearity follows the pooling); soft distillation divides each KL divergence by its number of rows (the
official one mixes two scales); the schedules `local` and `global` are for ablations.
"""

import math
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hdkd_lib.losses import logit_distillation
from hdkd_lib.methods.base import Distillation, answers

SCHEDULES = {
    "linear": lambda progress: 1 - progress,
    "x2": lambda progress: (1 - progress) ** 2,
    "cos": lambda progress: math.cos(math.pi / 2 * progress),
    "local": lambda progress: 1.0,
    "global": lambda progress: 0.0,
}


def decay(progress: float, schedule: str = "linear") -> float:
    """Weight of the local responses at a progress of training in [0, 1): linear, x2 and cos fall from 1; local, global stay.

    Raises:
        ValueError: unknown schedule.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)} (got {schedule!r})")
    return SCHEDULES[schedule](progress)


def fuse(local: Tensor, global_: Tensor, alpha: float) -> Tensor:
    """alpha local + (1 - alpha) global, in logit space: (N, K, h, w) and (N, K) -> (N, K, h, w)."""
    return alpha * local + (1 - alpha) * global_[:, :, None, None]


def common_grid(*grids: tuple[int, int]) -> tuple[int, int]:
    """The smaller of the grids (rows, columns), per side."""
    return min(rows for rows, _ in grids), min(columns for _, columns in grids)


def _pool(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    return maps if tuple(maps.shape[2:]) == grid else F.adaptive_avg_pool2d(maps, grid)


def spatial_loss(patch_logits: Tensor, fused: Tensor, distill_type: str = "hard", tau: float = 1.0) -> Tensor:
    """Distillation at every place: (N, K, h, w) of the student and (N, K, h', w') of the teacher -> scalar, mean over places.

    hard: cross-entropy with the argmax of `fused`; soft: tau^2 KL(fused || patch_logits) at temperature tau.
    """
    grid = common_grid(tuple(patch_logits.shape[2:]), tuple(fused.shape[2:]))
    rows = [_pool(logits, grid).movedim(1, 3).flatten(0, 2) for logits in (patch_logits, fused)]
    return logit_distillation(*rows, distill_type=distill_type, tau=tau, reduction="batchmean")


@torch.no_grad()
def local_responses(teacher: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """What a timm CNN says at each place and as a whole: logits (N, K, h, w) of every cell of its last map, and (N, K).

    Everything after the map (norms, MLPs, the classifier) is applied to each cell as to an image of one cell.

    Args:
        teacher: in eval mode, or its batch norms would count every cell as an image.

    Raises:
        ValueError: the network has no map, such as a vision transformer.
    """
    features = teacher.forward_features(images)
    if features.ndim != 4:
        raise ValueError(
            f"{type(teacher).__name__} has no last map, but features of shape {tuple(features.shape)}; "
            "take a CNN as teacher, such as resnet18 or regnety_016"
        )
    is_last = getattr(teacher, "output_fmt", "NCHW") == "NHWC"  # of the channels
    cells = features if is_last else features.movedim(1, 3)
    N, h, w, C = cells.shape
    cells = cells.reshape(N * h * w, 1, 1, C) if is_last else cells.reshape(N * h * w, C, 1, 1)
    local = teacher.forward_head(cells).unflatten(0, (N, h, w)).movedim(3, 1)
    return local, teacher.forward_head(features)


def patch_logits(student: nn.Module, tokens: Tensor, images: Tensor, grid: tuple[int, int]) -> Tensor:
    """Logits (N, K, h, w) of a student's patch tokens, averaged over the cells of a grid no finer than its own.

    Args:
        tokens: all of the student's last tokens (N, L, D) of the images.

    Raises:
        ValueError: the patch tokens do not fill the student's grid.
    """
    patches = tokens[:, student.num_prefix_tokens :]
    own = student.patch_embed.dynamic_feat_size(tuple(images.shape[-2:]))
    if patches.shape[1] != own[0] * own[1]:
        raise ValueError(f"the student has {patches.shape[1]} patch tokens for a grid of {own[0]}x{own[1]} places")
    maps = patches.unflatten(1, own).movedim(3, 1)
    pooled = _pool(maps, common_grid(own, grid)).movedim(1, 3)
    if hasattr(student, "head_dist"):
        return student.head_dist(pooled).movedim(3, 1)
    return student.head(getattr(student, "fc_norm", nn.Identity())(pooled)).movedim(3, 1)


class CSKD(Distillation):
    """`CSKD(student=..., teacher=...)(images, target)` gives `loss`, `output`, and the class, distillation and spatial `_loss`.

    Args:
        student: any timm vision transformer with patch tokens on a grid, or an HDKD student; best with a distillation token.
        teacher: any timm CNN.
        distill_type: "hard" or "soft" distillation, of logits and places alike.
        alpha: weight of logit distillation against cross-entropy, in [0, 1].
        tau: temperature of soft distillation.
        spatial_weight: weight of the spatial term, at least 0; 0 is DeiT's distillation.
        schedule: how the local responses' weight decays over training (`decay`).
        distill_until: share of training after which the teacher stops (`Distillation`).
        prediction: 3 is the mean of class, distillation and averaged patch logits (official code), 2 leaves out the patches.

    Raises:
        ValueError: an argument is out of range, or the student's tokens do not lie on a grid.
    """

    def __init__(
        self,
        *,
        student: nn.Module,
        teacher: nn.Module,
        distill_type: str = "hard",
        alpha: float = 0.5,
        tau: float = 1.0,
        spatial_weight: float = 1.0,
        schedule: str = "linear",
        prediction: int = 3,
        distill_until: float = 1.0,
        total_steps: int | None = None,
    ):
        super().__init__(student=student, teacher=teacher, distill_until=distill_until, total_steps=total_steps)
        self.set_logit_distillation(distill_type=distill_type, alpha=alpha, tau=tau, reduction="batchmean")
        decay(0.0, schedule)
        if spatial_weight < 0 or prediction not in (2, 3):
            raise ValueError(f"spatial_weight must be at least 0 and prediction 2 or 3 (got {spatial_weight} and {prediction})")
        self.spatial_weight, self.schedule, self.prediction = spatial_weight, schedule, prediction
        if not hasattr(student, "num_prefix_tokens") or not hasattr(student.patch_embed, "dynamic_feat_size"):
            raise ValueError(
                f"CSKD needs a student with patch tokens on a grid, such as deit_tiny_distilled_patch16_224 "
                f"(got {type(student).__name__})"
            )
        if not isinstance(getattr(student, "patch_drop", nn.Identity()), nn.Identity):
            raise ValueError("patch dropout leaves holes in the student's grid; create it with patch_drop_rate=0")
        if hasattr(teacher, "num_prefix_tokens"):
            raise ValueError(f"CSKD needs a CNN as teacher, such as resnet18 (got {type(teacher).__name__}, which has tokens)")
        if hasattr(student, "set_distilled_training"):
            student.set_distilled_training(True)  # both heads' logits in training, their mean in eval mode

    @property
    def changes_over_training(self) -> bool:
        return super().changes_over_training or self.schedule not in ("local", "global")

    @staticmethod
    def student_pass(
        student: nn.Module, auxiliary: nn.ModuleDict, images: Tensor, *, grid: tuple[int, int] | None = None
    ) -> dict:
        """The answers, and with a grid `patch_logits` on it."""
        tokens = student.forward_features(images)
        outputs = answers(student.forward_head(tokens))
        return outputs if grid is None else {**outputs, "patch_logits": patch_logits(student, tokens, images, grid)}

    def asks(self, teacher: dict | None) -> dict:
        return {"grid": None if teacher is None else tuple(teacher["local"].shape[2:])}

    def teach(self, images: Tensor) -> dict:
        """The teacher's `local` responses (B, C, h, w) and its `logits` (B, C)."""
        local, logits = local_responses(self.teacher.network, self.teacher.prepare(images))
        return {"local": local, "logits": logits}

    def terms(self, outputs: dict, teacher: dict | None, target: Tensor) -> dict[str, Tensor]:
        if teacher is None:
            return self.label_terms(outputs, target)
        if tuple(teacher["local"].shape[2:]) == (1, 1):
            warnings.warn(
                "the teacher's last map has one cell, so that CSKD has nothing spatial to teach: take larger images, or a "
                "teacher of smaller stride (hdkd_teacher, or one trained with output_stride=8)",
                stacklevel=2,
            )
        fused = fuse(teacher["local"], teacher["logits"], decay(self.progress, self.schedule))
        terms = {
            "class_loss": self.cross_entropy(outputs["class_logits"], target),
            "distillation_loss": self.logit_loss(outputs["distillation_logits"], teacher["logits"]),
            "spatial_loss": spatial_loss(outputs["patch_logits"], fused, self.distill_type, self.tau),
        }
        loss = (1 - self.alpha) * terms["class_loss"] + self.alpha * terms["distillation_loss"]
        return {"loss": loss + self.spatial_weight * terms["spatial_loss"], **terms}

    def predict(self, images: Tensor) -> Tensor:
        tokens = self.student.forward_features(images)
        logits = self.student.forward_head(tokens)
        if self.prediction == 2:
            return logits
        return (2 * logits + patch_logits(self.student, tokens, images, (1, 1)).flatten(1)) / 3
