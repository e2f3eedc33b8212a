import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from hdkd_lib.data import load
from hdkd_lib.data.sources import open_source

REAL_DATA = os.environ.get("HDKD_DATA")  # read here, before a fixture hides it from the tests


@pytest.fixture
def ham_folder(image_folder) -> Path:
    """HAM10000 in small, as downloaded: two image folders, rows in no order, a test image without a row."""
    root = image_folder(
        "HAM10000_images_part_1/ISIC_0000001.jpg",
        "HAM10000_images_part_1/ISIC_0000003.jpg",
        "HAM10000_images_part_2/ISIC_0000002.jpg",
        "HAM10000_images_part_2/ISIC_0009999.jpg",
    )
    rows = ["lesion_id,image_id,dx,age", "HAM_1,ISIC_0000003,nv,40", "HAM_2,ISIC_0000001,mel,", "HAM_1,ISIC_0000002,nv,40"]
    (root / "HAM10000_metadata.csv").write_text("\n".join(rows))
    return root


def parts_of(data) -> dict:
    return {"train": data.train, "val": data.val, "test": data.test}


def pictures(part) -> Counter:
    return Counter(image.numpy().tobytes() for image in part.images)


# --- the sources ---


def test_digits_are_scikit_learns_sixteen_levels_stretched_to_eight_bits():
    source, original = open_source("digits"), load_digits()
    assert source.images.dtype == np.uint8
    assert source.images.max() == 255
    assert np.array_equal(np.round(source.images / 255 * 16), original.images)
    assert np.array_equal(source.labels, original.target)
    assert len(set(source.ids)) == 1797
    assert source.classes == list("0123456789")


@pytest.mark.parametrize(("train", "test"), [("train", "test"), ("Training", "Testing"), ("train", "val")])
def test_a_folder_keeps_its_published_split(image_folder, train, test):
    root = image_folder(
        f"{train}/dog/deep/b.PNG", f"{train}/cat/z.jpg", f"{test}/cat/a.bmp", f"{test}/dog/a.png", "other/c.png"
    )
    (root / train / "dog" / "notes.txt").write_text("no image")
    source = open_source("folder", root)
    assert source.classes == ["cat", "dog"]
    assert source.ids == [f"{train}/cat/z.jpg", f"{train}/dog/deep/b.PNG", f"{test}/cat/a.bmp", f"{test}/dog/a.png"]
    assert source.labels.tolist() == [0, 1, 0, 1]
    assert source.parts == ["train", "train", "test", "test"]
    assert [path.relative_to(root).as_posix() for path in source.images] == source.ids


def test_a_folder_of_classes_alone_has_no_published_split(image_folder):
    source = open_source("folder", image_folder("dog/b.png", "dog/a.png", "cat/a.png", ".thumbnails/a.png"))
    assert source.parts is None
    assert source.ids == ["cat/a.png", "dog/a.png", "dog/b.png"]
    assert source.labels.tolist() == [0, 1, 1]


def test_brain_tumor_is_found_in_the_data_root_by_its_two_folders(image_folder, monkeypatch):
    root = image_folder("mri/Training/a/1.png", "mri/Testing/a/1.png", "ham/images/1.png", "photos/train/b/1.png")
    source = open_source("brain_tumor", root)
    assert (source.name, source.classes, source.ids) == ("brain_tumor", ["a"], ["Training/a/1.png", "Testing/a/1.png"])
    assert open_source("brain_tumor", root / "mri").ids == source.ids
    monkeypatch.setenv("HDKD_DATA", str(root))
    assert open_source("brain_tumor").images == source.images
    image_folder("brain_tumor_copy/Training/c/1.png", "brain_tumor_copy/Testing/c/1.png", "another/Training/d/1.png")
    image_folder("another/Testing/d/1.png")
    assert open_source("brain_tumor").classes == ["c"], "a folder of the data set's own name comes first"


def test_ham10000_joins_its_table_with_images_in_two_folders(ham_folder):
    source = open_source("ham10000", ham_folder.parent)
    assert source.ids == ["ISIC_0000001", "ISIC_0000002", "ISIC_0000003"]
    assert [path.stem for path in source.images] == source.ids
    assert source.classes == ["mel", "nv"]
    assert source.labels.tolist() == [0, 1, 1]
    assert source.groups == ["HAM_2", "HAM_1", "HAM_1"]


# --- what goes wrong is said in a sentence ---


def test_a_missing_data_root_is_named(tmp_path):
    for name in ("folder", "brain_tumor", "ham10000"):
        with pytest.raises(FileNotFoundError, match=r"no data folder at .*nowhere; correct root= or the variable HDKD_DATA"):
            open_source(name, tmp_path / "nowhere")


def test_without_a_root_the_variable_is_named(monkeypatch):
    monkeypatch.delenv("HDKD_DATA", raising=False)
    for name in ("folder", "brain_tumor", "ham10000"):
        with pytest.raises(FileNotFoundError, match="no data folder given; pass root= or set the variable HDKD_DATA"):
            open_source(name)


@pytest.mark.parametrize(
    ("name", "wanted"), [("brain_tumor", "holds Training and Testing"), ("ham10000", "holds HAM10000_metadata.csv")]
)
def test_a_data_root_without_the_data_set_is_named_with_what_was_looked_for(image_folder, name, wanted):
    with pytest.raises(FileNotFoundError, match=f"no {name} in .*: no folder there {wanted}"):
        open_source(name, image_folder("photos/Training/1.png"))


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
        (["train/a/1.png", "a/1.png"], FileNotFoundError, "only one of a train and a test folder"),
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


@pytest.mark.parametrize(("name", "hint"), [("ham1000", "did you mean 'ham10000'?"), ("xyz", "known are digits, folder")])
def test_an_unknown_data_set_brings_a_suggestion(name, hint):
    with pytest.raises(ValueError, match=rf"unknown dataset '{name}'; {hint}"):
        open_source(name)


def test_rows_of_ham10000_without_an_image_are_counted(ham_folder):
    (ham_folder / "HAM10000_images_part_2" / "ISIC_0000002.jpg").unlink()
    with pytest.raises(ValueError, match=r"1 rows of HAM10000_metadata.csv have no image in .*, the first is ISIC_0000002"):
        open_source("ham10000", ham_folder)


def test_columns_that_ham10000s_table_lacks_are_named(ham_folder):
    (ham_folder / "HAM10000_metadata.csv").write_text("image_id,age\nISIC_0000001,40")
    with pytest.raises(ValueError, match=r"HAM10000_metadata.csv has no column dx, lesion_id"):
        open_source("ham10000", ham_folder)


# --- load: source, decoding and split together ---


def test_load_keeps_image_label_and_id_together():
    data, source = load("digits", image_size=8), open_source("digits")
    assert sorted(i for part in parts_of(data).values() for i in part.ids) == source.ids
    for part in parts_of(data).values():
        index = [source.ids.index(i) for i in part.ids]
        assert np.array_equal(part.images.numpy(), np.repeat(source.images[index][:, None], 3, axis=1))
        assert np.array_equal(part.labels.numpy(), source.labels[index])
        assert len(part) == len(part.groups)


def test_renamed_files_in_another_place_are_the_same_data(image_folder, tmp_path):
    root = image_folder(*(f"here/{c}/{i}.png" for c in "ab" for i in range(12)))
    for file in sorted((root / "here").rglob("*.png")):
        (root / "there" / file.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(file, root / "there" / file.parent.name / f"{99 - int(file.stem)}.png")
    here, there = (load("folder", root / place, image_size=8) for place in ("here", "there"))
    assert here.config == there.config
    for name, part in parts_of(here).items():
        assert pictures(part) == pictures(parts_of(there)[name])
    (root / "there" / "a" / "99.png").rename(root / "there" / "b" / "9.png")
    assert load("folder", root / "there", image_size=8).config["content"] != here.config["content"], "a label changed"


def test_the_card_counts_what_leaks(image_folder):
    root = image_folder(*(f"{part}/{c}/{i}.png" for part in ("train", "test") for c in "ab" for i in range(10)))
    for i in range(4):
        shutil.copy(root / f"train/a/{i}.png", root / f"test/a/{i}.png")
    for copy in ("test/b/8.png", "test/b/9.png"):
        shutil.copy(root / "train/a/0.png", root / copy)
    grouped, official = (load("folder", root, image_size=8, protocol=p) for p in ("grouped", "official"))
    expected = {
        "images": 40,
        "classes": {"a": 20, "b": 20},
        "duplicate_images": 6,
        "groups": 34,
        "groups_with_two_labels": 1,
        "official_test_images": 20,
        "official_test_images_in_train": 6,
    }
    for data in (grouped, official):
        assert expected.items() <= data.card.items()
        leaked = sum(pictures(data.test)[picture] for picture in pictures(data.train))
        assert data.card["test_images_in_train"] == leaked
    assert grouped.card["test_images_in_train"] == 0 < official.card["test_images_in_train"]
    assert official.test.ids == [f"test/{c}/{i}.png" for c in "ab" for i in range(10)]


# --- the real data sets, where HDKD_DATA holds them ---


def real(name: str):
    if not REAL_DATA:
        pytest.skip("HDKD_DATA is not set")
    try:
        return open_source(name, REAL_DATA), load(name, REAL_DATA, image_size=32)
    except FileNotFoundError as absent:
        pytest.skip(str(absent))


def test_brain_tumor_leaks_by_its_published_split_and_not_by_the_default_one():
    _, data = real("brain_tumor")
    counts = {"images": 3264, "groups": 2870, "official_test_images": 394, "official_test_images_in_train": 251}
    assert counts.items() <= data.card.items()
    assert data.card["classes"] == {"glioma_tumor": 926, "meningioma_tumor": 937, "no_tumor": 500, "pituitary_tumor": 901}
    assert data.card["test_images_in_train"] == 0
    assert not pictures(data.test).keys() & (pictures(data.train) + pictures(data.val)).keys()


def test_no_lesion_of_ham10000_crosses_the_parts():
    source, data = real("ham10000")
    assert data.card["groups"] == 7470
    assert len(set(source.groups)) == 7470
    lesion = dict(zip(source.ids, source.groups, strict=True))
    parts = [{lesion[i] for i in part.ids} for part in parts_of(data).values()]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 7470
    assert data.card["classes"]["nv"] == 6705
