"""HDKD: hybrid data-efficient knowledge distillation.

EL-Assiouti, Hamed, Khattab, Ebied, "HDKD: Hybrid Data-Efficient Knowledge Distillation Network for Medical Image
Classification", Eng. Appl. of Artificial Intelligence 138, 2024 (arXiv 2407.07516). With z_c, z_d the student's class and
distillation logits, t the teacher's logits on the same augmented batch, and F_i the outputs of the stages that student and
teacher share:

    L_logit = (1 - alpha) CE(z_c, y) + alpha {tau^2 KL(t || z_d) | CE(z_d, argmax t)}
    L_feat  = sum_i i^alpha_f MSE(F_T_i, F_S_i)          i = 1, 2, ... counts the chosen stages
    L       = L_logit + lambda L_feat

No projection and no normalisation stands between the features: the networks share their stages' shapes. Prediction is the mean
of both heads. Defaults and the division of KL by B * C are those of the official code (omarsherif200/HDKD at f7c7dae), which
runs each network up to four times a step; here each runs once, with the same loss and gradients.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from hdkd_lib.losses import hard_distillation, soft_distillation
from hdkd_lib.methods.base import Distillation


def feature_loss(teacher: Sequence[Tensor], student: Sequence[Tensor], *, exponent: float = 1.0) -> Tensor:
    """sum_i i^exponent MSE(teacher_i, student_i), i = 1, 2, ... in the order given; maps (B, C_i, H_i, W_i)."""
    return sum(i**exponent * F.mse_loss(s, t) for i, (t, s) in enumerate(zip(teacher, student, strict=True), start=1))


class HDKD(Distillation):
    """`HDKD(student=..., teacher=...)(images, labels)` gives `loss`, `output`, `logit_loss`, `feature_loss` (before lambda).

    Args:
        student: a network with a distillation token, such as `hdkd_student_distilled`.
        teacher: a network whose chosen stages have the student's shapes, such as `hdkd_teacher`.
        kind: "soft" or "hard" logit distillation.
        alpha: weight of distillation against cross-entropy, in [0, 1]. At 0 the class head alone predicts.
        tau: temperature of soft distillation.
        feature_weight: lambda, at least 0.
        stages: which shared stages teach, counted from 1; empty: none.
        stage_exponent: alpha_f.
        reduction: of the KL divergence, "classes" (B * C, the official code) or "batchmean" (B).

    Raises:
        ValueError: an argument is out of range, the student has no distillation token, or a stage's widths differ.
    """

    def __init__(
        self,
        *,
        student: nn.Module,
        teacher: nn.Module,
        kind: str = "soft",
        alpha: float = 0.5,
        tau: float = 1.0,
        feature_weight: float = 10.0,
        stages: Sequence[int] = (1, 2, 3),
        stage_exponent: float = 1.0,
        reduction: str = "classes",
    ):
        super().__init__(student=student, teacher=teacher)
        if kind not in ("soft", "hard"):
            raise ValueError(f"kind must be 'soft' or 'hard' (got {kind!r})")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must be in [0, 1] (got {alpha})")
        if tau <= 0 or feature_weight < 0:
            raise ValueError(f"tau must be above 0 and feature_weight at least 0 (got {tau} and {feature_weight})")
        if not hasattr(student, "set_distilled_training"):
            raise ValueError("HDKD needs a student with a distillation token, such as hdkd_student_distilled")
        count = min(len(student.feature_info), len(teacher.feature_info)) if stages else 0
        if list(stages) != sorted(set(stages) & set(range(1, count + 1))):
            raise ValueError(f"stages must be ascending numbers from 1 to {count} (got {list(stages)})")
        for stage in stages:
            shapes = [(f["num_chs"], f["reduction"]) for f in (m.feature_info[stage - 1] for m in (student, teacher))]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"stage {stage} has {shapes[0][0]} channels at stride {shapes[0][1]} in the student and "
                    f"{shapes[1][0]} at stride {shapes[1][1]} in the teacher; HDKD compares them without a projection, "
                    "so take a teacher with the student's stages"
                )
        self.kind, self.alpha, self.tau, self.reduction = kind, alpha, tau, reduction
        self.feature_weight, self.stages, self.stage_exponent = feature_weight, tuple(stages), stage_exponent

    def settings(self) -> dict:
        names = ("kind", "alpha", "tau", "feature_weight", "stage_exponent", "reduction")
        return {name: getattr(self, name) for name in names} | {"stages": list(self.stages)}

    def forward(self, images: Tensor, target: Tensor) -> dict[str, Tensor]:
        indices = [stage - 1 for stage in self.stages]
        tokens, student_maps = self.student.forward_intermediates(images, indices or [0])
        teacher_logits, teacher_maps = self.teacher(images, indices)
        class_logits, distillation_logits = self.student.head(tokens[:, 0]), self.student.head_dist(tokens[:, 1])

        if self.kind == "soft":
            distillation = soft_distillation(distillation_logits, teacher_logits, tau=self.tau, reduction=self.reduction)
        else:
            distillation = hard_distillation(distillation_logits, teacher_logits)
        logit_loss = (1 - self.alpha) * self.cross_entropy(class_logits, target) + self.alpha * distillation
        features = (
            feature_loss(teacher_maps, student_maps, exponent=self.stage_exponent) if indices else logit_loss.new_zeros(())
        )
        return {
            "loss": logit_loss + self.feature_weight * features,
            "output": self._prediction(class_logits, distillation_logits),
            "logit_loss": logit_loss,
            "feature_loss": features,
        }

    def predict(self, images: Tensor) -> Tensor:
        tokens = self.student.forward_features(images)
        return self._prediction(self.student.head(tokens[:, 0]), self.student.head_dist(tokens[:, 1]))

    def _prediction(self, class_logits: Tensor, distillation_logits: Tensor) -> Tensor:
        # At alpha = 0 nothing trains the distillation head: averaging it in, as the official code does, would add noise.
        return (class_logits + distillation_logits) / 2 if self.alpha > 0 else class_logits
