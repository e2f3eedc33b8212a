"""Images, splits and batches. `load` is all that a notebook needs."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from hdkd_lib.data.batches import Part, decode
from hdkd_lib.data.sources import open_source
from hdkd_lib.data.splits import group_images, split


@dataclass(frozen=True)
class Data:
    """A data set split three ways, in memory.

    Attributes:
        train, val, test: each a `Part` (images, labels, ids, groups).
        classes: class names in label order.
        card: counts, licence, citation, leakage found, faults known.
        config: what determines the split and its content; part of a run's configuration.
    """

    train: Part
    val: Part
    test: Part
    classes: list[str]
    card: dict
    config: dict


def load(
    name: str,
    root: str | Path | None = None,
    *,
    image_size: int = 224,
    protocol: str = "grouped",
    fold: int = 0,
    fraction: float = 1.0,
    split_seed: int = 0,
) -> Data:
    """Loads, decodes (once; cached) and splits a data set.

    Args:
        name: "digits", "folder", "brain_tumor" or "ham10000".
        root: where its files lie; default: the variable HDKD_DATA. Not needed for digits.
        image_size: height and width of the images; they are resized without keeping their aspect, as in HDKD's code.
        protocol: "grouped" (no lesion and no picture is on two sides), "official" or "random"; see `splits.split`.
        fold: which of the five folds is the test part.
        fraction: of the training part, by class, nested.

    Raises:
        ValueError, FileNotFoundError: one sentence that names the cause and the remedy.
    """
    source = open_source(name, root)
    images, hashes = decode(source, image_size)
    index = split(
        source.labels, hashes, groups=source.groups, parts=source.parts, protocol=protocol, fold=fold, fraction=fraction,
        seed=split_seed, classes=source.classes,
    )  # fmt: skip
    groups = group_images(hashes, source.groups)

    def part(chosen: np.ndarray) -> Part:
        labels = torch.from_numpy(source.labels[chosen].astype(np.int64))
        return Part(torch.from_numpy(images[chosen]), labels, [source.ids[i] for i in chosen], groups[chosen])

    parts = {name: part(chosen) for name, chosen in index.items()}
    named = source.groups or [""] * len(hashes)
    content = sorted(f"{h}{label}{group}" for h, label, group in zip(hashes, source.labels, named, strict=True))
    return Data(
        **parts,
        classes=source.classes,
        card=_card(source, hashes, groups, parts, protocol),
        config={
            "dataset": name,
            "image_size": image_size,
            "protocol": protocol,
            "fold": fold,
            "fraction": fraction,
            "split_seed": split_seed,
            "classes": source.classes,
            "content": hashlib.sha256("".join(content).encode()).hexdigest()[:16],
        },
    )


def _card(source, hashes: list[str], groups: np.ndarray, parts: dict[str, Part], protocol: str) -> dict:
    card = {
        **source.card,
        "images": len(hashes),
        "classes": {name: int((source.labels == c).sum()) for c, name in enumerate(source.classes)},
        "duplicate_images": len(hashes) - len(set(hashes)),
        "groups": len(set(groups)),
        "protocol": protocol,
    }
    pairs = np.unique(np.stack([groups, source.labels]), axis=1)
    card["groups_with_two_labels"] = int((np.unique(pairs[0], return_counts=True)[1] > 1).sum())
    if source.parts is not None:
        is_test = np.asarray(source.parts) == "test"
        card["official_test_images"] = int(is_test.sum())
        card["official_test_images_in_train"] = int(np.isin(groups[is_test], groups[~is_test]).sum())
    card["test_images_in_train"] = int(np.isin(parts["test"].groups, parts["train"].groups).sum())
    return card
