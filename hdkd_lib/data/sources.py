"""Where images come from: each source is a list of images with labels, groups and what is known about the set."""

import difflib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.datasets import load_digits

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".pgm", ".ppm"}


@dataclass(frozen=True)
class Source:
    """Images before decoding.

    Attributes:
        images: paths, or one uint8 array (N, H, W) of grey or (N, H, W, 3) of colour images.
        ids: a name for each image, unique, the same on every machine.
        labels: (N,) class indices.
        parts: "train" or "test" for each image as published, or None where there is no published split.
        groups: a name per image shared by images that must not be separated (a lesion, a patient), or None.
        card: what a reader must know: title, licence, citation, known_faults.
    """

    name: str
    classes: list[str]
    images: list[Path] | np.ndarray
    ids: list[str]
    labels: np.ndarray
    parts: list[str] | None = None
    groups: list[str] | None = None
    card: dict = field(default_factory=dict)


def digits(root: Path | None = None) -> Source:
    """1,797 handwritten digits, 8x8, that ship with scikit-learn: real images without a download."""
    data = load_digits()
    return Source(
        name="digits",
        classes=[str(c) for c in data.target_names],
        images=np.round(data.images * (255 / 16)).astype(np.uint8),
        ids=[f"{i:04d}" for i in range(len(data.images))],
        labels=data.target,
        card={
            "title": "Optical Recognition of Handwritten Digits (test part), 8x8 grey",
            "licence": "CC BY 4.0",
            "citation": "E. Alpaydin, C. Kaynak, UCI Machine Learning Repository, 1998, doi:10.24432/C50P49",
            "known_faults": "writers are not identified, so one writer's digits are on both sides of any split",
        },
    )


def folder(root: Path | None) -> Source:
    """Any image folder: ROOT/{train,Training}/CLASS/* and ROOT/{test,Testing,val}/CLASS/*, or ROOT/CLASS/*.

    Where there are three, the images of `val` join those of `train`: validation is carved from training by group anyway.

    Raises:
        FileNotFoundError: ROOT is missing, holds no class folder, or only one of train and test.
        ValueError: a class folder holds no image, or train and test have other classes.
    """
    root = _existing(root)
    found = {d.name.lower(): d for d in sorted(root.iterdir()) if d.is_dir()}
    train, val, test = (
        next((found[name] for name in names if name in found), None)
        for names in (("train", "training"), ("val", "validation", "valid"), ("test", "testing"))
    )
    if test is None:
        val, test = None, val
    if (train is None) != (test is None):
        raise FileNotFoundError(f"{root} has only one of a train and a test folder; add the other or point root at its classes")
    parts = [("", root)] if train is None else [("train", train), ("train", val), ("test", test)]

    files = [(part, directory, _class_folders(directory)) for part, directory in parts if directory]
    classes = sorted(files[0][2])
    for _, directory, by_class in files[1:]:
        if differing := sorted(by_class.keys() ^ set(classes)):
            raise ValueError(
                f"{files[0][1].name} and {directory.name} in {root} have other classes: {', '.join(differing)} is in one of "
                "them only; give both the same class folders"
            )
    rows = [(path, part, label) for part, _, by_class in files for label, name in enumerate(classes) for path in by_class[name]]
    return Source(
        name="folder",
        classes=classes,
        images=[path for path, _, _ in rows],
        ids=[path.relative_to(root).as_posix() for path, _, _ in rows],
        labels=np.array([label for _, _, label in rows]),
        parts=None if train is None else [part for _, part, _ in rows],
        card={
            "title": f"image folder {root.name}",
            "licence": "not known",
            "citation": "not known",
            "known_faults": "not known",
        },
    )


def _class_folders(directory: Path) -> dict[str, list[Path]]:
    """The images of each class folder."""
    by_class = {}
    for class_dir in sorted(d for d in directory.iterdir() if d.is_dir() and not d.name.startswith(".")):
        by_class[class_dir.name] = _images_in(class_dir)
        if not by_class[class_dir.name]:
            raise ValueError(f"no image in {class_dir}; remove the folder or fill it ({', '.join(sorted(IMAGE_SUFFIXES))})")
    if not by_class:
        raise FileNotFoundError(f"no class folder in {directory}; expected one folder of images per class")
    return by_class


def brain_tumor(root: Path | None) -> Source:
    """Brain Tumor Classification (MRI), SARTAJ version: 3,264 slices, 4 classes, Training/ and Testing/ as downloaded."""
    source = folder(_find(root, ("Training", "Testing"), "brain_tumor"))
    return Source(
        **vars(source)
        | {
            "name": "brain_tumor",
            "card": {
                "title": "Brain Tumor Classification (MRI), SARTAJ version",
                "licence": "none stated by its authors",
                "citation": "S. Bhuvaji et al., Kaggle, 2020, doi:10.34740/KAGGLE/DSV/1183165",
                "known_faults": "251 of 394 test images are pixel-identical to a training image; no patient identifiers; "
                "the Testing gliomas look like another source than the Training gliomas",
            },
        }
    )


def ham10000(root: Path | None) -> Source:
    """HAM10000: 10,015 dermatoscopic images, 7 classes, 7,470 lesions; HAM10000_metadata.csv and one or more folders of images.

    Raises:
        ValueError: the table lacks a column, or a row has no image.
    """
    root = _find(root, ("HAM10000_metadata.csv",), "ham10000")
    table = pd.read_csv(root / "HAM10000_metadata.csv", dtype=str)
    if missing := {"image_id", "lesion_id", "dx"} - set(table.columns):
        raise ValueError(f"{root / 'HAM10000_metadata.csv'} has no column {', '.join(sorted(missing))}")
    table = table.drop_duplicates("image_id").sort_values("image_id")
    files = {f.stem: f for f in _images_in(root)}
    if absent := sorted(set(table.image_id) - files.keys()):
        raise ValueError(f"{len(absent)} rows of HAM10000_metadata.csv have no image in {root}, the first is {absent[0]}")
    classes = sorted(table.dx.unique())
    return Source(
        name="ham10000",
        classes=classes,
        images=[files[i] for i in table.image_id],
        ids=table.image_id.tolist(),
        labels=table.dx.map(classes.index).to_numpy(),
        groups=table.lesion_id.tolist(),
        card={
            "title": "HAM10000 (ISIC 2018 Task 3 training images)",
            "licence": "CC BY-NC 4.0",
            "citation": "P. Tschandl, C. Rosendahl, H. Kittler, Scientific Data 5:180161, 2018, doi:10.1038/sdata.2018.161",
            "known_faults": "no published split; 4,501 images share a lesion with another, which a split by image leaks",
        },
    )


SOURCES: dict[str, Callable[[Path | None], Source]] = {
    "digits": digits,
    "folder": folder,
    "brain_tumor": brain_tumor,
    "ham10000": ham10000,
}


def open_source(name: str, root: str | Path | None = None) -> Source:
    """The source of that name; `root` is where its files lie, by default the variable HDKD_DATA.

    Raises:
        ValueError: unknown name (the nearest is suggested).
        FileNotFoundError: its files are not there.
    """
    if name not in SOURCES:
        near = difflib.get_close_matches(name, SOURCES, n=1)
        raise ValueError(
            f"unknown dataset {name!r}; " + (f"did you mean {near[0]!r}?" if near else f"known are {', '.join(SOURCES)}")
        )
    root = root or os.environ.get("HDKD_DATA") or None
    return SOURCES[name](Path(root).expanduser() if root else None)


def _existing(root: Path | None) -> Path:
    if root is None:
        raise FileNotFoundError("no data folder given; pass root= or set the variable HDKD_DATA")
    if not root.is_dir():
        raise FileNotFoundError(f"no data folder at {root}; correct root= or the variable HDKD_DATA")
    return root


def _images_in(directory: Path) -> list[Path]:
    """Sorted; hidden files, which some archives carry beside each image, are left out."""
    return sorted(f for f in directory.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES and not f.name.startswith("."))


def _find(root: Path | None, names: tuple[str, ...], dataset: str) -> Path:
    """`root` itself or the one folder in it (the data set's own name first) that holds all of the given names."""
    root = _existing(root)
    candidates = [
        root,
        *sorted((d for d in root.iterdir() if d.is_dir()), key=lambda d: (not d.name.startswith(dataset), d.name)),
    ]
    for candidate in candidates:
        if all((candidate / name).exists() for name in names):
            return candidate
    raise FileNotFoundError(
        f"no {dataset} in {root}: no folder there holds {' and '.join(names)}; download it or correct root="
    )
