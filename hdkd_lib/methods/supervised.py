"""Training alone: cross-entropy, no teacher. The baseline of every method, and how teachers are trained."""

from torch import Tensor, nn

from hdkd_lib.methods.base import Method


class Supervised(Method):
    """`Supervised(student=model)(images, labels)` gives `loss` and `output` (logits (B, C)); labels are class indices (B,).

    Args:
        probe: whether only the classifier learns (linear probing): all else is frozen and in eval mode.
    """

    def __init__(self, *, student: nn.Module, probe: bool = False, total_steps: int | None = None):
        super().__init__(student=student, total_steps=total_steps)
        self.probe = self.trainable_module.in_eval_mode = probe
        if probe:
            student.requires_grad_(False)
            heads = student.get_classifier()
            for head in heads if isinstance(heads, tuple) else (heads,):
                head.requires_grad_(True)

    def terms(self, outputs: dict, teacher: None, target: Tensor) -> dict[str, Tensor]:
        return {"loss": self.cross_entropy(outputs["output"], target)}
