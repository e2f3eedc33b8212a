"""HDKD: hybrid data-efficient knowledge distillation.

EL-Assiouti, Hamed, Khattab, Ebied, "HDKD: Hybrid Data-Efficient Knowledge Distillation Network for Medical Image
Classification", Eng. Appl. of Artificial Intelligence 138, 2024 (arXiv 2407.07516). With z_c, z_d the student's class and
distillation logits, t the teacher's logits on the same augmented batch, and F_i the outputs of the stages that student and
teacher share:

    L_logit = (1 - alpha) CE(z_c, y) + alpha {tau^2 KL(t || z_d) | CE(z_d, argmax t)}
    L_feat  = sum_i i MSE(F_T_i, F_S_i)                  i = 1, 2, ... counts the chosen stages
    L       = L_logit + lambda L_feat

No projection and no normalisation stands between the features: the networks share their stages' shapes. Prediction is the mean
of both heads. Defaults and the division of KL by B * C are those of the official code (omarsherif200/HDKD at f7c7dae), which
runs each network up to four times a step; here each runs once, with the same loss and gradients.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from hdkd_lib.methods.base import Distillation
from hdkd_lib.models.hdkd import HDKDStudent


def feature_loss(teacher: Sequence[Tensor], student: Sequence[Tensor], numbers: Sequence[int] | None = None) -> Tensor:
    """sum_i i MSE(teacher_i, student_i); maps (B, C_i, H_i, W_i); i = `numbers`, by default 1, 2, ... as given."""
    numbers = range(1, len(teacher) + 1) if numbers is None else numbers
    return sum(i * F.mse_loss(s, t) for i, t, s in zip(numbers, teacher, student, strict=True))


class HDKD(Distillation):
    """`HDKD(student=..., teacher=...)(images, labels)` gives `loss`, `output`, `logit_loss`, `feature_loss` (before lambda).

    Args:
        student: `hdkd_student_distilled`, or `hdkd_student`, whose class token then learns from labels and teacher alike
            (OUR CHOICE: the paper's student has a distillation token).
        teacher: a network whose chosen stages have the student's shapes, such as `hdkd_teacher`.
        distill_type: "soft" or "hard" logit distillation.
        alpha: weight of distillation against cross-entropy, in [0, 1]; 0: features alone teach.
        tau: temperature of soft distillation.
        feature_weight: lambda, at least 0.
        stages: which shared stages teach, counted from 1; empty: logits alone teach.
        stage_weighting: "index" counts the chosen stages (the official code), "number" is the stage's own number.
        reduction: of the KL divergence, "classes" (B * C, the official code) or "batchmean" (B).
        prediction: weight of the distillation head in the prediction, in [0, 1]: 0 is the class head alone, .5 the mean (the
            official code). At alpha = 0 nothing trains that head and it is left out.
        distill_until: share of training after which the teacher stops (`Distillation`).

    Raises:
        ValueError: an argument is out of range, the student is not HDKD's, or a stage's shapes differ.
    """

    def __init__(
        self,
        *,
        student: nn.Module,
        teacher: nn.Module,
        distill_type: str = "soft",
        alpha: float = 0.5,
        tau: float = 1.0,
        feature_weight: float = 10.0,
        stages: Sequence[int] = (1, 2, 3),
        stage_weighting: str = "index",
        reduction: str = "classes",
        prediction: float = 0.5,
        distill_until: float = 1.0,
        total_steps: int | None = None,
    ):
        super().__init__(student=student, teacher=teacher, distill_until=distill_until, total_steps=total_steps)
        self.set_logit_distillation(distill_type=distill_type, alpha=alpha, tau=tau, reduction=reduction)
        if stage_weighting not in ("index", "number"):
            raise ValueError(f"stage_weighting must be 'index' or 'number' (got {stage_weighting!r})")
        if not 0 <= prediction <= 1 or feature_weight < 0:
            raise ValueError(
                f"prediction must be in [0, 1] and feature_weight at least 0 (got {prediction} and {feature_weight})"
            )
        if not isinstance(student, HDKDStudent):
            raise ValueError(f"HDKD needs a student such as hdkd_student_distilled (got {type(student).__name__})")
        count = len(student.stages)
        if list(stages) != sorted(set(stages) & set(range(1, count + 1))):
            raise ValueError(f"stages must be ascending numbers from 1 to {count} (got {list(stages)})")
        self.feature_weight, self.stages, self.stage_weighting = feature_weight, tuple(stages), stage_weighting
        self.prediction = prediction
        for stage in self.stages:
            shapes = [_shape(network, stage) for network in (student, teacher)]
            if shapes[0] != shapes[1]:
                own, theirs = (f"{channels} channels at stride {stride}" for channels, stride in shapes)
                raise ValueError(
                    f"stage {stage} has {own} in the student and {theirs} in the teacher; take a teacher with the student's "
                    "stages, such as hdkd_teacher"
                )

    def follow_paper(self) -> None:
        """Batch norm's momenta that leave its statistics as the official code's repeated forward passes do.

        To take the maps of stage i, that code runs stages 1 to i once more: a stage that runs k times a step has 1 - .9^k.
        """
        for number, stage in enumerate(self.student.stages, start=1):
            runs = 1 + sum(chosen >= number for chosen in self.stages)
            for module in stage.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.momentum = 1 - 0.9**runs

    @staticmethod
    def student_pass(
        student: nn.Module, auxiliary: nn.ModuleDict, images: Tensor, *, stages: Sequence[int], weight: float
    ) -> dict:
        """The answers, and `maps` of the chosen stages; `weight` is that of the distillation head in `output`."""
        if stages:
            tokens, maps = student.forward_intermediates(images, [stage - 1 for stage in stages])
        else:
            tokens, maps = student.forward_features(images), []
        return {**_answers(student, tokens, weight), "maps": maps}

    def asks(self, teacher: dict | None) -> dict:
        return {"stages": () if teacher is None else self.stages, "weight": self._weight}

    def teach(self, images: Tensor) -> dict:
        """`logits` (B, C) and `maps` of the chosen stages, from one pass."""
        logits, maps = self.teacher(images, [stage - 1 for stage in self.stages])
        return {"logits": logits, "maps": maps}

    def terms(self, outputs: dict, teacher: dict | None, target: Tensor) -> dict[str, Tensor]:
        if teacher is None:
            return self.label_terms(outputs, target)
        distillation = self.logit_loss(outputs["distillation_logits"], teacher["logits"])
        logit_loss = (1 - self.alpha) * self.cross_entropy(outputs["class_logits"], target) + self.alpha * distillation
        features = logit_loss.new_zeros(())
        if self.stages:
            numbers = self.stages if self.stage_weighting == "number" else None
            features = feature_loss(teacher["maps"], outputs["maps"], numbers)
        return {
            "loss": logit_loss + self.feature_weight * features,
            "logit_loss": logit_loss,
            "feature_loss": features,
        }

    @property
    def _weight(self) -> float:
        # At alpha = 0 nothing trains the distillation head: averaging it in, as the official code does, would add noise.
        return self.prediction if self.alpha > 0 else 0.0

    def predict(self, images: Tensor) -> Tensor:
        return _answers(self.student, self.student.forward_features(images), self._weight)["output"]


def _answers(student: nn.Module, tokens: Tensor, weight: float) -> dict[str, Tensor]:
    """Class and distillation logits (B, C), the same where the student has one token, and their weighted mean."""
    class_logits, distillation_logits = student.both_heads(tokens)
    output = class_logits + weight * (distillation_logits - class_logits) if weight else class_logits
    return {"class_logits": class_logits, "distillation_logits": distillation_logits, "output": output}


def _shape(network: nn.Module, stage: int) -> tuple[int, int]:
    """Channels and stride of a stage, counted from 1; (0, 0) where there is none."""
    stages = network.feature_info
    return (stages[stage - 1]["num_chs"], stages[stage - 1]["reduction"]) if stage <= len(stages) else (0, 0)
