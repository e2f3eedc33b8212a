"""Precision and recall of the rule for near duplicates on generated copies and on known pairs; its time and memory.

    python tests/benchmarks/duplicates.py copies SET[=ROOT] ... [--images 10000] [--out results/audits/near_duplicates.csv]
    python tests/benchmarks/duplicates.py pairs SET[=ROOT] PAIRS.csv [--out results/audits/known_duplicates.csv]
    python tests/benchmarks/duplicates.py scale SET[=ROOT] ... [--out results/audits/near_duplicates_scale.csv]

`copies` adds up to 100 copies of each kind to a set, of one image each, and looks for duplicates among all. Recall: copies
found with their original. Precision: of the pairs with a copy of this kind, those whose other image is the original or, without
copies, in its group. `pairs` counts the pairs among the set's own images, `two_labels` those of them with two labels.
`pairs` looks for known pairs (columns a, b and kind) in the whole set. `scale` repeats the sets' images, each time cropped,
turned and mixed anew, up to 25, 50, 100 and 200 thousand: nearly all are unrelated.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, ImageEnhance, ImageFont

from hdkd_lib.data.cache import Signatures, decode, to_rgb
from hdkd_lib.data.leakage import duplicate_groups, near_duplicates
from hdkd_lib.data.sources import Source, open_source

RESULTS = Path(__file__).parents[2] / "results" / "audits"
EACH = 100  # copies of one kind
SIZES = 25_000, 50_000, 100_000, 200_000


def cropped(image: Image.Image, share: float, random: np.random.Generator) -> Image.Image:
    """Without `share` of the width and of the height, at random sides."""
    width, height = (max(1, round(share * side)) for side in image.size)
    left, top = random.integers(0, width + 1), random.integers(0, height + 1)
    return image.crop((left, top, image.width - width + left, image.height - height + top))


def overlaid(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """With a line of white text, a twelfth of the height, at a random place of the upper or lower edge."""
    image, size = image.copy(), max(6, image.height // 12)
    y = random.choice([size // 3, image.height - 2 * size])
    x = random.integers(0, max(1, image.width // 3))
    ImageDraw.Draw(image).text((x, y), f"ID {random.integers(1000, 9999)}", (255, 255, 255), ImageFont.load_default(size))
    return image


CHANGES: dict[str, Callable] = {
    "JPEG, quality 90": lambda image, random: image,
    "JPEG, quality 60": lambda image, random: image,
    "JPEG, quality 30": lambda image, random: image,
    "resized by 0.7": lambda image, random: image.resize(
        [max(1, round(0.7 * s)) for s in image.size], Image.Resampling.BICUBIC
    ),
    "cropped by 5 %": lambda image, random: cropped(image, 0.05, random),
    "cropped by 10 %": lambda image, random: cropped(image, 0.1, random),
    "brighter by 30 %": lambda image, random: ImageEnhance.Brightness(image).enhance(1.3),
    "darker by 30 %": lambda image, random: ImageEnhance.Brightness(image).enhance(0.7),
    "mirrored": lambda image, random: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "turned by 90 degrees": lambda image, random: image.transpose(Image.Transpose.ROTATE_90),
    "text overlaid": overlaid,
}


def with_copies(source: Source, folder: Path, each: int = EACH) -> tuple[Source, pd.DataFrame]:
    """The set with copies of each kind, written into `folder`, and `copy`, `original` (image numbers) and `change` of each."""
    random, count = np.random.default_rng(0), len(source.ids)
    each = min(each, count // (2 * len(CHANGES)))
    originals = random.permutation(count)[: each * len(CHANGES)]
    paths = list(source.images)
    if isinstance(source.images, np.ndarray):
        paths = [folder / f"{i}.png" for i in range(count)]
        for path, pixels in zip(paths, source.images, strict=True):
            Image.fromarray(pixels).save(path)
    rows = []
    for original, change in zip(originals, np.repeat(list(CHANGES), each), strict=True):
        with Image.open(paths[original]) as opened:
            copy = CHANGES[change](to_rgb(opened), random)
        quality = int(change.split()[-1]) if change.startswith("JPEG") else None
        path = folder / f"copy-{original}.{'jpg' if quality else 'png'}"
        copy.save(path, **({"quality": quality} if quality else {}))
        rows.append({"copy": len(paths), "original": original, "change": change})
        paths.append(path)
    ids, labels = [str(i) for i in range(len(paths))], np.concatenate([source.labels, source.labels[originals]])
    return Source(source.name, source.classes, paths, ids, labels), pd.DataFrame(rows)


def copies(source: Source, each: int = EACH) -> pd.DataFrame:
    """One row per change: copies, found, recall, pairs_with_a_copy, precision; see above."""
    with tempfile.TemporaryDirectory() as folder:
        planted, rows = with_copies(source, Path(folder), each)
        _, _, signatures = decode(planted, 8)
        near, count = near_duplicates(signatures), len(source.ids)
    own = Signatures(signatures.hashes[:count], signatures.thumbnails[:count], signatures.sizes[:count])
    own_near = near_duplicates(own)
    group, _ = duplicate_groups(own, own_near)
    # Equal pixels count as found: a copy at quality 90 of a flat image may be the image itself.
    of = np.concatenate([group, group[rows.original]])
    pixels = signatures.hashes
    equal = pixels[rows["copy"]] == pixels[rows.original]
    pairs = near[(near.a >= count) | (near.b >= count)].assign(is_right=lambda t: of[t.a] == of[t.b])
    found = {frozenset(pair) for pair in zip(pixels[pairs.a], pixels[pairs.b], strict=True)}
    wanted = zip(pixels[rows.original], pixels[rows["copy"]], strict=True)
    rows["found"] = equal | np.array([frozenset(pair) in found for pair in wanted])
    by_change = rows.set_index("copy").change
    ends = pd.concat([pairs.assign(change=pairs[side].map(by_change)) for side in "ab"]).dropna(subset="change")
    table = rows.groupby("change", sort=False).found.agg(copies="size", found="sum", recall="mean")
    table = table.join(ends.groupby("change").is_right.agg(pairs_with_a_copy="size", precision="mean"))
    labels = source.labels
    two = (labels[own_near.a] != labels[own_near.b]).sum()
    return table.reset_index().assign(images=count, pairs=len(own_near), two_labels=two)


def opened(name: str) -> tuple[str, Source]:
    """SET or SET=ROOT: a short name and the source without copies of equal pixels left out."""
    dataset, _, root = name.partition("=")
    source = open_source(dataset, Path(root) if root else None)
    return (Path(root).name if dataset == "folder" else dataset), source


def measure_copies(options: argparse.Namespace) -> None:
    """Adds the sets' rows to the table, in place of earlier ones."""
    for name in options.sets:
        title, source = opened(name)
        if len(source.ids) > options.images:
            source = source.take(np.sort(np.random.default_rng(0).permutation(len(source.ids))[: options.images]))
        table = copies(replace(source, parts=None, groups=None))
        table.insert(0, "set", title)
        if options.out.exists():
            earlier = pd.read_csv(options.out)
            table = pd.concat([earlier[earlier.set != title], table])
        table.round(3).sort_values("set", kind="stable").to_csv(options.out, index=False)
        print(table[table.set == title].to_string(), flush=True)


def measure_pairs(options: argparse.Namespace) -> None:
    """Recall on known pairs of one set: a pair counts as found if both images are in one group."""
    title, source = opened(options.set)
    _, _, signatures = decode(source, 32)
    near = near_duplicates(signatures)
    group, _ = duplicate_groups(signatures, near)
    number = {name: i for i, name in enumerate(source.ids)}
    known = pd.read_csv(options.pairs, dtype=str)
    known["found"] = [group[number[a]] == group[number[b]] for a, b in zip(known.a, known.b, strict=True)]
    table = known.groupby("kind").found.agg(pairs="size", found="sum", recall="mean").reset_index()
    table.insert(0, "set", title)
    crossing = np.array([""] * len(group) if source.parts is None else source.parts)
    test = np.isin(group, group[crossing == "train"]) & (crossing == "test")
    two = int((source.labels[near.a] != source.labels[near.b]).sum())
    table = table.assign(near_pairs=len(near), near_pairs_with_two_labels=two, test_images_found=int(test.sum()))
    table.round(3).to_csv(options.out, index=False)
    print(table.to_string())


def measure_scale(options: argparse.Namespace) -> None:
    """Seconds (of the processor and on the clock) and peak memory by the number of images, each in a process of its own."""
    if options.count:
        thumbnails = np.load(options.sets[0], mmap_mode="r")[: options.count]
        hashes = np.array([f"{h:016x}" for h in np.random.default_rng(0).permutation(len(thumbnails))])
        signatures = Signatures(hashes, thumbnails, np.full((len(thumbnails), 2), 64))
        before, start, clock = peak_mib(), time.process_time(), time.perf_counter()
        pairs = len(near_duplicates(signatures))
        row = {"images": options.count, "cpu_seconds": time.process_time() - start, "seconds": time.perf_counter() - clock}
        row |= {"peak_mib": peak_mib(), "before_mib": before}
        table = pd.DataFrame([row | {"pairs": pairs}])
        if options.out.exists():
            table = pd.concat([pd.read_csv(options.out), table]).drop_duplicates("images", keep="last")
        table.round(1).to_csv(options.out, index=False)
        print(row, flush=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        np.save(made := Path(folder) / "made.npy", unrelated([opened(name)[1] for name in options.sets], SIZES[-1]))
        for count in SIZES:
            subprocess.run([sys.executable, __file__, "scale", made, "--count", str(count), "--out", options.out], check=True)


def peak_mib() -> float:
    """Of this process (Linux); getrusage would count its parent's."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 2**10


def unrelated(sources: list[Source], count: int) -> np.ndarray:
    """Thumbnails of `count` images: each set's, then means of two of them, each cropped by a third and turned at random."""
    thumbnails = np.concatenate([decode(source, 64)[2].thumbnails for source in sources])
    random = np.random.default_rng(0)
    made = [thumbnails[random.permutation(len(thumbnails))[:count]]]
    for _ in range(count - len(made[0])):
        two = []
        for i in random.integers(0, len(thumbnails), 2):
            y, x = random.integers(0, 22, 2)
            crop = Image.fromarray(np.rot90(thumbnails[i], random.integers(4)).copy()[y : y + 43, x : x + 43])
            two.append(np.asarray(crop.resize((64, 64), Image.Resampling.BILINEAR), np.float32))
        made.append((sum(two) / 2).astype(np.uint8)[None])
    return np.concatenate(made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, function, out in (
        ("copies", measure_copies, "near_duplicates.csv"),
        ("pairs", measure_pairs, "known_duplicates.csv"),
        ("scale", measure_scale, "near_duplicates_scale.csv"),
    ):
        command = commands.add_parser(name)
        command.set_defaults(run=function)
        command.add_argument("--out", type=Path, default=RESULTS / out)
        if name == "pairs":
            command.add_argument("set")
            command.add_argument("pairs", type=Path)
        else:
            command.add_argument("sets", nargs="+")
        if name == "copies":
            command.add_argument("--images", type=int, default=10_000)
        if name == "scale":
            command.add_argument("--count", type=int)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault("HDKD_CACHE", cache)
        options.run(options)


if __name__ == "__main__":
    main()
