"""The teacher: a network that cannot be changed, and what is checked before anything is learned from it."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hdkd_lib.data import Data
from hdkd_lib.recipes import Recipe


class Teacher(nn.Module):
    """A frozen network, in eval mode whatever `train()` is called on, that sees images in its own normalisation."""

    def __init__(self, network: nn.Module, student: nn.Module):
        super().__init__()
        self.network = network.requires_grad_(False).eval()
        self.is_same_normalisation = True
        student_cfg, own_cfg = (getattr(m, "pretrained_cfg", {}) for m in (student, network))
        if {"mean", "std"} <= student_cfg.keys() & own_cfg.keys():
            mean_s, std_s, mean_t, std_t = (
                torch.tensor(cfg[key]).view(1, -1, 1, 1) for cfg in (student_cfg, own_cfg) for key in ("mean", "std")
            )
            self.is_same_normalisation = torch.equal(mean_s, mean_t) and torch.equal(std_s, std_t)
            self.register_buffer("scale", std_s / std_t, persistent=False)
            self.register_buffer("shift", (mean_s - mean_t) / std_t, persistent=False)

    def train(self, mode: bool = True) -> "Teacher":
        return super().train(False)

    def move(self, device: torch.device) -> None:
        """To a device, where it is not there yet: one copy, and one wait, for each type of number that it holds."""
        elsewhere = [tensor for tensor in (*self.parameters(), *self.buffers()) if tensor.device != device]
        moved = {}
        for dtype in {tensor.dtype for tensor in elsewhere}:
            tensors = [tensor for tensor in elsewhere if tensor.dtype == dtype]
            packed = torch.cat([tensor.detach().flatten() for tensor in tensors]).to(device)
            pieces = packed.split([tensor.numel() for tensor in tensors])
            moved |= {id(old): new.view(old.shape) for old, new in zip(tensors, pieces, strict=True)}
        if moved:
            self._apply(lambda tensor: moved.get(id(tensor), tensor))

    def prepare(self, images: Tensor) -> Tensor:
        """Images from the student's normalisation to the teacher's, which is set to eval mode again if need be."""
        if self.network.training:  # train() was called on the network itself
            self.network.eval()
        return images if self.is_same_normalisation else images * self.scale + self.shift

    @torch.no_grad()
    def forward(self, images: Tensor, indices: Sequence[int] = ()) -> tuple[Tensor, list[Tensor]]:
        """Logits (B, C) and the maps of the given indices, from one pass; images in the student's normalisation."""
        images = self.prepare(images)
        if not indices:
            return self.network(images), []
        features, maps = self.network.forward_intermediates(images, list(indices))
        return self.network.forward_head(features), maps


def check_head(teacher: nn.Module, student: nn.Module) -> None:
    """Whether the teacher's classifier is trained, and on as many classes as the student has.

    Raises:
        ValueError: it is not.
    """
    if teacher.num_classes != student.num_classes:
        raise ValueError(
            f"the teacher has {teacher.num_classes} classes and the student {student.num_classes}; "
            "train the teacher on the student's classes"
        )
    own_classes = getattr(teacher, "pretrained_cfg", {}).get("num_classes")
    is_adapted = getattr(teacher, "is_trained", False) or own_classes == teacher.num_classes
    if getattr(teacher, "creation", {}).get("pretrained") and not is_adapted:
        raise ValueError(
            f"this pretrained teacher knows {own_classes} classes; its head for {teacher.num_classes} is random: train it "
            'first (02_teacher with network_options={"pretrained": True}, and probe=True to train only its classifier)'
        )


def check_provenance(teacher: nn.Module, data: Data, recipe: Recipe) -> None:
    """A teacher that has seen the test images would carry them into its student.

    Raises:
        ValueError: it has, or its epoch was chosen on them, or it was trained on other classes. A network that is not of a run
            (`runs.Run.student`) cannot say what it was trained on.
    """
    origin = getattr(teacher, "trained_on", None)
    if origin is None:
        return
    if origin["classes"] != data.classes:
        raise ValueError(
            f"the teacher was trained on the classes {', '.join(origin['classes'])} and the data have "
            f"{', '.join(data.classes)}; train the teacher on the student's data"
        )
    if origin["protocol_of_training"] == "paper" and recipe.protocol != "paper":
        raise ValueError(
            "the teacher's epoch was chosen on its test part (protocol 'paper'): it can teach under the same protocol only"
        )
    images = [of.get("images", of["content"]) for of in (origin, data.config)]  # whatever is said of their groups
    seen = origin["ids"].intersection(data.test.ids) if images[0] == images[1] else ()
    if seen:
        raise ValueError(
            f"the teacher was trained on {len(seen)} of the {len(data.test)} test images ({origin['protocol']} split, fold "
            f"{origin['fold']}; here {data.config['protocol']}, {data.config['fold']}); train it on the student's split"
        )


def check_skill(balanced_accuracy: float, classes: int, images: int) -> None:
    """Whether a teacher is better than chance: by two standard errors of guessing on so many validation images.

    Raises:
        ValueError: it is not.
    """
    chance = 1 / classes
    margin = 2 * math.sqrt(chance * (1 - chance) / images)
    if balanced_accuracy <= chance + margin:
        raise ValueError(
            f"the teacher is no better than chance (balanced accuracy {balanced_accuracy:.3f}, chance {chance:.3f} + "
            f"{margin:.3f}): train it first, or pass force=True"
        )
