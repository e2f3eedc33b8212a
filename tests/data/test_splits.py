from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from hdkd_lib.data.splits import FOLDS, PROTOCOLS, group_images, split

quick = settings(max_examples=25)


@st.composite
def collections(draw) -> dict:
    """Three classes of eight separate images each, and more whose pixels and names repeat at will, across classes too.

    Pixels of two numbers are duplicates where the second half of them is near the first.
    """
    extra = draw(st.lists(st.tuples(st.integers(0, 2), st.integers(24, 32), st.integers(24, 32)), max_size=24))
    rows = [(i % 3, i, i) for i in range(24)] + extra
    labels, pixels, names = (np.array(column) for column in zip(*rows, strict=True))
    parts = np.where(np.arange(len(rows)) % 24 < 15, "train", "test")
    duplicates = np.where(pixels > 28, pixels - 4, pixels)
    return {
        "labels": labels,
        "hashes": pixels.astype(str),
        "duplicate_groups": duplicates,
        "groups": names.astype(str),
        "parts": parts,
    }


KEYS = ("hashes", "duplicate_groups", "groups")


def parted(collection: dict, **options) -> dict[str, np.ndarray]:
    try:
        return split(**collection, **options)
    except ValueError as error:
        if "no image of class" in str(error):  # one large group holds too much of a class: refused, which is right
            reject()
        raise


def content(collection: dict, parts: dict[str, np.ndarray]) -> dict[str, Counter]:
    return {part: Counter(zip(collection["hashes"][i], collection["labels"][i], strict=True)) for part, i in parts.items()}


@quick
@given(collections(), st.integers(0, FOLDS - 1), st.integers(0, 9))
def test_neither_a_picture_nor_a_group_is_in_two_parts(collection, fold, seed):
    parts = parted(collection, fold=fold, seed=seed)
    for key in KEYS:
        values = [set(collection[key][i]) for i in parts.values()]
        assert sum(map(len, values)) == len(set.union(*values))


@quick
@given(collections())
def test_official_keeps_the_published_test_part_and_carves_validation_by_group(collection):
    parts = parted(collection, protocol="official")
    assert np.array_equal(parts["test"], np.flatnonzero(collection["parts"] == "test"))
    for key in KEYS:
        assert not set(collection[key][parts["train"]]) & set(collection[key][parts["val"]])


@quick
@given(collections(), st.integers(0, 9))
def test_official_keeps_the_published_validation_part(collection, seed):
    parts = np.where(np.arange(len(collection["labels"])) % 24 < 18, collection["parts"], "val")
    split_as_published = parted(collection | {"parts": parts}, protocol="official", seed=seed)
    for part, index in split_as_published.items():
        assert np.array_equal(index, np.flatnonzero(parts == part))
    smaller = parted(collection | {"parts": parts}, protocol="official", seed=seed, fraction=0.5)
    assert set(smaller["train"]) < set(split_as_published["train"])
    assert np.array_equal(smaller["val"], split_as_published["val"])


@quick
@given(collections(), st.sampled_from(["grouped", "official"]))
def test_without_pictures_equal_pixels_are_one(collection, protocol):
    by_pixels = collection | {"duplicate_groups": np.unique(collection["hashes"], return_inverse=True)[1]}
    explicit, default = (parted(c, protocol=protocol) for c in (by_pixels, collection | {"duplicate_groups": None}))
    for part, index in explicit.items():
        assert np.array_equal(index, default[part])


@pytest.mark.parametrize("protocol", PROTOCOLS)
@quick
@given(collections(), st.integers(0, FOLDS - 1))
def test_every_image_is_in_exactly_one_part(protocol, collection, fold):
    parts = parted(collection, protocol=protocol, fold=fold)
    assert sorted(np.concatenate(list(parts.values()))) == list(range(len(collection["labels"])))


@pytest.mark.parametrize("protocol", ["grouped", "random"])
@quick
@given(collections(), st.integers(0, 9))
def test_the_five_test_parts_partition_the_set(protocol, collection, seed):
    tests = [parted(collection, protocol=protocol, fold=fold, seed=seed)["test"] for fold in range(FOLDS)]
    assert sorted(np.concatenate(tests)) == list(range(len(collection["labels"])))


@pytest.mark.parametrize("protocol", PROTOCOLS)
@quick
@given(collections(), st.randoms(use_true_random=False), st.sampled_from([0.3, 1.0]))
def test_the_order_of_the_files_does_not_matter(protocol, collection, random, fraction):
    order = random.sample(range(len(collection["labels"])), len(collection["labels"]))
    other = {key: values[order] for key, values in collection.items()}
    kept, permuted = (content(c, parted(c, protocol=protocol, fraction=fraction)) for c in (collection, other))
    assert kept == permuted


@quick
@given(collections(), st.lists(st.floats(0.01, 1), min_size=2, max_size=4).map(sorted))
def test_fractions_are_nested_and_leave_validation_and_test_alone(collection, fractions):
    whole, *steps = (parted(collection, fraction=f) for f in [1.0, *fractions])
    for smaller, larger in pairwise([*steps, whole]):
        assert set(smaller["train"]) <= set(larger["train"])
    for fraction, parts in zip(fractions, steps, strict=True):
        assert np.array_equal(parts["val"], whole["val"])
        assert np.array_equal(parts["test"], whole["test"])
        counts, full = (np.bincount(collection["labels"][p["train"]]) for p in (parts, whole))
        assert np.all(np.abs(counts - np.maximum(1, fraction * full)) <= 0.5)


@quick
@given(collections())
def test_groups_are_the_chains_of_equal_pixels_and_equal_names(collection):
    pixels, names = collection["hashes"], collection["groups"]
    linked = (pixels[:, None] == pixels) | (names[:, None] == names)
    for _ in range(len(pixels).bit_length()):  # the transitive closure, by squaring
        linked = linked @ linked
    numbers = group_images(pixels, names)
    assert list(dict.fromkeys(numbers)) == list(range(numbers.max() + 1)), "counted in order of appearance"
    assert np.array_equal(numbers[:, None] == numbers, linked)


def test_a_chain_of_pixels_and_names_is_one_group():
    numbers = group_images(["x", "x", "y", "z", "lesion_c"], ["lesion_a", "lesion_b", "lesion_b", "lesion_c", "lesion_d"])
    assert numbers[0] == numbers[1] == numbers[2]
    assert len(set(numbers)) == 3, "a name that reads like a hash joins nothing"
    assert len(set(group_images(["x", "y", "x"], None))) == 2


def test_classes_keep_their_shares_in_every_part():
    rng = np.random.default_rng(0)
    lesions = np.repeat(np.arange(350), rng.integers(1, 4, 350))
    labels = np.repeat([0, 1, 2], [200, 100, 50])[lesions]
    sizes = {"train": 0.7, "val": 0.1, "test": 0.2}
    for protocol in ("grouped", "random"):
        parts = split(labels, [str(i) for i in range(len(labels))], groups=lesions.astype(str), protocol=protocol)
        for part, index in parts.items():
            assert len(index) / len(labels) == pytest.approx(sizes[part], abs=0.02)
            assert np.bincount(labels[index]) / len(index) == pytest.approx(np.bincount(labels) / len(labels), abs=0.03)


def test_random_leaks_duplicated_images_and_grouped_does_not():
    labels, hashes = np.arange(60) % 2, np.array([str(i // 2 * 2 + i % 2) for i in range(60)])
    hashes = np.concatenate([hashes, hashes])
    labels = np.concatenate([labels, labels])
    leaked = {}
    for protocol in ("random", "grouped"):
        parts = split(labels, hashes, protocol=protocol)
        leaked[protocol] = np.isin(hashes[parts["test"]], hashes[parts["train"]]).mean()
    assert leaked["random"] > 0.5
    assert leaked["grouped"] == 0


def test_near_duplicates_stay_together_though_their_pixels_differ():
    labels, hashes, duplicates = np.arange(120) % 2, np.arange(120).astype(str), np.arange(120) % 60
    crossing = {}
    for groups in (None, duplicates):
        parts = split(labels, hashes, duplicate_groups=groups)
        crossing[groups is None] = np.isin(duplicates[parts["test"]], duplicates[parts["train"]]).mean()
    assert crossing[True] > 0.5
    assert crossing[False] == 0


def test_the_seed_alone_draws_another_split():
    labels, hashes = np.arange(100) % 2, [str(i) for i in range(100)]
    first, again, other = (split(labels, hashes, seed=seed) for seed in (0, 0, 1))
    for part in ("train", "val", "test"):
        assert np.array_equal(first[part], again[part])
        assert not np.array_equal(first[part], other[part])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protocol": "groupd"}, r"protocol must be one of grouped, official, random \(got 'groupd'\)"),
        ({"fold": 5}, r"fold must be 0 to 4 \(got 5\)"),
        ({"fold": -1}, r"fold must be 0 to 4 \(got -1\)"),
        ({"fraction": 0.0}, r"fraction must be above 0 and at most 1 \(got 0.0\)"),
        ({"fraction": 1.01}, r"fraction must be above 0 and at most 1 \(got 1.01\)"),
        ({"fraction": float("nan")}, r"fraction must be above 0 and at most 1 \(got nan\)"),
        ({"protocol": "official"}, "no published split; take protocol='grouped'"),
        (
            {"groups": [str(min(i, 9)) for i in range(40)]},
            "class 'dog' has 4 separate images .* needs at least 5 of every class",
        ),
        (
            {"duplicate_groups": np.minimum(np.arange(40), 9)},
            "class 'dog' has 4 separate images .* needs at least 5 of every class",
        ),
        ({"protocol": "official", "parts": ["train"] * 30 + ["test"] * 10}, "no image of class 'cat' is in the test part"),
        (
            {"protocol": "official", "parts": ["train", "test"] * 15 + ["val"] * 10},
            "no image of class 'cat' is in the val part",
        ),
    ],
)
def test_a_split_that_cannot_be_made_is_refused_with_its_cause(options, message):
    # 6 cats, then 34 dogs; grouped by min(i, 9) they are 6 and 4.
    labels = np.repeat([0, 1], [6, 34])
    with pytest.raises(ValueError, match=message):
        split(labels, [str(i) for i in range(40)], classes=["cat", "dog"], **options)


def test_a_split_published_in_three_parts_needs_no_five_images_of_a_class():
    published = {"parts": np.repeat(["train", "val", "test"], 2), "protocol": "official"}
    parts = split(np.arange(6) % 2, list("abcdef"), **published)
    assert {name: index.tolist() for name, index in parts.items()} == {"train": [0, 1], "val": [2, 3], "test": [4, 5]}


def drawn(collection: dict, draws: int, **options) -> list[dict[str, np.ndarray]]:
    try:
        return [parted(collection, draws=draws, draw=k, **options) for k in range(draws)]
    except ValueError as error:
        if "separate images to train on" in str(error):
            reject()
        raise


@pytest.mark.parametrize("protocol", ["grouped", "official"])
@quick
@given(collections(), st.integers(2, 3), st.integers(0, 9))
def test_draws_are_disjoint_whole_groups_with_one_validation_and_test_part(protocol, collection, draws, seed):
    parts = drawn(collection, draws, val_per_class=2, seed=seed, protocol=protocol)
    for part in parts[1:]:
        assert np.array_equal(part["val"], parts[0]["val"])
        assert np.array_equal(part["test"], parts[0]["test"])
    sets = [part["train"] for part in parts] + [parts[0]["val"]]
    left = np.setdiff1d(np.arange(len(collection["labels"])), parts[0]["test"])
    assert sorted(np.concatenate(sets)) == left.tolist()
    for key in KEYS:
        values = [set(collection[key][i]) for i in sets]
        assert sum(map(len, values)) == len(set.union(*values))
    assert (np.bincount(collection["labels"][parts[0]["val"]]) <= 2).all()


@quick
@given(collections(), st.randoms(use_true_random=False), st.integers(2, 3))
def test_neither_order_nor_names_of_files_decide_a_draw(collection, random, draws):
    order = random.sample(range(len(collection["labels"])), len(collection["labels"]))
    other = {key: values[order] for key, values in collection.items()}
    renamed = other | {"groups": np.array([f"lesion {name}" for name in other["groups"]])}
    kept, permuted = ([content(c, parts) for parts in drawn(c, draws, val_per_class=2)] for c in (collection, renamed))
    assert kept == permuted


@settings(max_examples=8)
@given(st.integers(2, 9), st.integers(0, 9))
def test_draws_of_separate_images_differ_by_one_of_a_class(draws, seed):
    labels = np.arange(330) % 3
    hashes = np.array([f"{i:03d}" for i in range(330)])
    parts = [split(labels, hashes, draws=draws, draw=k, val_per_class=5, seed=seed) for k in range(draws)]
    assert np.bincount(labels[parts[0]["val"]]).tolist() == [5, 5, 5]
    counts = np.array([np.bincount(labels[part["train"]]) for part in parts])
    assert np.ptp(counts, axis=0).max() <= 1


def test_a_published_validation_part_serves_every_draw():
    labels, sides = np.arange(60) % 2, np.array(["train", "train", "val", "test"])[np.arange(60) // 2 % 4]
    parts = [
        split(labels, np.arange(60).astype(str), parts=sides, protocol="official", draws=3, draw=k, val_per_class=1)
        for k in range(3)
    ]
    for part in parts:
        assert np.array_equal(part["val"], np.flatnonzero(sides == "val"))
    assert sorted(np.concatenate([part["train"] for part in parts])) == np.flatnonzero(sides == "train").tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draws": 3, "draw": 3}, "there is no draw 3: 3 draws are 0 to 2"),
        ({"draws": 3, "draw": -1}, "there is no draw -1: 3 draws are 0 to 2"),
        ({"draw": 1}, "there is no draw 1: pass draws, too"),
        ({"draws": 2, "fraction": 0.5}, "draws and fraction both cut the training part"),
        ({"draws": 2, "val_per_class": 99}, r"class 'a' has 0 separate images to train on; .* \(got 2\)"),
        ({"draws": 40, "val_per_class": 2}, r"class 'b' has 22 separate images to train on; .* \(got 40\)"),
    ],
)
def test_draws_that_do_not_exist_are_refused(options, message):
    labels = np.repeat([0, 1], [60, 30])
    with pytest.raises(ValueError, match=message):
        split(labels, np.arange(90).astype(str), classes=["a", "b"], **options)
