"""Training alone: cross-entropy, no teacher. The baseline of every method, and how teachers are trained."""

from torch import Tensor

from hdkd_lib.methods.base import Method


class Supervised(Method):
    """`Supervised(student=model)(images, labels)` gives `loss` and `output` (logits (B, C)); labels are class indices (B,)."""

    def forward(self, images: Tensor, target: Tensor) -> dict[str, Tensor]:
        output = self.student(images)
        return {"loss": self.cross_entropy(output, target), "output": output}
