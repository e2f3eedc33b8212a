"""DeiT's distillation through a token, and plain distillation of logits for students without one.

Touvron et al., "Training data-efficient image transformers & distillation through attention", ICML 2021 (arXiv 2012.12877).
With z_c, z_d the logits of the class and distillation tokens and t the teacher's logits on the same images:

    hard:  L = (1 - alpha) CE(z_c, y) + alpha CE(z_d, argmax t)                      eq. 3, alpha = 1/2
    soft:  L = (1 - alpha) CE(z_c, y) + alpha tau^2 KL(t || z_d), divided by B * C   eq. 2 and the official code

Prediction is the mean of both heads. A student without a distillation token has z_d = z_c, which is the distillation of Hinton
et al. 2015 (arXiv 1503.02531), for any timm network.
"""

from torch import Tensor, nn

from hdkd_lib.methods.base import Distillation


class DeiT(Distillation):
    """`DeiT(student=..., teacher=...)(images, labels)` gives `loss`, `output`, `class_loss`, `distillation_loss`.

    Args:
        student: any timm network; with `set_distilled_training`, such as deit_tiny_distilled_patch16_224, its distillation
            token learns from the teacher.
        distill_type: "hard" or "soft" distillation.
        alpha: weight of distillation against cross-entropy, in [0, 1].
        tau: temperature of soft distillation.
        reduction: of the KL divergence, "classes" (B * C, the official code) or "batchmean" (B).
        standardise_logits: whether both networks' logits are standardised first (`losses.standardise_logits`); for soft
            distillation, which Sun et al. weigh 9 and more times as much then.
        distill_until: share of training after which the teacher stops (`Distillation`).

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        *,
        student: nn.Module,
        teacher: nn.Module,
        distill_type: str = "hard",
        alpha: float = 0.5,
        tau: float = 1.0,
        reduction: str = "classes",
        standardise_logits: bool = False,
        distill_until: float = 1.0,
        total_steps: int | None = None,
    ):
        super().__init__(student=student, teacher=teacher, distill_until=distill_until, total_steps=total_steps)
        settings = {"distill_type": distill_type, "alpha": alpha, "tau": tau, "reduction": reduction}
        self.set_logit_distillation(**settings, standardise_logits=standardise_logits)
        if hasattr(student, "set_distilled_training"):
            student.set_distilled_training(True)  # both heads' logits in training, their mean in eval mode

    def terms(self, outputs: dict, teacher: dict | None, target: Tensor) -> dict[str, Tensor]:
        if teacher is None:
            return self.label_terms(outputs, target)
        class_loss = self.cross_entropy(outputs["class_logits"], target)
        distillation = self.logit_loss(outputs["distillation_logits"], teacher["logits"])
        return {
            "loss": (1 - self.alpha) * class_loss + self.alpha * distillation,
            "class_loss": class_loss,
            "distillation_loss": distillation,
        }
