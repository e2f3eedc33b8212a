import os
import pickle
import shutil
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from sklearn.datasets import load_digits

from hdkd_lib.data import sources
from hdkd_lib.data.sources import SOURCES, Source, open_source

RNG = np.random.default_rng(0)
CARD = {"title", "licence", "citation", "obtain", "known_faults"}


def write_rows(path: Path, *rows: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(rows))


def zipped(folder: Path) -> None:
    """The folder becomes an archive in its place."""
    shutil.make_archive(str(folder), "zip", folder.parent, folder.name)
    shutil.rmtree(folder)


@pytest.fixture
def ham_folder(image_folder) -> Path:
    """HAM10000 in small, as Kaggle gives it: two image folders, rows in no order."""
    root = image_folder(
        "ham/HAM10000_images_part_1/ISIC_0000001.jpg",
        "ham/HAM10000_images_part_1/ISIC_0000003.jpg",
        "ham/HAM10000_images_part_2/ISIC_0000002.jpg",
    )
    rows = ["lesion_id,image_id,dx,age", "HAM_1,ISIC_0000003,nv,40", "HAM_2,ISIC_0000001,mel,", "HAM_1,ISIC_0000002,nv,40"]
    write_rows(root / "ham" / "HAM10000_metadata.csv", *rows)
    return root / "ham"


def as_harvard(root: Path) -> None:
    rows = ['"lesion_id"\t"image_id"\t"dx"\t"age"', '"HAM_1"\t"ISIC_0000003"\t"nv"\t40.0']
    rows += ['"HAM_2"\t"ISIC_0000001"\t"mel"\t', '"HAM_1"\t"ISIC_0000002"\t"nv"\t40.0']
    write_rows(root / "HAM10000_metadata.tab", *rows)
    (root / "HAM10000_metadata.csv").unlink()
    zipped(root / "HAM10000_images_part_1")
    zipped(root / "HAM10000_images_part_2")


def as_isic(root: Path, images: str = "ISIC2018_Task3_Training_Input") -> None:
    truth = ["image,MEL,NV,BCC", "ISIC_0000002,0.0,1.0,0.0", "ISIC_0000001,1.0,0.0,0.0", "ISIC_0000003,0.0,1.0,0.0"]
    write_rows(root / "ISIC2018_Task3_Training_GroundTruth/ISIC2018_Task3_Training_GroundTruth.csv", *truth)
    lesions = ["image,lesion_id,diagnosis_confirm_type", "ISIC_0000001,HAM_2,x", "ISIC_0000002,HAM_1,x", "ISIC_0000003,HAM_1,x"]
    write_rows(root / "ISIC2018_Task3_Training_LesionGroupings.csv", *lesions)
    (root / "HAM10000_metadata.csv").unlink()
    (root / images).mkdir()
    for file in sorted(root.rglob("*.jpg")):
        file.rename(root / images / file.name)


def as_isic_zipped(root: Path) -> None:
    as_isic(root)
    zipped(root / "ISIC2018_Task3_Training_Input")
    zipped(root / "ISIC2018_Task3_Training_GroundTruth")


def as_one_archive(root: Path) -> None:
    shutil.make_archive(str(root.parent / "archive"), "zip", root)
    shutil.rmtree(root)


def with_folders_twice(root: Path) -> None:
    for part in ("1", "2"):
        shutil.copytree(root / f"HAM10000_images_part_{part}", root / f"ham10000_images_part_{part}_again")


def with_rows_twice(root: Path) -> None:
    table = root / "HAM10000_metadata.csv"
    table.write_text(table.read_text() + "\nHAM_2,ISIC_0000001,mel,50")


def pickled(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content))


def cifar_pixels(count: int) -> np.ndarray:
    return RNG.integers(0, 256, (count, 3072), dtype=np.uint8)


@pytest.fixture
def cifar10_folder(tmp_path, monkeypatch) -> Path:
    """CIFAR-10 of 12 images, without its checksums."""
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: os.path.isfile(path))
    folder = tmp_path / "cifar10" / "cifar-10-batches-py"
    for i, name in enumerate(["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"]):
        pickled(folder / name, {"data": cifar_pixels(2), "labels": [i, 9 - i]})
    pickled(folder / "batches.meta", {"label_names": [f"class {i}" for i in range(10)]})
    return tmp_path


@pytest.fixture
def cifar100_folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5=None: os.path.isfile(path))
    folder = tmp_path / "cifar100" / "cifar-100-python"
    pickled(folder / "train", {"data": cifar_pixels(3), "fine_labels": [0, 99, 5], "coarse_labels": [1, 1, 1]})
    pickled(folder / "test", {"data": cifar_pixels(2), "fine_labels": [7, 0], "coarse_labels": [1, 1]})
    pickled(folder / "meta", {"fine_label_names": [f"class {i}" for i in range(100)], "coarse_label_names": ["x", "y"]})
    return tmp_path


@pytest.fixture
def flowers102_folder(image_folder, monkeypatch) -> Path:
    monkeypatch.setattr("torchvision.datasets.flowers102.check_integrity", lambda path, md5=None: os.path.isfile(path))
    root = image_folder(*(f"flowers102/flowers-102/jpg/image_{i:05d}.jpg" for i in range(1, 9)))
    folder = root / "flowers102" / "flowers-102"
    savemat(folder / "imagelabels.mat", {"labels": [[1, 2, 102, 1, 2, 3, 4, 5]]})
    savemat(folder / "setid.mat", {"trnid": [[2, 8]], "valid": [[1, 3]], "tstid": [[4, 5, 6, 7]]})
    return root


IMAGENET_TRAIN = {"n01440764": 9, "n02102040": 90}


@pytest.fixture
def imagenet_folder(image_folder) -> Path:
    names = [f"train/{wnid}/{wnid}_{i:02d}.JPEG" for wnid, count in IMAGENET_TRAIN.items() for i in range(count)]
    names += ["val/n02102040/ILSVRC2012_val_1.JPEG", "val/n01440764/ILSVRC2012_val_2.JPEG"]
    root = image_folder(*(f"imagenet/{name}" for name in names))
    classes = {"n01440764": ("tench", "Tinca tinca"), "n02102040": ("English springer",)}
    torch.save((classes, ["n02102040", "n01440764"]), root / "imagenet" / "meta.bin")
    return root


@pytest.fixture
def imagenette_folder(image_folder) -> Path:
    names = ["train/n03888257/1.JPEG", "train/n01440764/2.JPEG", "val/n03888257/3.JPEG", "val/n01440764/4.JPEG"]
    return image_folder(*(f"imagenette2-320/{name}" for name in names))


@pytest.fixture
def medmnist_folder(tmp_path) -> Path:
    """Three sets of MedMNIST in small, one of them in 64 px too."""
    pytest.importorskip("medmnist")
    for name, shape in {"bloodmnist": (28, 28, 3), "bloodmnist_64": (64, 64, 3), "dermamnist": (28, 28, 3)}.items():
        arrays = {}
        for part, count in {"train": 4, "val": 2, "test": 3}.items():
            arrays[f"{part}_images"] = RNG.integers(0, 256, (count, *shape), dtype=np.uint8)
            arrays[f"{part}_labels"] = np.arange(count, dtype=np.uint8)[:, None] + 1
        np.savez(tmp_path / f"{name}.npz", **arrays)
    return tmp_path


@pytest.fixture
def brain_folder(image_folder) -> Path:
    """Both brain tumour sets in one data root, and before them another set of such parts."""
    return image_folder(
        "another/Training/x/1.png", "another/Testing/x/1.png",
        "s/Training/glioma_tumor/1.png", "s/Training/no_tumor/1.png", "s/Testing/glioma_tumor/2.png",
        "s/Testing/no_tumor/1.png",
        "n/Training/glioma/1.png", "n/Training/notumor/1.png", "n/Testing/glioma/1.png", "n/Testing/notumor/1.png",
    )  # fmt: skip


# --- the sources ---

FOLDERS = {name: f"{name}_folder" for name in ("cifar10", "cifar100", "flowers102", "imagenet", "imagenette")} | {
    "digits": "tmp_path", "brain_tumor": "brain_folder", "brain_tumor_nickparvar": "brain_folder", "ham10000": "ham_folder",
    "medmnist:bloodmnist": "medmnist_folder", "medmnist:bloodmnist:64": "medmnist_folder", "folder": "brain_folder",
}  # fmt: skip


def test_every_source_is_tried():
    assert FOLDERS.keys() >= SOURCES.keys()


@pytest.mark.parametrize("name", FOLDERS)
def test_every_source_gives_as_many_ids_labels_and_parts_as_images_and_a_card(request, name):
    root = request.getfixturevalue(FOLDERS[name])
    source = open_source(name, root / "s" if name == "folder" else root)
    count = len(source.images)
    assert count == len(source.ids) == len(source.labels) == len(set(source.ids))
    assert source.labels.dtype == np.int64
    assert 0 <= source.labels.min() <= source.labels.max() < len(source.classes) == len(set(source.classes))
    assert source.parts is None or (len(source.parts) == count and set(source.parts) <= {"train", "val", "test"})
    assert source.groups is None or len(source.groups) == count
    assert isinstance(source.images, np.ndarray) or all(path.is_file() for path in source.images)
    assert source.name == name.replace(":", "-")
    assert source.card.keys() >= CARD
    assert all(isinstance(source.card[key], str) and source.card[key] for key in CARD)


@pytest.mark.parametrize("name", sorted(FOLDERS.keys() - {"digits", "folder"}))
def test_every_source_reads_the_variable_and_says_what_it_misses(request, name, monkeypatch, tmp_path_factory):
    root = request.getfixturevalue(FOLDERS[name])
    monkeypatch.setenv("HDKD_DATA", str(root))
    assert open_source(name).ids == open_source(name, root).ids
    with pytest.raises(FileNotFoundError, match=rf"no {name.split(':')[0].replace('medmnist', 'bloodmnist')}.* in .*empty"):
        open_source(name, tmp_path_factory.mktemp("empty"))
    with pytest.raises(FileNotFoundError, match=r"no data folder at .*nowhere; correct root= or the variable HDKD_DATA"):
        open_source(name, root / "nowhere")
    monkeypatch.delenv("HDKD_DATA")
    with pytest.raises(FileNotFoundError, match="no data folder given; pass root= or set the variable HDKD_DATA"):
        open_source(name)


def test_two_images_of_one_id_and_two_classes_of_one_name_are_refused():
    with pytest.raises(ValueError, match="two classes of x are called crane; give them names of their own"):
        Source("x", ["crane", "crane"], np.zeros((1, 2, 2), np.uint8), ["a"], np.zeros(1, int))
    with pytest.raises(ValueError, match="2 ids of x occur twice, the first is b"):
        Source("x", ["a"], np.zeros((5, 8, 8), np.uint8), ["a", "c", "c", "b", "b"], np.zeros(5, int))


def test_a_source_of_some_images_keeps_what_belongs_to_them():
    source = Source(
        "x", ["k", "l"], [Path("a"), Path("b"), Path("c")], list("abc"), np.array([0, 1, 1]), groups=["x", "y", "z"]
    )
    taken = source.take(np.array([2, 0]))
    assert (taken.images, taken.ids, taken.groups, taken.parts) == ([Path("c"), Path("a")], ["c", "a"], ["z", "x"], None)
    assert taken.labels.tolist() == [1, 0]


def test_digits_are_scikit_learns_sixteen_levels_stretched_to_eight_bits():
    source, original = open_source("digits"), load_digits()
    assert source.images.dtype == np.uint8
    assert source.images.max() == 255
    assert np.array_equal(np.round(source.images / 255 * 16), original.images)
    assert np.array_equal(source.labels, original.target)
    assert len(set(source.ids)) == 1797
    assert source.classes == list("0123456789")


# --- image folders ---


@pytest.mark.parametrize(
    ("train", "test"),
    [("train", "test"), ("Training", "Testing"), ("train", "val"), ("TRAIN", "validation"), ("train", "valid")],
)
def test_a_folder_keeps_its_published_split(image_folder, train, test):
    root = image_folder(
        f"{train}/dog/deep/b.PNG", f"{train}/cat/z.jpg", f"{test}/cat/a.bmp", f"{test}/dog/a.png", "other/c.png"
    )
    (root / train / "dog" / "notes.txt").write_text("no image")
    (root / test / "cat" / "Thumbs.db").write_text("no image")
    (root / test / "cat" / "._a.bmp").write_text("a resource fork")
    source = open_source("folder", root)
    assert source.classes == ["cat", "dog"]
    assert source.ids == [f"{train}/cat/z.jpg", f"{train}/dog/deep/b.PNG", f"{test}/cat/a.bmp", f"{test}/dog/a.png"]
    assert source.labels.tolist() == [0, 1, 0, 1]
    assert source.parts == ["train", "train", "test", "test"]
    assert source.card["ignored_files"] == 2
    assert [path.relative_to(root).as_posix() for path in source.images] == source.ids


@pytest.mark.parametrize("val", ["val", "Validation", "valid"])
def test_a_folder_keeps_its_published_validation_part(image_folder, val):
    source = open_source("folder", image_folder(*(f"{part}/{c}/1.png" for part in ("train", val, "test") for c in "ab")))
    assert source.ids == [f"{part}/{c}/1.png" for part in ("train", val, "test") for c in "ab"]
    assert source.parts == ["train", "train", "val", "val", "test", "test"]


def test_a_folder_of_classes_alone_has_no_published_split(image_folder):
    source = open_source("folder", image_folder("dog/b.png", "dog/a.png", "cat/a.png", ".thumbnails/a.png"))
    assert source.parts is None
    assert source.ids == ["cat/a.png", "dog/a.png", "dog/b.png"]
    assert source.labels.tolist() == [0, 1, 1]


def test_an_empty_class_folder_is_named(image_folder):
    root = image_folder("train/a/1.png", "test/a/1.png")
    (root / "test" / "b").mkdir()
    with pytest.raises(ValueError, match=r"no image in .*test.b; remove the folder or fill it"):
        open_source("folder", root)


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        (
            ["train/a/1.png", "train/b/1.png", "test/a/1.png", "test/c/1.png"],
            ValueError,
            "train and test .* other classes: b, c is",
        ),
        (
            ["train/a/1.png", "val/a/1.png", "val/b/1.png", "test/a/1.png"],
            ValueError,
            "train and val .* other classes: b is",
        ),
        (["train/a/1.png", "a/1.png"], FileNotFoundError, "only one of a train and a test folder"),
        (["test/a/1.png"], FileNotFoundError, "only one of a train and a test folder"),
        (
            ["train/1.png", "test/1.png"],
            FileNotFoundError,
            r"no class folder in .*train; expected one folder of images per class",
        ),
    ],
)
def test_a_folder_of_another_layout_is_refused(image_folder, files, error, message):
    with pytest.raises(error, match=message):
        open_source("folder", image_folder(*files))


def test_the_data_set_folder_needs_a_root_of_its_own(image_folder, monkeypatch):
    monkeypatch.setenv("HDKD_DATA", str(image_folder("a/1.png", "b/1.png")))
    with pytest.raises(FileNotFoundError, match="the dataset 'folder' needs root="):
        open_source("folder")


@pytest.mark.parametrize(("name", "hint"), [("ham1000", "did you mean 'ham10000'?"), ("xyz", "known are digits, folder")])
def test_an_unknown_data_set_brings_a_suggestion(name, hint):
    with pytest.raises(ValueError, match=rf"unknown dataset '{name}'; {hint}"):
        open_source(name)


# --- sets with a folder of their own ---


@pytest.mark.parametrize("is_zipped", [False, True])
def test_the_two_brain_tumour_sets_are_told_apart_in_one_data_root(brain_folder, cache, is_zipped):
    if is_zipped:
        for name in ("another", "n", "s"):
            shutil.make_archive(str(brain_folder / f"archive ({name})"), "zip", brain_folder / name)
            shutil.rmtree(brain_folder / name)
    sartaj, nickparvar = (open_source(name, brain_folder) for name in ("brain_tumor", "brain_tumor_nickparvar"))
    assert sartaj.ids == ["Training/glioma_tumor/1.png", "Training/no_tumor/1.png", *sartaj.ids[2:]]
    assert sartaj.ids[2:] == ["Testing/glioma_tumor/2.png", "Testing/no_tumor/1.png"]
    assert nickparvar.ids == [f"{part}/{c}/1.png" for part in ("Training", "Testing") for c in ("glioma", "notumor")]
    assert sartaj.parts == nickparvar.parts == ["train", "train", "test", "test"]
    assert (sartaj.classes, nickparvar.classes) == (["glioma_tumor", "no_tumor"], ["glioma", "notumor"])
    assert sartaj.card["citation"] != nickparvar.card["citation"]
    assert len(list(cache.iterdir()) if cache.exists() else []) == (2 if is_zipped else 0)


def test_imagenette_has_the_names_of_its_classes_and_its_val_folder_is_the_test_part(imagenette_folder):
    source = open_source("imagenette", imagenette_folder)
    assert source.classes == ["tench", "parachute"]
    assert [path.stem for path in source.images] == ["2", "1", "4", "3"]
    assert source.labels.tolist() == [0, 1, 0, 1]
    assert source.parts == ["train", "train", "test", "test"]


def test_imagenet_has_the_names_of_its_classes_and_its_val_folder_is_the_test_part(imagenet_folder):
    source = open_source("imagenet", imagenet_folder)
    assert source.classes == ["tench", "English springer"]
    files = [f"{wnid}_{i:02d}" for wnid, count in IMAGENET_TRAIN.items() for i in range(count)]
    assert [path.stem for path in source.images] == [*files, "ILSVRC2012_val_2", "ILSVRC2012_val_1"]
    assert source.ids[-1] == "n02102040/ILSVRC2012_val_1.JPEG"
    assert source.labels.tolist() == [0] * 9 + [1] * 90 + [0, 1]
    assert source.parts[-2:] == ["test", "test"]
    assert open_source("imagenet", imagenet_folder / "imagenet").ids == source.ids


def test_imagenets_two_cranes_are_told_apart(imagenet_folder):
    meta = imagenet_folder / "imagenet" / "meta.bin"
    torch.save(({"n01440764": ("crane",), "n02102040": ("crane", "lift")}, ["n02102040", "n01440764"]), meta)
    assert open_source("imagenet", imagenet_folder).classes == ["crane (n01440764)", "crane (n02102040)"]


def test_imagenets_validation_part_is_ten_training_images_of_a_class_and_at_most_an_eighth(imagenet_folder):
    parts = open_source("imagenet", imagenet_folder).parts
    assert [parts[:9].count("val"), parts[9:99].count("val")] == [1, 10]
    assert open_source("imagenet", imagenet_folder).parts == parts


def test_cifar_joins_its_five_files_and_its_test_part(cifar10_folder):
    source = open_source("cifar10", cifar10_folder)
    assert source.images.shape == (12, 32, 32, 3)
    assert source.labels.tolist() == [0, 9, 1, 8, 2, 7, 3, 6, 4, 5, 5, 4]
    assert source.parts == ["train"] * 10 + ["test"] * 2
    assert source.ids[9:] == ["train/00009", "test/00000", "test/00001"]
    folder = cifar10_folder / "cifar10" / "cifar-10-batches-py"
    stored = pickle.loads((folder / "test_batch").read_bytes())["data"]
    assert np.array_equal(source.images[10:].transpose(0, 3, 1, 2).reshape(2, -1), stored)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("is_archive", [False, True])
def test_cifar10_as_image_files_is_read_and_its_card_says_what_they_are(suffix, is_archive, image_folder, cache):
    names = [f"{part}/{c}/{i}.{suffix}" for part in ("train", "test") for c in ("airplane", "truck") for i in range(2)]
    folder = image_folder(*(f"cifar10_images/{name}" for name in names)) / "cifar10_images"
    if is_archive:
        shutil.make_archive(str(folder / "cifar10"), "zip", folder)
        for part in ("train", "test"):
            shutil.rmtree(folder / part)
    for root in (folder, folder.parent):
        source = open_source("cifar10", root)
        assert sorted(source.ids) == sorted(names)
        assert (source.name, source.classes, Counter(source.parts)) == (
            "cifar10",
            ["airplane", "truck"],
            {"train": 4, "test": 4},
        )
        assert ("JPEG" in source.card["title"]) == ("other draws" in source.card["known_faults"]) == (suffix == "jpg")


def test_cifar100_has_its_hundred_fine_classes(cifar100_folder):
    source = open_source("cifar100", cifar100_folder / "cifar100")
    assert source.labels.tolist() == [0, 99, 5, 7, 0]
    assert len(source.classes) == 100
    assert source.card["title"].startswith("CIFAR-100")


def test_flowers_keep_their_three_parts(flowers102_folder):
    source = open_source("flowers102", flowers102_folder)
    assert source.ids == [f"image_{i:05d}.jpg" for i in (2, 8, 1, 3, 4, 5, 6, 7)]
    assert source.labels.tolist() == [1, 4, 0, 101, 0, 1, 2, 3]
    assert source.parts == ["train"] * 2 + ["val"] * 2 + ["test"] * 4
    assert len(source.classes) == 102


# --- MedMNIST ---


@pytest.mark.parametrize(
    ("name", "file", "side"),
    [("bloodmnist", "bloodmnist", 28), ("bloodmnist:28", "bloodmnist", 28), ("bloodmnist:64", "bloodmnist_64", 64)],
)
def test_medmnist_joins_the_three_parts_of_its_file(medmnist_folder, name, file, side):
    source = open_source(f"medmnist:{name}", medmnist_folder)
    stored = np.load(medmnist_folder / f"{file}.npz")
    assert source.images.shape == (9, side, side, 3)
    assert np.array_equal(source.images, np.concatenate([stored[f"{part}_images"] for part in ("train", "val", "test")]))
    assert source.labels.tolist() == [1, 2, 3, 4, 1, 2, 1, 2, 3]
    assert source.parts == ["train"] * 4 + ["val"] * 2 + ["test"] * 3
    assert source.ids[3:5] == ["train/000003", "val/000000"]
    assert source.classes[0] == "basophil"
    assert len(source.classes) == 8


def test_medmnist_is_found_in_a_folder_of_its_name(medmnist_folder):
    (medmnist_folder / "data").mkdir()
    (medmnist_folder / "data" / "medmnist").mkdir()
    for file in medmnist_folder.glob("*.npz"):
        file.rename(medmnist_folder / "data" / "medmnist" / file.name)
    source = open_source("medmnist:dermamnist", medmnist_folder / "data")
    assert len(source.ids) == 9
    assert "lesions are on both sides" in source.card["known_faults"]


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("blodmnist", ValueError, "unknown MedMNIST set 'blodmnist'; did you mean 'bloodmnist'?"),
        ("xyz", ValueError, "unknown MedMNIST set 'xyz'; the 2-D sets are pathmnist"),
        ("organmnist3d", ValueError, "unknown MedMNIST set 'organmnist3d'; did you mean 'organ.mnist'?"),
        ("chestmnist", ValueError, "chestmnist has several labels per image"),
        ("bloodmnist:32", ValueError, r"sizes are 28, 64, 128 and 224 \(got '32'\)"),
        ("bloodmnist:128", FileNotFoundError, "no bloodmnist_128.npz in .*; get it from medmnist.com or pass download=True"),
        ("pathmnist", FileNotFoundError, "no pathmnist.npz in .*; get it from medmnist.com or pass download=True"),
        ("pathmnist:28", FileNotFoundError, "no pathmnist.npz in .*; get it from medmnist.com or pass download=True"),
    ],
)
def test_a_set_that_medmnist_does_not_give_is_refused(medmnist_folder, name, error, message):
    with pytest.raises(error, match=message):
        open_source(f"medmnist:{name}", medmnist_folder)


# --- HAM10000 ---


@pytest.mark.parametrize(
    "change",
    [Path.resolve, as_harvard, as_isic, as_isic_zipped, as_one_archive, with_folders_twice, with_rows_twice],
    ids=["kaggle", "harvard", "isic", "isic_zipped", "one_archive", "folders_twice", "rows_twice"],
)
def test_ham10000_is_read_in_every_layout_in_which_it_is_published(ham_folder, cache, change):
    pixels = {file.stem: file.read_bytes() for file in ham_folder.rglob("*.jpg")}
    change(ham_folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source = open_source("ham10000", ham_folder.parent)
    assert source.ids == ["ISIC_0000001", "ISIC_0000002", "ISIC_0000003"]
    assert [path.read_bytes() for path in source.images] == [pixels[i] for i in source.ids]
    assert source.classes == ["mel", "nv"]
    assert source.labels.tolist() == [0, 1, 1]
    assert source.groups == ["HAM_2", "HAM_1", "HAM_1"]
    assert source.parts is None
    assert source.card["images_without_row"] == 0


def test_rows_of_ham10000_without_an_image_are_counted(ham_folder):
    (ham_folder / "HAM10000_images_part_2" / "ISIC_0000002.jpg").unlink()
    with pytest.raises(ValueError, match=r"1 rows of HAM10000_metadata.csv have no image in .*, the first is ISIC_0000002"):
        open_source("ham10000", ham_folder)


def test_images_of_ham10000_without_a_row_are_left_out_with_a_warning(ham_folder, image_folder):
    image_folder("ham/HAM10000_images_part_1/ISIC_0000009.jpg", "ham/HAM10000_images_part_1/ISIC_0000008.jpg")
    with pytest.warns(UserWarning, match=r"2 images in .* have no row in HAM10000_metadata.csv .*, the first is ISIC_0000008"):
        source = open_source("ham10000", ham_folder)
    assert source.ids == ["ISIC_0000001", "ISIC_0000002", "ISIC_0000003"]
    assert source.card["images_without_row"] == 2


@pytest.mark.parametrize("row", ["HAM_9,ISIC_0000001,mel,50", "HAM_2,ISIC_0000001,nv,50"])
def test_rows_of_ham10000_that_contradict_each_other_are_refused(ham_folder, row):
    table = ham_folder / "HAM10000_metadata.csv"
    table.write_text(f"{table.read_text()}\n{row}")
    with pytest.raises(
        ValueError, match=r"1 images have two rows in HAM10000_metadata.csv that differ, the first is ISIC_0000001"
    ):
        open_source("ham10000", ham_folder)


def test_two_images_of_ham10000_with_one_name_are_refused(ham_folder):
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(ham_folder / "HAM10000_images_part_2" / "ISIC_0000001.png")
    with pytest.raises(ValueError, match=r"two images are named ISIC_0000001 and differ: .*part_1.*part_2.*; remove one"):
        open_source("ham10000", ham_folder)


def test_two_images_of_ham10000_with_one_name_and_one_size_are_refused(ham_folder):
    for folder, colour in (("HAM10000_images_part_1", 0), ("HAM10000_images_part_2", 255)):
        Image.fromarray(np.full((8, 8, 3), colour, np.uint8)).save(ham_folder / folder / "ISIC_0000001.bmp")
    (ham_folder / "HAM10000_images_part_1" / "ISIC_0000001.jpg").unlink()
    with pytest.raises(ValueError, match="two images are named ISIC_0000001 and differ"):
        open_source("ham10000", ham_folder)


def test_columns_that_ham10000s_table_lacks_are_named(ham_folder):
    (ham_folder / "HAM10000_metadata.csv").write_text("image_id,age\nISIC_0000001,40")
    with pytest.raises(ValueError, match=r"HAM10000_metadata.csv has no column dx, lesion_id"):
        open_source("ham10000", ham_folder)


@pytest.mark.parametrize("row", ["0.0,0.0,0.0", "1.0,1.0,0.0", "0.5,0.5,0.0"])
def test_a_row_of_isics_truth_that_does_not_name_one_class_is_refused(ham_folder, row):
    as_isic(ham_folder)
    truth = next(ham_folder.rglob("*GroundTruth.csv"))
    truth.write_text(truth.read_text().replace("ISIC_0000001,1.0,0.0,0.0", f"ISIC_0000001,{row}"))
    with pytest.raises(ValueError, match=r"1 rows of .*GroundTruth.csv do not name one class, the first is ISIC_0000001"):
        open_source("ham10000", ham_folder)


def test_isics_ham10000_needs_its_table_of_lesions(ham_folder):
    as_isic(ham_folder)
    groups = ham_folder / "ISIC2018_Task3_Training_LesionGroupings.csv"
    groups.write_text("\n".join(groups.read_text().split("\n")[:-1]))
    with pytest.raises(
        ValueError, match=r"1 images of ISIC2018_Task3_Training_GroundTruth.csv are not in .*LesionGroupings.csv"
    ):
        open_source("ham10000", ham_folder)
    groups.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"has no ISIC2018_Task3_Training_LesionGroupings.csv; put it there: without it"
    ):
        open_source("ham10000", ham_folder)


def test_lesions_that_known_links_join_are_one_group():
    ids = ["ISIC_0033481", "ISIC_0000001", "ISIC_0033421", "ISIC_0000002", "ISIC_0033556"]
    groups = sources._linked(ids, ["a", "a", "b", "b", "c"])
    assert groups == ["a", "a", "a", "a", "c"], (
        "the first two and the next two by their first link; c's other image is not here"
    )
