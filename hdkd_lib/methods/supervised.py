"""Training alone: cross-entropy, no teacher. The baseline of every method, and how teachers are trained."""

from torch import Tensor, nn

from hdkd_lib.methods.base import Method


class Supervised(Method):
    """`Supervised(student=model)(images, labels)` gives `loss` and `output` (logits (B, C)); labels are class indices (B,).

    Args:
        probe: whether only the classifier learns (linear probing): all else is frozen and in eval mode.
    """

    def __init__(self, *, student: nn.Module, probe: bool = False):
        super().__init__(student=student)
        self.probe = probe
        if probe:
            student.requires_grad_(False)
            student.get_classifier().requires_grad_(True)

    def train(self, mode: bool = True) -> "Supervised":
        super().train(mode)
        if self.probe:
            self.student.eval()
        return self

    def forward(self, images: Tensor, target: Tensor) -> dict[str, Tensor]:
        output = self.student(images)
        return {"loss": self.cross_entropy(output, target), "output": output}
