"""What the methods share: the contract of a task, and distillation with a teacher that may stop."""

import inspect
from collections.abc import Mapping

import timm.task
import torch.nn.functional as F
from torch import Tensor, nn

from hdkd_lib import models
from hdkd_lib.losses import logit_distillation, standardise_logits
from hdkd_lib.methods.teacher import Teacher, check_head


class Method(timm.task.TrainingTask):
    """`task(images, target)` gives a dict with `loss`, `output` (logits) and each term by name; images (B, C, H, W)
    are in the student's normalisation.

    `trainable_module` is the student, which is optimised and saved (timm's meaning); `auxiliary` holds what a method trains
    along with it and throws away at the end.
    Subclasses are constructed by keyword only, and keep each argument but the networks, a number, word, list or dict, as an
    attribute of its name: a run's configuration holds them (`settings`).
    """

    def __init__(self, *, student: nn.Module):
        super().__init__(verbose=False)
        self.trainable_module = student
        self.auxiliary = nn.ModuleDict()
        self.progress = 0.0
        self.is_fresh = True  # until `fit` trains the student
        self.class_weights: Tensor | None = None  # (C,), of the cross-entropy with labels; `fit` sets both by its recipe
        self.label_smoothing = 0.0

    @property
    def student(self) -> nn.Module:
        return self.trainable_module

    def set_progress(self, progress: float) -> None:
        """How far training has come, in [0, 1); called once before each epoch."""
        self.progress = progress

    def cross_entropy(self, logits: Tensor, target: Tensor) -> Tensor:
        """With labels (B,), or with probabilities (B, C) as mixup gives them, which are smoothed already."""
        smoothing = self.label_smoothing if target.ndim == 1 else 0.0
        return F.cross_entropy(logits, target, self.class_weights, label_smoothing=smoothing)

    def follow_paper(self) -> None:
        """What `Recipe.protocol` "paper" changes in the networks; called once, before training."""

    @classmethod
    def options(cls) -> list[str]:
        """The names of what can be set: the constructor's arguments but the networks."""
        return [name for name in inspect.signature(cls).parameters if name not in ("student", "teacher")]

    def settings(self) -> dict:
        """The options of this task by name, as JSON has them."""

        def plain(value):
            return {str(k): v for k, v in value.items()} if isinstance(value, Mapping) else value

        values = {name: plain(getattr(self, name)) for name in self.options()}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def describe(self) -> dict:
        """Everything that makes this task what it is, as plain values: part of a run's configuration.

        A method of another package has its address as `name` ("package.module:Class"), as plans name it.
        """
        own, module = type(self).__name__, type(self).__module__
        name = own if module.startswith("hdkd_lib.") or module == "__main__" else f"{module}:{own}"
        return {"name": name, **self.settings(), "student": models.describe(self.student)}

    def predict(self, images: Tensor) -> Tensor:
        """Logits (B, C) of the method's own prediction; call in eval mode."""
        return self.student(images)


class Distillation(Method):
    """A method with a teacher, whose classes must be the student's.

    Args:
        distill_until: share of training, in [0, 1], after which the teacher stops: from the first epoch that begins there or
            later, both heads learn from the labels (`label_terms`) and the teacher does not run; 1: it teaches to the end.
            DearKD's second stage [paper], offered to every method (OUR CHOICE).

    Raises:
        ValueError: an argument is out of range, the networks differ in classes, or the teacher's head is random.
    """

    def __init__(self, *, student: nn.Module, teacher: nn.Module, distill_until: float = 1.0):
        super().__init__(student=student)
        if not 0 <= distill_until <= 1:
            raise ValueError(f"distill_until must be in [0, 1] (got {distill_until})")
        self.distill_until = distill_until
        check_head(teacher, student)
        self.teacher = Teacher(teacher, student)

    @property
    def in_stage2(self) -> bool:
        """Whether the teacher has stopped."""
        return self.progress > self.distill_until - 1e-9 and self.distill_until < 1

    def set_progress(self, progress: float) -> None:
        super().set_progress(progress)
        # In stage II it does not run: the device's memory is free for others.
        self.teacher.to("cpu" if self.in_stage2 else next(self.student.parameters()).device)

    def label_terms(self, class_logits: Tensor, distillation_logits: Tensor, target: Tensor) -> dict[str, Tensor]:
        """`loss` and `class_loss` of stage II: (1 - alpha) CE(z_c, y) + alpha CE(z_d, y)."""
        class_loss = self.cross_entropy(class_logits, target)
        both = (1 - self.alpha) * class_loss + self.alpha * self.cross_entropy(distillation_logits, target)
        return {"loss": both, "class_loss": class_loss}

    def set_logit_distillation(
        self, *, distill_type: str, alpha: float, tau: float, reduction: str, standardise_logits: bool = False
    ) -> None:
        """Keeps what `losses.logit_distillation` needs, and alpha, its weight against cross-entropy.

        Raises:
            ValueError: one of them is out of range.
        """
        if distill_type not in ("soft", "hard"):
            raise ValueError(f"distill_type must be 'soft' or 'hard' (got {distill_type!r})")
        if not 0 <= alpha <= 1 or tau <= 0:
            raise ValueError(f"alpha must be in [0, 1] and tau above 0 (got {alpha} and {tau})")
        if reduction not in ("classes", "batchmean"):
            raise ValueError(f"reduction must be 'classes' or 'batchmean' (got {reduction!r})")
        self.distill_type, self.alpha, self.tau, self.reduction = distill_type, alpha, tau, reduction
        self.standardise_logits = standardise_logits

    def logit_loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Distillation of logits (B, C) by what was set."""
        if self.standardise_logits:
            student, teacher = standardise_logits(student), standardise_logits(teacher)
        return logit_distillation(student, teacher, distill_type=self.distill_type, tau=self.tau, reduction=self.reduction)

    def set_taps(self, taps: Mapping[int, int]) -> dict[int, tuple[int, int]]:
        """Keeps which of the student's blocks (from 0) learns from the teacher's map of which stride, in order of blocks, and
        the numbers of these maps as `teacher_maps`. Gives the widths of tokens and map by block.

        Raises:
            ValueError: the student is no vision transformer or has no such block, the teacher is no CNN or has no such stride.
        """
        student, teacher, name = self.student, self.teacher.network, type(self).__name__
        if not hasattr(student, "forward_intermediates") or not hasattr(student, "num_prefix_tokens"):
            raise ValueError(f"{name} needs a vision transformer as student (got {type(student).__name__})")
        if hasattr(teacher, "num_prefix_tokens"):
            raise ValueError(f"{name} needs a CNN as teacher, such as resnet18 (got {type(teacher).__name__}: it has tokens)")
        self.taps = {int(block): int(stride) for block, stride in sorted(taps.items(), key=lambda tap: int(tap[0]))}
        strides = [info["reduction"] for info in teacher.feature_info]
        for block, stride in self.taps.items():
            if block not in range(len(student.feature_info)):
                raise ValueError(f"taps name block {block}; the student has blocks 0 to {len(student.feature_info) - 1}")
            if stride not in strides:
                raise ValueError(
                    f"taps ask for the teacher's map of stride {stride}; {type(teacher).__name__} has strides "
                    f"{', '.join(map(str, strides))}"
                )
        self.teacher_maps = [strides.index(stride) for stride in self.taps.values()]
        places = zip(self.taps, self.teacher_maps, strict=True)
        return {block: (student.feature_info[block]["num_chs"], teacher.feature_info[i]["num_chs"]) for block, i in places}

    def teacher_outputs(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The teacher's logits (B, C) and its map for every tap, of images in the student's normalisation."""
        indices = sorted(set(self.teacher_maps))
        logits, found = self.teacher(images, indices)
        return logits, [found[indices.index(i)] for i in self.teacher_maps]

    def describe(self) -> dict:
        return {**super().describe(), "teacher": models.describe(self.teacher.network)}
