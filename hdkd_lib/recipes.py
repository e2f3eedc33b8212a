"""Training recipes as data, each with its source."""

import difflib
from dataclasses import dataclass, replace

from hdkd_lib.data.augment import AUGMENTATIONS


@dataclass(frozen=True)
class Recipe:
    """How a network is trained; the learning rate changes once per epoch.

    Attributes:
        schedule: "constant", or "cosine" from `lr` to `min_lr` after `warmup_epochs` epochs that rise from `warmup_lr`.
        weight_decay: of weights with two or more dimensions; biases and one-dimensional weights have none.
        augment: a name in `data.augment.AUGMENTATIONS`.
    """

    epochs: int
    batch_size: int
    optimizer: str
    lr: float
    weight_decay: float = 0.0
    schedule: str = "constant"
    min_lr: float = 0.0
    warmup_epochs: int = 0
    warmup_lr: float = 0.0
    augment: str = "hdkd"

    def __post_init__(self):
        if self.epochs < 1 or self.batch_size < 2 or self.lr <= 0:
            raise ValueError(f"a recipe needs epochs >= 1, batch_size >= 2 and lr > 0 (got {self})")
        if self.schedule not in ("constant", "cosine"):
            raise ValueError(f"schedule must be 'constant' or 'cosine' (got {self.schedule!r})")
        if self.augment not in AUGMENTATIONS:
            raise ValueError(f"augment must be one of {', '.join(AUGMENTATIONS)} (got {self.augment!r})")


# HDKD's official code (omarsherif200/HDKD at f7c7dae): no AMP, EMA, mixup, label smoothing or clipping; from scratch.
HDKD_TEACHER = Recipe(epochs=200, batch_size=16, optimizer="adam", lr=1e-3)
HDKD_STUDENT = Recipe(
    epochs=200,
    batch_size=16,
    optimizer="adamw",
    lr=5e-5,
    weight_decay=0.05,
    schedule="cosine",
    min_lr=2e-5,
    warmup_epochs=5,
    warmup_lr=2e-5,
)
# OUR CHOICE, for the nano networks and few epochs: a larger rate, annealed to near zero, one recipe for teacher and students.
NANO = Recipe(epochs=8, batch_size=32, optimizer="adamw", lr=2e-3, weight_decay=0.05, schedule="cosine", min_lr=1e-5)

RECIPES = {"hdkd_teacher": HDKD_TEACHER, "hdkd_student": HDKD_STUDENT, "nano": NANO}


def get(name: str, **changes) -> Recipe:
    """The recipe of that name; changes that are 0 or "" keep its value (a notebook's parameters cannot be None).

    Raises:
        ValueError: unknown name (the nearest is suggested), or a value out of range.
    """
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        raise ValueError(
            f"unknown recipe {name!r}; " + (f"did you mean {near[0]!r}?" if near else f"known are {', '.join(RECIPES)}")
        )
    return replace(RECIPES[name], **{key: value for key, value in changes.items() if value})
