"""Images, splits and batches. `load` is all that a notebook needs."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from hdkd_lib.data.batches import Files, Part, Rows
from hdkd_lib.data.cache import Signatures, decode, remembered
from hdkd_lib.data.groups import with_groups
from hdkd_lib.data.sources import Source, open_source
from hdkd_lib.data.splits import RULE, group_images, split
from hdkd_lib.parameters import one_sentence

if TYPE_CHECKING:  # `load` imports it when needed: it is a program too, which must not be imported before it runs
    from hdkd_lib.data.leakage import Audit

CACHE_LIMIT = 64 * 2**30  # bytes: sets that are larger when decoded are read from their files


@dataclass(frozen=True)
class Data:
    """A data set split three ways.

    Attributes:
        train, val, test: each a `Part` (images, labels, ids, groups).
        classes: class names in label order.
        card: counts, licence, citation, leakage found, faults known.
        config: what determines the split and its content; part of a run's configuration.
        source, signatures, audit: what was split; the last two None where images are read from files.
    """

    train: Part
    val: Part
    test: Part
    classes: list[str]
    card: dict
    config: dict
    source: Source
    signatures: Signatures | None = None
    audit: "Audit | None" = None

    def chosen_on_test(self) -> "Data":
        """As papers do that have no validation part: it joins training, and the test part chooses the epoch."""
        return replace(self, train=_join(self.train, self.val), val=self.test)

    def trained_on(self, other: "Data") -> "Data":
        """Training and validation images of another set, of the same classes by name, and this one's test part.

        The other's test part joins its training images. Ids of these images begin with "made/".

        Raises:
            ValueError: the classes or sizes differ.
        """
        if set(other.classes) != set(self.classes) or other.config["image_size"] != self.config["image_size"]:
            raise ValueError(
                f"the sets have other classes or sizes ({', '.join(other.classes)} at {other.config['image_size']} px; "
                f"{', '.join(self.classes)} at {self.config['image_size']} px)"
            )
        own = torch.tensor([self.classes.index(name) for name in other.classes])
        train, val = (
            replace(part, labels=own[part.labels], ids=[f"made/{name}" for name in part.ids])
            for part in (_join(other.train, other.test), other.val)
        )
        return replace(self, train=train, val=val, config=self.config | {"training": other.config})

    def with_parts(self, split: pd.DataFrame) -> "Data":
        """The same set with the images (`id`) of a split.csv in its parts (`part`); the test part validates if none is named.

        Raises:
            ValueError: the set does not have these images, or the split names none for training or for the test.
        """
        if lacking := {"train", "test"} - set(split.part):
            raise ValueError(f"this split names no images of the part {min(lacking)}; give one of a run on real images")
        number = {name: i for i, name in enumerate(self.source.ids)}
        if missing := set(split.id) - number.keys():
            raise ValueError(
                f"{len(missing)} of the {len(split)} images of this split are not in {self.source.name} ({min(missing)}, ...); "
                "give the folder with the images that the run was trained on"
            )
        groups = _groups(self.source, self.audit)
        parts = {
            name: _part(self.source, self.train.images, groups, np.array([number[i] for i in of.id]))
            for name, of in split.groupby("part")
        }
        parts = {"val": parts["test"]} | parts
        return replace(self, **parts, card=_card(self.source, self.audit, groups, parts, self.config["protocol"]))

    def split(self, protocol: str, fold: int = 0) -> dict[str, np.ndarray]:
        """Image numbers of train, val and test under another protocol or in another fold, of the whole set."""
        return _split(self.source, self.signatures, self.audit, protocol=protocol, fold=fold, seed=self.config["split_seed"])


def _groups(source: Source, audit: "Audit | None") -> np.ndarray:
    """(N,) numbers, equal for images that stay together."""
    return group_images(np.arange(len(source.ids)) if audit is None else audit.duplicate_groups, source.groups)


def _part(source: Source, images: Rows | Files, groups: np.ndarray, chosen: np.ndarray) -> Part:
    """The images of these numbers, from the store (or read from files) as `images` are."""
    if isinstance(images, Files):
        own = Files([source.images[i] for i in chosen], images.shape[-1])
    else:
        own = Rows(images.store, chosen)
    labels = torch.from_numpy(source.labels[chosen].astype(np.int64))
    return Part(own, labels, [source.ids[i] for i in chosen], groups[chosen])


def _join(a: Part, b: Part) -> Part:
    if isinstance(a.images, Rows):
        images = Rows(a.images.store, torch.cat([a.images.rows, b.images.rows]).numpy())
    elif isinstance(a.images, Files):
        images = Files(a.images.paths + b.images.paths, a.images.shape[-1])
    else:
        images = torch.cat([a.images, b.images])
    return Part(images, torch.cat([a.labels, b.labels]), a.ids + b.ids, np.concatenate([a.groups, b.groups]))


@one_sentence
def load(
    name: str,
    root: str | Path | None = None,
    *,
    image_size: int = 224,
    protocol: str = "grouped",
    fold: int = 0,
    fraction: float = 1.0,
    draws: int = 0,
    draw: int = 0,
    val_per_class: int = 50,
    split_seed: int = 0,
    groups: str = "",
    on_corrupt: str = "raise",
    from_files: bool | None = None,
    download: bool = False,
    join_chains: bool = False,
) -> Data:
    """Loads, decodes (once; cached), audits and splits a data set.

    Args:
        name: a key of `sources.SOURCES` (digits, folder, brain_tumor, ham10000, imagenette, ...) or "medmnist:FLAG".
        root: the folder or archive with its files; default: the variable HDKD_DATA. Not needed for digits.
        image_size: height and width of the images; they are resized without keeping their aspect, as in HDKD's code.
        protocol: "grouped" (no lesion and no duplicate appears in more than one split), "official" or "random"; see
            `splits.split`.
        fold: which of the five folds is the test part.
        fraction: of the training part, by class, nested.
        draws, draw, val_per_class: train on the `draw`-th of so many disjoint training sets, less the validation part of so
            many images of each class that all of them share; see `splits.split`. 0: on the whole training part.
        groups: which images are of one patient, lesion or slide, in sets that do not say so: a regular expression on an image's
            path whose parenthesised part names the group. By default what a table groups.csv beside the classes says, if there
            is one; see `groups`.
        on_corrupt: "raise" (all images that cannot be decoded are named) or "skip" (they are counted in the card).
        from_files: read the image files anew in every epoch, with crops that keep the aspect, instead of decoding them once;
            they are not audited, so the protocol is "official". Default: where they would fill more than 64 GiB.
        download: fetch what torchvision or MedMNIST offer into `root` where it is missing.
        join_chains: keep a chain of near duplicates in one group even if it holds more than a tenth of a class; by default such
            a chain is only reported.

    Raises:
        ValueError, FileNotFoundError, OSError: one sentence that names the cause and the remedy.
    """
    source = with_groups(open_source(name, root, download=download), groups)
    if from_files is None:
        from_files = len(source.ids) * 3 * image_size**2 > CACHE_LIMIT
    if from_files:
        if protocol != "official" or isinstance(source.images, np.ndarray):
            raise ValueError(
                f"{name} at {image_size} px would be read from files, without an audit: pass protocol='official'"
                if protocol != "official"
                else f"{name} has no image files; pass from_files=False"
            )
        signatures = audit = None
    else:
        source, images, signatures = decode(source, image_size, on_corrupt=on_corrupt)
        from hdkd_lib.data import leakage

        audit = leakage.audit(signatures, source.ids, source.labels, source.classes, source.parts, join_chains=join_chains)
    drawn = {"draws": draws, "draw": draw, "val_per_class": val_per_class} if draws else {"draw": draw}
    index = _split(source, signatures, audit, protocol=protocol, fold=fold, fraction=fraction, seed=split_seed, **drawn)
    groups_of = _groups(source, audit)
    # One store for all parts: processes share it as one.
    every = Files([], image_size) if from_files else Rows(torch.from_numpy(images), np.arange(0))
    parts = {name: _part(source, every, groups_of, chosen) for name, chosen in index.items()}
    named = source.groups or [""] * len(source.ids)
    hashes = _identity(source, signatures)
    ungrouped = [f"{h}{label}" for h, label in zip(hashes, source.labels, strict=True)]
    identity = [f"{of}{g}" for of, g in zip(ungrouped, named, strict=True)]
    sides = [f"{side}:{identity[i]}" for side, chosen in index.items() for i in chosen]
    return Data(
        **parts,
        classes=source.classes,
        card=_card(source, audit, groups_of, parts, protocol),
        config={
            "dataset": name,
            "image_size": image_size,
            "protocol": protocol,
            "fold": fold,
            "fraction": fraction,
            **(drawn if draws else {}),
            "groups": groups if source.groups else None,  # not known
            **({"images": _digest(ungrouped)} if source.groups else {}),
            **({"join_chains": True} if join_chains else {}),
            "split_seed": split_seed,
            "from_files": from_files,
            "classes": source.classes,
            "content": _digest(identity),
            "split": _digest([f"rule {RULE}", *sides]),
        },
        source=source,
        signatures=signatures,
        audit=audit,
    )


def load_as(config: Mapping, root: str | Path | None = None, split: pd.DataFrame | None = None) -> Data:
    """`load` with what a run's `config["data"]` says, and with the run's `split` exactly its parts.

    The latter matters for runs of older versions, which grouped near-duplicates by another rule and so made other parts.

    Raises:
        ValueError, FileNotFoundError, OSError: as `load` and `Data.with_parts`.
    """
    keys = (
        "image_size",
        "protocol",
        "fold",
        "fraction",
        "draws",
        "draw",
        "val_per_class",
        "split_seed",
        "groups",
        "join_chains",
        "from_files",
    )
    found = load(config["dataset"], root, **{key: config[key] for key in keys if config.get(key) is not None})
    if split is None or found.config["split"] == config.get("split"):
        return found
    return replace(found.with_parts(split), config=found.config | {"split": config.get("split")})  # older runs name none


def _digest(lines: list[str]) -> str:
    """A hash of the lines, in whatever order."""
    return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()[:16]


def _identity(source: Source, signatures: Signatures | None) -> np.ndarray:
    """A sort key that does not depend on file order: the hash of the pixels, or of the id where images are not decoded."""
    return signatures.hashes if signatures else np.array([hashlib.sha1(i.encode()).hexdigest()[:16] for i in source.ids])


def _split(source: Source, signatures: Signatures | None, audit: "Audit | None", **options) -> dict[str, np.ndarray]:
    """`splits.split`, remembered beside the decoded images by all that decides it."""
    duplicate_groups = None if audit is None else audit.duplicate_groups
    decisive = [
        RULE,
        options,
        source.classes,
        source.groups,
        source.parts,
        source.labels.tolist(),
        duplicate_groups if duplicate_groups is None else duplicate_groups.tolist(),
    ]
    key = hashlib.sha256(json.dumps(decisive, sort_keys=True, default=str).encode()).hexdigest()[:16]
    return remembered(
        signatures and signatures.folder,
        f"split-{key}",
        lambda: split(
            source.labels, _identity(source, signatures), duplicate_groups=duplicate_groups, groups=source.groups,
            parts=source.parts, classes=source.classes, **options,
        ),
    )  # fmt: skip


def _card(source: Source, audit: "Audit | None", groups: np.ndarray, parts: dict[str, Part], protocol: str) -> dict:
    """What a reader must know of the set, and what was counted in it."""
    return {
        **source.card,
        "classes": {name: int((source.labels == c).sum()) for c, name in enumerate(source.classes)},
        **({"images": len(source.ids), "audit": "none: images are read from files"} if audit is None else audit.summary),
        "groups": len(set(groups)),
        "protocol": protocol,
        "test_images_in_train": int(np.isin(parts["test"].groups, parts["train"].groups).sum()),
    }
