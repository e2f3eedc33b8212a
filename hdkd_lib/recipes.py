"""Training recipes as data, each with its source."""

import difflib
from dataclasses import dataclass, fields, replace

from timm.optim import list_optimizers

from hdkd_lib.data.augment import AUGMENTATIONS
from hdkd_lib.data.imbalance import IMBALANCE
from hdkd_lib.parameters import check_type, one_sentence


@dataclass(frozen=True)
class Recipe:
    """How a network is trained; the learning rate changes once per epoch.

    Attributes:
        schedule: "constant", or "cosine" from `lr` to `min_lr` after `warmup_epochs` epochs that rise from `warmup_lr`.
        layer_decay: factor of the rate from each block (timm's groups of layers) to the one before it, above 0 and at most 1:
            below 1 a pretrained body learns more slowly than the head.
        ema: decay of a moving average of the weights, which is measured beside them at the end, in [0, 1); 0: none. It reaches
            back about 1 / (1 - ema) steps, which should be far fewer than the run has (DeiT's and CSKD's codes: 0.99996).
        weight_decay: of weights with two or more dimensions; biases and one-dimensional weights have none.
        augment: a name in `data.augment.AUGMENTATIONS`.
        imbalance: "none", "class_weights" (in the cross-entropy with the labels), "balanced_sampler" or "smote".
        mixup, cutmix: alpha of their beta distributions, 0 for none; with both, each batch takes one of them.
        label_smoothing: mass spread over all classes in the cross-entropy with the labels.
        protocol: "honest", or "paper": the epoch is chosen on the test part, what is validation joins training, and the rate of
            each epoch is that of the epoch before, all as in HDKD's official code: its result is optimistic.
        aug_repeats: augmented copies of each image per epoch; an epoch keeps its length, so it uses 1/`aug_repeats` of the
            images (repeated augmentation, Hoffer et al. 2020).
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
    imbalance: str = "none"
    mixup: float = 0.0
    cutmix: float = 0.0
    label_smoothing: float = 0.0
    aug_repeats: int = 1
    protocol: str = "honest"
    layer_decay: float = 1.0
    ema: float = 0.0

    def __post_init__(self):
        for field in fields(self):
            check_type(field.name, getattr(self, field.name), field.type)
        if self.epochs < 1 or self.batch_size < 2 or self.lr <= 0:
            raise ValueError(f"a recipe needs epochs >= 1, batch_size >= 2 and lr > 0 (got {self})")
        if self.optimizer not in list_optimizers():
            raise ValueError(f"optimizer must be one of timm's: {', '.join(list_optimizers())} (got {self.optimizer!r})")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay must be above 0 and at most 1 (got {self.layer_decay})")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be at least 0 and below 1 (got {self.ema})")
        if self.schedule not in ("constant", "cosine"):
            raise ValueError(f"schedule must be 'constant' or 'cosine' (got {self.schedule!r})")
        if self.protocol not in ("honest", "paper"):
            raise ValueError(f"protocol must be 'honest' or 'paper' (got {self.protocol!r})")
        if self.augment not in AUGMENTATIONS:
            raise ValueError(f"augment must be one of {', '.join(AUGMENTATIONS)} (got {self.augment!r})")
        if self.imbalance not in IMBALANCE:
            raise ValueError(f"imbalance must be one of {', '.join(IMBALANCE)} (got {self.imbalance!r})")
        if self.mixup < 0 or self.cutmix < 0 or not 0 <= self.label_smoothing < 1 or self.aug_repeats < 1:
            raise ValueError(
                f"mixup and cutmix must be at least 0, label_smoothing in [0, 1) and aug_repeats at least 1 (got {self})"
            )


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
# DeiT's and CSKD's for tiny models on ImageNet [code], the rate for a batch of 1024; without their EMA (.99996), which they
# never evaluate.
DEIT = Recipe(
    epochs=300,
    batch_size=1024,
    optimizer="adamw",
    lr=1e-3,
    weight_decay=0.05,
    schedule="cosine",
    min_lr=1e-5,
    warmup_epochs=5,
    warmup_lr=1e-6,
    augment="deit",
    mixup=0.8,
    cutmix=1.0,
    label_smoothing=0.1,
    aug_repeats=3,
)
# OUR CHOICE, for the nano networks and few epochs: a larger rate, annealed to near zero, one recipe for teacher and students.
NANO = Recipe(epochs=8, batch_size=32, optimizer="adamw", lr=2e-3, weight_decay=0.05, schedule="cosine", min_lr=1e-5)

RECIPES = {"hdkd_teacher": HDKD_TEACHER, "hdkd_student": HDKD_STUDENT, "deit": DEIT, "nano": NANO}


@one_sentence
def get(name: str, **changes) -> Recipe:
    """The recipe of that name, with some of its fields changed.

    Raises:
        ValueError: unknown name or field (the nearest is suggested), or a value of another type or out of range.
    """
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        raise ValueError(
            f"unknown recipe {name!r}; " + (f"did you mean {near[0]!r}?" if near else f"known are {', '.join(RECIPES)}")
        )
    for key in changes:
        if key not in Recipe.__dataclass_fields__:
            near = difflib.get_close_matches(key, Recipe.__dataclass_fields__, n=1)
            raise ValueError(f"a recipe has no field {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    return replace(RECIPES[name], **changes)
