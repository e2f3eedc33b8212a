import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from hdkd_lib import data as module
from hdkd_lib.data import load
from hdkd_lib.data.batches import Files, Rows
from hdkd_lib.data.sources import open_source

PARTS = ("train", "val", "test")


def parts_of(data) -> dict:
    return {name: getattr(data, name) for name in PARTS}


def pictures(part) -> Counter:
    return Counter(image.numpy().tobytes() for image in part.images[:])


@pytest.fixture
def published(image_folder) -> Path:
    """Ten images of two classes in train, six in val and in test."""
    counts = {"train": 10, "val": 6, "test": 6}
    return image_folder(*(f"set/{part}/{c}/{i}.png" for part in counts for c in "ab" for i in range(counts[part]))) / "set"


def test_load_keeps_image_label_and_id_together():
    data, source = load("digits", image_size=8), open_source("digits")
    assert sorted(i for part in parts_of(data).values() for i in part.ids) == source.ids
    for part in parts_of(data).values():
        index = [source.ids.index(i) for i in part.ids]
        assert np.array_equal(part.images[:].numpy(), np.repeat(source.images[index][:, None], 3, axis=1))
        assert np.array_equal(part.labels.numpy(), source.labels[index])
        assert part.labels.dtype == torch.int64
        assert len(part) == len(part.groups) == len(part.images)


def test_renamed_files_in_another_place_are_the_same_data(image_folder):
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


@pytest.mark.parametrize(
    "changed",
    [
        {"image_size": 4},
        {"protocol": "random"},
        {"fold": 1},
        {"fraction": 0.5},
        {"split_seed": 1},
        {"draws": 2, "val_per_class": 2, "draw": 1},
    ],
    ids=lambda option: next(iter(option)),
)
def test_what_determines_the_split_is_in_the_configuration(published, changed):
    options = {"image_size": 8, "protocol": "grouped", "fold": 0, "fraction": 1.0, "split_seed": 0}
    plain, other = load("folder", published, **options), load("folder", published, **options | changed)
    assert {key: plain.config[key] for key in options} == options
    assert plain.config["content"] == other.config["content"]
    differing = {key for key in other.config if plain.config.get(key) != other.config[key]}
    assert differing - {"split"} == changed.keys()
    sides = [{name: sorted(part.ids) for name, part in parts_of(data).items()} for data in (plain, other)]
    assert ("split" in differing) == (sides[0] != sides[1])


def test_a_long_chain_is_joined_only_if_asked_and_the_configuration_says_so(image_folder, monkeypatch):
    root = image_folder(*(f"{c}/{i:02d}.png" for c in "ab" for i in range(30)))
    chain = {"a": np.arange(11), "b": np.arange(1, 12), "distance": 0.1, "ratio": 0.2, "orientation": ""}
    monkeypatch.setattr("hdkd_lib.data.leakage.near_duplicates", lambda _: pd.DataFrame(chain))
    with pytest.warns(UserWarning, match=r"^12 images form chains of near duplicates .* join_chains=True$"):
        apart = load("folder", root, image_size=8)
    joined = load("folder", root, image_size=8, join_chains=True)
    assert (apart.card["groups"], joined.card["groups"]) == (60, 49)
    assert apart.card["images_in_chains_not_joined"] == 12
    assert "images_in_chains_not_joined" not in joined.card
    assert sum(any(f"a/{i:02d}.png" in part.ids for i in range(12)) for part in parts_of(joined).values()) == 1
    assert joined.config.items() >= {"join_chains": True}.items()
    assert "join_chains" not in apart.config, "as in runs that were made before"
    assert joined.config["split"] != apart.config["split"]
    assert module.load_as(joined.config, root).config == joined.config


def test_a_run_of_an_older_rule_gets_its_own_images_again():
    old, today = (load("digits", image_size=8, fold=fold) for fold in (1, 0))
    split = pd.concat([pd.DataFrame({"id": part.ids, "part": name}) for name, part in parts_of(old).items()])
    assert module.load_as(today.config, split=split).config == today.config, "the rule is today's"
    again = module.load_as(today.config | {"split": "of an older rule"}, split=split)
    for name, part in parts_of(again).items():
        expected = getattr(old, name)
        assert part.ids == expected.ids
        assert (part.images[:] == expected.images[:]).all()
        assert (part.labels == expected.labels).all()
        assert (part.groups == expected.groups).all()
    assert again.card["test_images_in_train"] == old.card["test_images_in_train"]
    assert again.config["split"] == "of an older rule"
    paper = module.load_as(today.config | {"split": "older"}, split=split[split.part != "val"])
    assert paper.val.ids == paper.test.ids
    for change, message in (
        (
            split.assign(id="x" + split.id),
            r"1797 of the 1797 images .* are not in digits \(x0000, ...\); give the folder",
        ),
        (split[split.part == "test"], "this split names no images of the part train"),
    ):
        with pytest.raises(ValueError, match=message):
            module.load_as(today.config | {"split": "older"}, split=change)


def test_the_rules_version_is_in_the_hash_of_the_split(published, monkeypatch):
    before = load("folder", published, image_size=8).config
    monkeypatch.setattr(module, "RULE", module.RULE + 1)
    after = load("folder", published, image_size=8).config
    assert {key for key in after if after[key] != before[key]} == {"split"}


def test_audit_and_split_are_computed_once(image_folder, cache, monkeypatch):
    root = image_folder(*(f"{c}/{i}.png" for c in "ab" for i in range(12)))
    first = load("folder", root, image_size=8)
    for name in ("hdkd_lib.data.leakage._near_duplicates", "hdkd_lib.data.split"):
        monkeypatch.setattr(name, None)
    again = load("folder", root, image_size=8)
    assert again.config == first.config
    assert again.audit.summary == first.audit.summary
    assert {name: part.ids for name, part in parts_of(again).items()} == {n: p.ids for n, p in parts_of(first).items()}
    with pytest.raises(TypeError):  # another fold is another split
        load("folder", root, image_size=8, fold=1)


def test_what_is_remembered_depends_on_groups_and_labels(image_folder, cache):
    """Files with the same pixels in the same order, sorted into other classes, are split anew."""
    root = image_folder(*(f"here/{c}/{i}.png" for c in "ab" for i in range(10)))
    for i, file in enumerate(sorted((root / "here").rglob("*.png"))):
        target = root / "there" / "ab"[i >= 8] / f"{i:02d}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    for place in ("here", "there"):
        for part in parts_of(load("folder", root / place, image_size=8)).values():
            assert len(set(part.labels.tolist())) == 2


def test_the_card_counts_what_leaks(image_folder):
    root = image_folder(*(f"{part}/{c}/{i}.png" for part in ("train", "test") for c in "ab" for i in range(10)))
    for i in range(4):
        shutil.copy(root / f"train/a/{i}.png", root / f"test/a/{i}.png")
    for copy in ("test/b/8.png", "test/b/9.png"):
        shutil.copy(root / "train/a/0.png", root / copy)
    (root / "train" / "a" / "notes.txt").write_text("no image")
    grouped, official, by_image = (load("folder", root, image_size=8, protocol=p) for p in ("grouped", "official", "random"))
    expected = {
        "images": 40,
        "classes": {"a": 20, "b": 20},
        "exact_copies": 6,
        "near_duplicate_pairs": 0,
        "distinct_images": 34,
        "duplicates_with_two_labels": 1,
        "groups": 34,
        "test_images": 20,
        "test_images_with_exact_duplicate_in_train": 6,
        "test_images_with_exact_or_near_duplicate_in_train": 6,
        "ignored_files": 1,
        "licence": "not known",
    }
    for data in (grouped, official, by_image):
        assert expected.items() <= data.card.items()
        leaked = sum(pictures(data.test)[picture] for picture in pictures(data.train))
        assert data.card["test_images_in_train"] == leaked
    assert grouped.card["test_images_in_train"] == 0 < official.card["test_images_in_train"]
    assert (grouped.card["protocol"], official.card["protocol"]) == ("grouped", "official")
    assert official.test.ids == [f"test/{c}/{i}.png" for c in "ab" for i in range(10)]


def test_a_picture_and_its_copy_encoded_again_are_on_one_side(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(24):
        picture = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)).resize((72, 56), Image.Resampling.BICUBIC)
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        picture.save(tmp_path / "ab"[i % 2] / f"{i}.png")
        picture.save(tmp_path / "ab"[i % 2] / f"{i}.copy.jpg", quality=60)
    crossing = {}
    for protocol in ("grouped", "random"):
        data = load("folder", tmp_path, image_size=8, protocol=protocol)
        assert (data.card["images"], data.card["groups"], data.card["near_duplicate_pairs"]) == (48, 24, 24)
        sides = [{Path(i).name.split(".")[0] for i in part.ids} for part in parts_of(data).values()]
        crossing[protocol] = sum(map(len, sides)) - 24
    assert crossing["grouped"] == 0 < crossing["random"]


def test_a_split_by_another_protocol_is_the_one_that_load_would_make(published):
    data = load("folder", published, image_size=8, split_seed=3)
    for protocol, fold in (("grouped", 0), ("grouped", 2), ("random", 1), ("official", 0)):
        other = load("folder", published, image_size=8, protocol=protocol, fold=fold, split_seed=3)
        index = data.split(protocol, fold)
        assert {part: [data.source.ids[i] for i in index[part]] for part in PARTS} == {
            part: getattr(other, part).ids for part in PARTS
        }


def test_broken_images_are_skipped_and_counted_where_that_is_asked_for(published):
    whole = load("folder", published, image_size=8, protocol="official")
    (published / "train" / "a" / "3.png").write_text("no image")
    (published / "test" / "b" / "0.png").write_text("no image")
    with pytest.raises(
        ValueError, match=r"2 of 44 images cannot be decoded.*on_corrupt='skip':\ntrain/a/3.png .*\ntest/b/0.png"
    ):
        load("folder", published, image_size=8)
    data = load("folder", published, image_size=8, protocol="official", on_corrupt="skip")
    assert (data.card["corrupt_files"], data.card["images"], data.card["test_images"]) == (2, 42, 11)
    assert data.card["classes"] == {"a": 21, "b": 21}
    assert data.config["content"] != whole.config["content"]
    assert "corrupt_files" not in whole.card
    for name, part in parts_of(data).items():
        before = parts_of(whole)[name]
        kept = [before.ids.index(i) for i in part.ids]
        assert len(kept) == len(before) - {"train": 1, "val": 0, "test": 1}[name]
        assert torch.equal(part.images[:], before.images[kept])
        assert torch.equal(part.labels, before.labels[kept])


# --- read from files ---


def test_images_read_from_files_are_those_of_the_published_split(published):
    cached = load("folder", published, image_size=8, protocol="official", fraction=0.5)
    files = load("folder", published, image_size=8, protocol="official", from_files=True)
    assert files.signatures is files.audit is None
    assert files.card["audit"] == "none: images are read from files"
    assert files.card["images"] == 44
    assert (cached.config["from_files"], files.config["from_files"]) == (False, True)
    whole = load("folder", published, image_size=8, protocol="official")
    for name, part in parts_of(files).items():
        expected = parts_of(whole)[name]
        assert isinstance(part.images, Files)
        assert isinstance(expected.images, Rows)
        assert part.ids == expected.ids
        assert torch.equal(part.labels, expected.labels)
        assert [path.relative_to(published).as_posix() for path in part.images.paths] == part.ids
        assert part.images[:].shape == expected.images.shape
    assert len(cached.train) == 10


def test_labels_or_names_that_change_change_the_content_of_a_set_that_is_read_from_files(published):
    options = {"image_size": 8, "protocol": "official", "from_files": True}
    before = load("folder", published, **options).config["content"]
    assert load("folder", published, **options).config["content"] == before
    (published / "train" / "a" / "0.png").rename(published / "train" / "b" / "99.png")
    assert load("folder", published, **options).config["content"] != before


@pytest.mark.parametrize("protocol", ["grouped", "random"])
def test_a_set_read_from_files_has_no_split_but_the_published_one(published, protocol):
    with pytest.raises(ValueError, match="folder at 8 px would be read from files, without an audit: pass protocol='official'"):
        load("folder", published, image_size=8, protocol=protocol, from_files=True)


def test_arrays_are_not_read_from_files():
    with pytest.raises(ValueError, match="digits has no image files; pass from_files=False"):
        load("digits", image_size=8, protocol="official", from_files=True)


def test_a_set_that_is_too_large_to_be_decoded_once_is_read_from_files(published, monkeypatch):
    monkeypatch.setattr(module, "CACHE_LIMIT", 44 * 3 * 8 * 8)
    assert not load("folder", published, image_size=8, protocol="official").config["from_files"]
    assert load("folder", published, image_size=9, protocol="official").config["from_files"]
    assert not load("folder", published, image_size=9, protocol="official", from_files=False).config["from_files"]
    with pytest.raises(ValueError, match="pass protocol='official'"):
        load("folder", published, image_size=9)


# --- the real data sets, where HDKD_DATA holds them ---


def test_brain_tumor_leaks_by_its_published_split_and_not_by_the_default_one(real):
    data = real("brain_tumor")
    counts = {"images": 3264, "exact_copies": 394, "test_images": 394, "test_images_with_exact_duplicate_in_train": 251}
    assert counts.items() <= data.card.items()
    assert data.card["classes"] == {"glioma_tumor": 926, "meningioma_tumor": 937, "no_tumor": 500, "pituitary_tumor": 901}
    assert data.card["test_images_in_train"] == 0
    assert not pictures(data.test).keys() & (pictures(data.train) + pictures(data.val)).keys()


@pytest.mark.slow
def test_no_lesion_of_ham10000_crosses_the_parts(real):
    data = real("ham10000")
    assert len(set(data.source.groups)) == 7470 - 18
    lesion = dict(zip(data.source.ids, data.source.groups, strict=True))
    parts = [{lesion[i] for i in part.ids} for part in parts_of(data).values()]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 7470 - 18
    assert data.card["classes"]["nv"] == 6705
    assert data.card["images_without_row"] == 0


@pytest.mark.slow
def test_no_lesion_of_ham10000_is_in_two_draws(real):
    draws = [real("ham10000", fold=1, draws=10, draw=k) for k in range(10)]
    lesion = dict(zip(draws[0].source.ids, draws[0].source.groups, strict=True))
    parts = [data.train for data in draws] + [draws[0].val, draws[0].test]
    assert sum(map(len, parts)) == 10_015
    lesions = [{lesion[i] for i in part.ids} for part in parts]
    assert sum(map(len, lesions)) == len(set.union(*lesions)) == 7470 - 18
    assert draws[0].val.labels.bincount().tolist() == [50] * 7
    assert len({len(data.train) for data in draws}) <= 2
    assert len({data.config["split"] for data in draws}) == 10


def test_imagenette_has_a_published_split_of_ten_named_classes(real):
    data = real("imagenette")
    assert len(data.classes) == 10
    assert {"tench", "parachute"} <= set(data.classes)
    assert set(data.source.parts) == {"train", "test"}


def test_training_images_of_another_set_keep_their_classes_by_name_and_the_test_part_stays(tmp_path):
    real = load("digits", image_size=16)
    names = [real.classes[i] for i in (3, 1)] + [name for i, name in enumerate(real.classes) if i not in (1, 3)]
    for label, name in enumerate(names):
        (tmp_path / name).mkdir()
        for i in range(6):
            pixels = np.random.default_rng(10 * label + i).integers(0, 256, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{name}-{i}.png")
    made = load("folder", tmp_path, image_size=16)
    made = replace(made, classes=list(reversed(made.classes)))  # an order of its own
    mixed = real.trained_on(made)
    assert mixed.test is real.test
    assert len(mixed.train) + len(mixed.val) == 60
    assert not set(mixed.train.ids) & set(mixed.val.ids)
    assert all(name.startswith("made/") for name in mixed.train.ids + mixed.val.ids), "as no real image is called"
    for part, own in ((mixed.val, made.val), (mixed.train, made.train)):
        wanted = [real.classes.index(made.classes[label]) for label in own.labels]
        assert part.labels[: len(own)].tolist() == wanted
        assert torch.equal(part.images[: len(own)], own.images[:])
    assert mixed.config["content"] == real.config["content"]
    assert mixed.config["training"] == made.config
    with pytest.raises(ValueError, match="the sets have other classes or sizes"):
        real.trained_on(replace(made, classes=[*made.classes[:-1], "ten"]))
