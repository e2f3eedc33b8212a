import hashlib
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from hdkd_lib.data import leakage
from hdkd_lib.data.cache import Signatures, decode
from hdkd_lib.data.leakage import audit, duplicate_groups, leakage_gain, main, near_duplicates
from hdkd_lib.data.sources import Source, open_source
from hdkd_lib.data.splits import FOLDS, split

COLUMNS = ["a", "b", "match", "distance", "ratio", "orientation", "label_a", "label_b", "part_a", "part_b"]


def smooth(seed: int, size: tuple[int, int] = (96, 80)) -> Image.Image:
    """A picture of soft colours between 40 and 215, another for each seed."""
    noise = np.random.default_rng(seed).integers(40, 216, (7, 9, 3), dtype=np.uint8)
    return Image.fromarray(np.asarray(Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)).clip(40, 215))


def encoded_again(picture: Image.Image, path: Path) -> None:
    picture.save(path.with_suffix(".jpg"), quality=60)


def resized(picture: Image.Image, path: Path) -> None:
    picture.resize((61, 47), Image.Resampling.BICUBIC).save(path)


def brighter(picture: Image.Image, path: Path) -> None:
    Image.fromarray(np.asarray(picture) + np.uint8(40)).save(path)


def with_more_contrast(picture: Image.Image, path: Path) -> None:
    Image.fromarray((np.asarray(picture) * 0.6).astype(np.uint8)).save(path)


def sign(*images: Image.Image | Path, tmp_path: Path) -> Signatures:
    paths = []
    for i, image in enumerate(images):
        paths.append(image if isinstance(image, Path) else tmp_path / f"written-{i}.png")
        if not isinstance(image, Path):
            image.save(paths[-1])
    return decode(Source("test", ["x"], paths, [str(i) for i in range(len(paths))], np.zeros(len(paths), int)), 8)[2]


def random_signatures(count: int, distinct: int | None = None, seed: int = 0) -> Signatures:
    """Signatures of pictures that have nothing in common, except that only `distinct` of them differ."""
    rng = np.random.default_rng(seed)
    chosen = np.arange(count) % (distinct or count)
    coarse = rng.integers(0, 256, (count, 8, 8), dtype=np.uint8)[chosen]
    hashes = np.array([f"{i:016x}" for i in rng.permutation(count)])[chosen]
    return Signatures(hashes, coarse.repeat(4, 1).repeat(4, 2), np.full((count, 2), 32))


def strokes(count: int, seed: int = 0) -> np.ndarray:
    """Thumbnails of thick white lines on black, of any place, angle and length: all alike, as handwritten ones are."""
    rng, pictures = np.random.default_rng(seed), []
    for _ in range(count):
        picture = Image.new("L", (128, 128))
        x, y, angle, length = rng.uniform((52, 52, -0.7, 30), (76, 76, 0.7, 45))
        dx, dy = length * np.sin(angle), length * np.cos(angle)
        ImageDraw.Draw(picture).line((x - dx, y - dy, x + dx, y + dy), 255, int(rng.integers(10, 20)))
        pictures.append(np.asarray(picture.resize((32, 32), Image.Resampling.BOX)))
    return np.array(pictures)


# --- what is found ---


@pytest.mark.parametrize("change", [encoded_again, resized, brighter, with_more_contrast])
def test_a_changed_copy_is_a_near_duplicate(tmp_path, cache, change):
    for i in range(12):
        change(smooth(i), tmp_path / f"copy-{i:02d}.png")
    copies = sorted(tmp_path.glob("copy-*"))
    near = near_duplicates(sign(*map(smooth, range(12)), *copies, tmp_path=tmp_path))
    assert list(zip(near.a, near.b, strict=True)) == [(i, 12 + i) for i in range(12)]
    assert (near.ratio < 0.1).all()


def test_independent_pictures_are_no_duplicates(tmp_path, cache):
    found = audit(sign(*map(smooth, range(60)), tmp_path=tmp_path), [str(i) for i in range(60)], np.zeros(60, int), ["x"])
    assert found.pairs.empty
    assert len(set(found.duplicate_groups)) == 60
    assert found.summary == {
        "images": 60, "exact_copies": 0, "near_duplicate_pairs": 0, "distinct_images": 60, "duplicates_with_two_labels": 0,
    }  # fmt: skip


@pytest.mark.parametrize("orientation", list(Image.Transpose))
def test_mirrored_and_turned_copies_are_found_with_their_orientation(tmp_path, cache, orientation):
    signatures = sign(*map(smooth, range(12)), *(smooth(i).transpose(orientation) for i in range(3)), tmp_path=tmp_path)
    near = near_duplicates(signatures)
    assert near[["a", "b"]].to_numpy().tolist() == [[0, 12], [1, 13], [2, 14]]
    assert set(near.orientation) == {orientation.name.lower()}


def test_a_copy_with_text_on_it_is_found(tmp_path, cache):
    copies = [smooth(i).convert("L") for i in range(3)]
    for copy in copies:
        ImageDraw.Draw(copy).text((20, 4), "ID 1234", 255, ImageFont.load_default(8))
    near = near_duplicates(sign(*map(smooth, range(40)), *copies, tmp_path=tmp_path))
    assert near[["a", "b"]].to_numpy().tolist() == [[0, 40], [1, 41], [2, 42]]


@pytest.mark.parametrize("box", [(0, 0, 90, 76), (5, 4, 96, 80), (10, 0, 96, 72)])
def test_a_cropped_copy_is_found(tmp_path, cache, box):
    signatures = sign(*map(smooth, range(40)), *(smooth(i).crop(box) for i in range(3)), tmp_path=tmp_path)
    assert near_duplicates(signatures)[["a", "b"]].to_numpy().tolist() == [[0, 40], [1, 41], [2, 42]]


def test_flat_pictures_are_like_nothing(tmp_path, cache):
    step = np.repeat(np.arange(2, dtype=np.uint8), 20)[None].repeat(40, 0)  # no more than this
    flat = [Image.fromarray(step + np.uint8(level)) for level in (0, 100, 101, 254)]
    assert near_duplicates(sign(*flat, *map(smooth, range(3)), tmp_path=tmp_path)).empty


def test_the_limit_adapts_to_the_set():
    """The same two strokes are unlike enough in a set of strokes, and duplicates among pictures of another kind."""
    rng, lines = np.random.default_rng(0), strokes(2000)
    hashes = np.array([f"{i:016x}" for i in rng.permutation(2000)])
    near = near_duplicates(Signatures(hashes, lines, np.full((2000, 2), 32)))
    assert len(near) < 20
    others = random_signatures(2000)
    distance = leakage._aligned(*map(torch.tensor, (lines, [0] * 1999, list(range(1, 2000)), [0] * 1999)))
    others.thumbnails[:2] = lines[[0, 1 + int(distance.argmin())]]
    assert near_duplicates(others)[["a", "b"]].to_numpy().tolist() == [[0, 1]]
    assert len(near_duplicates(Signatures(hashes, np.concatenate([lines[:1990], lines[:10] // 2]), others.sizes))) >= 10


def test_neither_file_order_nor_blocks_decide(monkeypatch):
    signatures = random_signatures(50)
    for a, b in ((0, 49), (6, 7), (20, 22), (13, 14)):
        signatures.thumbnails[b] = signatures.thumbnails[a] // 2 + 20
    whole = near_duplicates(signatures)
    assert whole[["a", "b"]].to_numpy().tolist() == [[0, 49], [6, 7], [13, 14], [20, 22]]
    order = np.random.default_rng(1).permutation(50)
    shuffled = near_duplicates(Signatures(signatures.hashes[order], signatures.thumbnails[order], signatures.sizes))
    numbers = np.sort(order[shuffled[["a", "b"]].to_numpy()], axis=1)
    back = shuffled.assign(a=numbers[:, 0], b=numbers[:, 1]).sort_values(["a", "b"], ignore_index=True)
    pd.testing.assert_frame_equal(back, whole)
    monkeypatch.setattr(leakage, "_BLOCK", 7)
    pd.testing.assert_frame_equal(near_duplicates(signatures), whole)


def test_candidates_are_the_same_however_many_are_held_at_a_time(cache, monkeypatch):
    _, _, signatures = decode(open_source("digits"), 32)
    views = leakage._views(torch.from_numpy(signatures.thumbnails[:500]))
    lists, reference, *_ = leakage._references(views)
    whole = leakage._candidates(views, lists, reference)
    monkeypatch.setattr(leakage, "_PAIRS", 300)
    assert whole.shape[1] > 1000
    torch.testing.assert_close(leakage._candidates(views, lists, reference), whole, rtol=0, atol=0)


@given(st.lists(st.integers(0, 11), min_size=1, max_size=24), st.data())
def test_pictures_are_the_chains_of_equal_and_near_images(numbers, data):
    hashes = np.array([f"h{i}" for i in numbers])
    image = st.integers(0, len(hashes) - 1)
    near = pd.DataFrame(data.draw(st.lists(st.tuples(image, image), max_size=8)), columns=["a", "b"], dtype=int)
    linked = hashes[:, None] == hashes
    linked[near.a, near.b] = linked[near.b, near.a] = True
    for _ in range(6):  # the transitive closure, by squaring
        linked = linked @ linked
    found, is_joined = duplicate_groups(Signatures(hashes, *[None] * 2), near)
    assert is_joined.all()
    assert np.array_equal(found[:, None] == found, linked)


# --- what is counted ---


@pytest.fixture
def planted(tmp_path, cache) -> tuple[Signatures, dict]:
    """Pictures 0 to 5. Picture 0 is in train twice, in test (of another class) and in val, encoded again; 1 in test and val."""
    rows = [
        ("test/0", smooth(0), 1, "test"), ("train/0", smooth(0), 0, "train"), ("train/0 again", smooth(0), 0, "train"),
        ("val/0 near", None, 0, "val"), ("test/1", smooth(1), 1, "test"), ("val/1", smooth(1), 1, "val"),
        ("train/2", smooth(2), 0, "train"), ("train/3", smooth(3), 1, "train"), ("val/4", smooth(4), 0, "val"),
        ("test/5", smooth(5), 1, "test"),
    ]  # fmt: skip
    encoded_again(smooth(0), tmp_path / "near")
    ids, images, labels, parts = (list(column) for column in zip(*rows, strict=True))
    images[3] = tmp_path / "near.jpg"
    arguments = {"ids": ids, "labels": np.array(labels), "classes": ["cat", "dog"], "parts": parts}
    return sign(*images, tmp_path=tmp_path), arguments


def test_pairs_show_first_where_a_test_image_was_seen(planted):
    pairs = audit(planted[0], **planted[1]).pairs
    assert pairs.columns.tolist() == [*COLUMNS, "is_conflict", "is_crossing", "is_joined"]
    found = pairs.set_index(["a", "b"])
    assert sorted(found.index) == [
        ("train/0", "test/0"), ("train/0", "train/0 again"), ("train/0", "val/0 near"), ("val/1", "test/1"),
    ]  # fmt: skip
    leak = found.loc[("train/0", "test/0")]
    assert leak[["match", "distance", "ratio", "orientation"]].tolist() == ["exact", 0, 0, ""]
    assert leak[["label_a", "label_b", "part_a", "part_b"]].tolist() == ["cat", "dog", "train", "test"]
    assert (leak.is_conflict, leak.is_crossing) == (True, True)
    assert found.loc[("train/0", "val/0 near"), "match"] == "near"
    assert not found.loc[("train/0", "train/0 again"), ["is_conflict", "is_crossing"]].any()
    assert found.loc[("val/1", "test/1"), ["is_conflict", "is_crossing"]].tolist() == [False, True]


def test_the_summary_counts_images_and_pictures(planted):
    found = audit(planted[0], **planted[1])
    assert found.summary == {
        "images": 10,
        "exact_copies": 3,
        "near_duplicate_pairs": 1,
        "distinct_images": 6,
        "duplicates_with_two_labels": 1,
        "val_images": 3,
        "val_images_with_exact_duplicate_in_train": 0,
        "val_images_with_exact_or_near_duplicate_in_train": 1,
        "test_images": 3,
        "test_images_with_exact_duplicate_in_train": 1,
        "test_images_with_exact_or_near_duplicate_in_train": 1,
        "test_images_with_exact_duplicate_in_val": 1,
        "test_images_with_exact_or_near_duplicate_in_val": 2,
    }
    assert len(set(found.duplicate_groups[[0, 1, 2, 3]])) == len(set(found.duplicate_groups[[4, 5]])) == 1
    without = audit(planted[0], **planted[1] | {"parts": None})
    assert without.summary == dict(list(found.summary.items())[:5])
    assert not without.pairs.is_crossing.any()
    assert np.array_equal(without.duplicate_groups, found.duplicate_groups)


def chained(count: int, size: int) -> tuple[Signatures, pd.DataFrame]:
    """Pictures of which the first `size` are each a near duplicate of the next."""
    near = pd.DataFrame({"a": range(size - 1), "b": range(1, size), "distance": 0.1, "ratio": 0.2, "orientation": ""})
    return random_signatures(count), near


def test_a_chain_of_near_duplicates_is_one_picture(monkeypatch):
    signatures, near = chained(100, 4)
    monkeypatch.setattr(leakage, "near_duplicates", lambda _: near)
    found = audit(signatures, [str(i) for i in range(100)], np.zeros(100, int), ["x"])
    assert len(set(found.duplicate_groups[:4])) == 1
    assert found.summary["distinct_images"] == 97
    assert found.pairs.is_joined.all()


def test_a_chain_of_more_than_a_tenth_of_a_class_is_reported_and_joined_only_if_asked(monkeypatch):
    labels, ids = np.arange(300) // 150, [str(i) for i in range(300)]  # a tenth of a class is 15
    for size, is_long in ((15, False), (16, True)):
        signatures, near = chained(300, size)
        near.loc[len(near)] = [200, 201, 0.1, 0.2, ""]  # another pair stays
        monkeypatch.setattr(leakage, "near_duplicates", lambda _, near=near: near)
        arguments = (signatures, ids, labels, ["x", "y"])
        if is_long:
            with pytest.warns(UserWarning, match=r"^16 images form chains .* more than 10% of a class.*join_chains=True$"):
                found = audit(*arguments)
        else:
            found = audit(*arguments)
        assert found.summary["distinct_images"] == (299 if is_long else 300 - size)
        assert found.summary.get("images_in_chains_not_joined") == (16 if is_long else None)
        assert found.pairs.is_joined.tolist() == [not is_long] * (size - 1) + [True]
        joined = audit(*arguments, join_chains=True)
        assert joined.summary["distinct_images"] == 300 - size
        assert joined.pairs.is_joined.all()


def test_a_small_class_keeps_its_duplicates_together(monkeypatch):
    signatures, near = chained(20, 4)  # 4 of 20 is more than a tenth
    monkeypatch.setattr(leakage, "near_duplicates", lambda _: near)
    assert audit(signatures, [str(i) for i in range(20)], np.zeros(20, int), ["x"]).summary["distinct_images"] == 17


def test_three_thousand_images_are_audited_in_seconds():
    signatures, start = random_signatures(3000, distinct=2900), time.perf_counter()
    found = audit(signatures, [str(i) for i in range(3000)], np.zeros(3000, int), ["x"])
    assert time.perf_counter() - start < 10
    assert (found.summary["exact_copies"], found.summary["near_duplicate_pairs"]) == (100, 0)
    assert found.summary["distinct_images"] == 2900


# --- what it is worth ---


def test_duplicates_alone_lift_a_random_split_and_without_them_there_is_no_difference():
    for distinct in (90, 360):
        signatures = random_signatures(360, distinct)
        labels = np.random.default_rng(1).integers(0, 2, distinct)[np.arange(360) % distinct]  # nothing to be learned
        splits = {p: [split(labels, signatures.hashes, protocol=p, fold=f) for f in range(3)] for p in ("random", "grouped")}
        scores = leakage_gain(signatures, labels, splits)
        assert len(scores) == 2 * 3 * 2
        assert sorted(scores.fold.unique()) == [0, 1, 2]
        mean = scores.pivot_table("balanced_accuracy", "classifier", "protocol")
        if distinct == 360:
            assert (mean.random == mean.grouped).all()
        else:
            assert mean.random["nearest neighbour"] > 0.95
            assert (mean.grouped < 0.65).all()
            assert mean.random["logistic regression"] > mean.grouped["logistic regression"] + 0.1


def test_leakage_gain_measures_the_test_part_by_all_that_is_not_test():
    signatures = random_signatures(6, distinct=3)
    labels = np.array([0, 1, 0, 0, 1, 0])
    fold = {"train": np.array([0]), "val": np.array([1]), "test": np.array([3, 4])}
    scores = leakage_gain(signatures, labels, {"p": [fold]}).set_index("classifier").balanced_accuracy
    assert scores["nearest neighbour"] == 1, "one twin is in train, the other in val"


# --- the command line ---


@pytest.fixture
def leaky(image_folder) -> Path:
    return image_folder(*(f"data/{part}/{c}/{i}.png" for part in ("train", "test") for c in "ab" for i in range(3)))


def test_the_command_line_counts_pictures_that_cross_the_parts(leaky, cache, capsys):
    out = leaky / "pairs.csv"
    assert main([str(leaky / "data"), "--out", str(out)]) == 0
    assert pd.read_csv(out).empty
    (leaky / "data/test/b/0.png").write_bytes((leaky / "data/train/b/1.png").read_bytes())
    (leaky / "data/test/b/bad.png").write_text("no image")
    capsys.readouterr()
    assert main([str(leaky / "data"), "--out", str(out)]) == 1
    printed = capsys.readouterr().out.split("\n")
    for line in ("images: 12", "exact copies: 1", "test images with exact duplicate in train: 1", "corrupt files: 1"):
        assert line in printed
    assert f"1 pairs in {out}" in printed
    pairs = pd.read_csv(out)
    assert pairs[["a", "b", "match", "is_crossing"]].to_numpy().tolist() == [["train/b/1.png", "test/b/0.png", "exact", True]]


def test_the_command_line_finds_nothing_crossing_within_one_part(leaky, cache):
    (leaky / "data/train/a/0.png").write_bytes((leaky / "data/train/b/1.png").read_bytes())
    assert main([str(leaky / "data"), "--out", str(leaky / "pairs.csv")]) == 0
    assert pd.read_csv(leaky / "pairs.csv").is_conflict.tolist() == [True]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["data/nowhere"], "no data folder at"), (["data", "--dataset", "ham1000"], "did you mean 'ham10000'?"),
     (["data", "--out", "no/such/folder.csv"], "no/such")],
)  # fmt: skip
def test_what_the_command_line_cannot_read_is_said_in_a_sentence(leaky, cache, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(leaky)
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""


# --- precision and recall on generated copies ---

FOUND = ("JPEG, quality 90", "JPEG, quality 60", "darker by 30 %", "mirrored", "turned by 90 degrees")
FOUND += ("JPEG, quality 30", "resized by 0.7", "cropped by 5 %", "brighter by 30 %")
PHOTOGRAPHS = (*FOUND, "cropped by 10 %")


def measured(source: Source, each: int, monkeypatch: pytest.MonkeyPatch) -> pd.DataFrame:
    """What the benchmark says of a set, by change."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import duplicates

    return duplicates.copies(source, each).set_index("change")


def test_copies_of_digits_are_found_and_no_other_digits(cache, monkeypatch):
    table = measured(open_source("digits"), 10, monkeypatch)
    assert (table.recall[["JPEG, quality 90", "darker by 30 %", "mirrored", "turned by 90 degrees"]] == 1).all()
    assert (table.precision.dropna() == 1).all()
    assert table.pairs.iloc[0] <= 2, "of 1,797 digits, which are all alike"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes"), [("brain_tumor", FOUND), ("imagenette", (*PHOTOGRAPHS, "text overlaid")), ("cifar10", PHOTOGRAPHS)]
)
def test_copies_of_real_images_are_found_and_no_others(real, monkeypatch, name, changes):
    source = real(name, protocol="official").source
    chosen = np.sort(np.random.default_rng(0).permutation(len(source.ids))[:1500])
    table = measured(source.take(chosen), 25, monkeypatch)
    assert (table.recall[list(changes)] >= 0.9).all()
    assert (table.precision.dropna() >= 0.9).all()


@pytest.mark.slow
def test_most_of_cifar10s_published_near_duplicates_are_found(real):
    data = real("cifar10", protocol="official")
    known = pd.read_csv(Path(__file__).parents[2] / "results/audits/cifar10/cifair_pairs.csv")
    near = known[known.kind.str.startswith("near-duplicate")]
    group = dict(zip(data.source.ids, data.audit.duplicate_groups, strict=True))
    assert np.mean([group[a] == group[b] for a, b in zip(near.a, near.b, strict=True)]) >= 0.8
    assert 300 <= data.audit.summary["test_images_with_exact_or_near_duplicate_in_train"] <= 600
    assert data.audit.pairs.is_conflict.mean() < 0.01, "unrelated images would mostly have two labels"


# --- the real data sets, where HDKD_DATA holds them ---


def pixel_hashes(paths: list[Path]) -> np.ndarray:
    """By PIL alone."""

    def one(path: Path) -> str:
        image = Image.open(path).convert("RGB")
        return hashlib.sha1(repr(image.size).encode() + image.tobytes()).hexdigest()

    with ThreadPoolExecutor() as pool:
        return np.array(list(pool.map(one, paths)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["brain_tumor", "ham10000"])
def test_no_picture_and_no_lesion_crosses_a_fold_of_real_data(real, name):
    data = real(name)
    values = [pixel_hashes(data.source.images), data.audit.duplicate_groups]
    values += [np.array(data.source.groups)] if data.source.groups else []
    tested = []
    for fold in range(FOLDS):
        parts = data.split("grouped", fold)
        tested.extend(parts["test"])
        for value in values:
            sides = [set(value[index]) for index in parts.values()]
            assert sum(map(len, sides)) == len(set.union(*sides))
    assert sorted(tested) == list(range(len(data.source.ids)))


def test_the_brain_tumour_sets_published_test_images_were_mostly_seen_in_training(real):
    data = real("brain_tumor")
    published, summary = np.array(data.source.parts), data.audit.summary
    hashes = pixel_hashes(data.source.images)
    seen = np.isin(hashes[published == "test"], hashes[published == "train"]).sum()
    assert summary["test_images_with_exact_duplicate_in_train"] == seen == 251
    assert summary["test_images"] == 394
    assert summary["test_images_with_exact_or_near_duplicate_in_train"] >= 259
    assert summary["duplicates_with_two_labels"] >= 2
    pairs = data.audit.pairs
    assert {"Testing/glioma_tumor/image(2).jpg", "Testing/glioma_tumor/image(48).jpg"} <= set(pairs[pairs.is_conflict].b)


def test_one_picture_of_ham10000_under_two_lesions_ends_in_one_group(real):
    data = real("ham10000")
    twins = [data.source.ids.index(i) for i in ("ISIC_0025226", "ISIC_0030074")]
    assert data.source.groups[twins[0]] == data.source.groups[twins[1]], "a known link of two lesions"
    pairs = data.audit.pairs
    assert ((pairs.a == "ISIC_0025226") & (pairs.b == "ISIC_0030074")).sum() == 1
    assert data.audit.duplicate_groups[twins[0]] == data.audit.duplicate_groups[twins[1]]
    assert data.card["groups"] <= 7470 - 18


@pytest.mark.slow
def test_the_command_starts_without_a_warning(tmp_path):
    answer = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-m", "hdkd_lib.data.leakage", str(tmp_path / "nowhere")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert answer.returncode == 2
    assert re.fullmatch(r"no data folder at .*nowhere; correct root= or the variable HDKD_DATA\n", answer.stderr)
