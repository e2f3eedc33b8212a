"""Images decoded once: uint8 of one size in a memory-mapped file, and signatures by which duplicates are found."""

import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from hdkd_lib.data.files import built_aside, cache_dir
from hdkd_lib.data.sources import Source

_VERSION = 3  # raise when decoding, resizing or a signature changes
_CHUNK = 256  # images in memory at a time while a cache is built


@dataclass(frozen=True)
class Signatures:
    """What is known of N original images, before they are resized.

    Attributes:
        hashes: (N,) text, equal where the decoded RGB pixels are equal.
        thumbnails: (N, 32, 32) uint8, grey.
        sizes: (N, 2) width and height in pixels.
        folder: where the cache keeps them and what is computed from them (`remembered`), or None.
    """

    hashes: np.ndarray
    thumbnails: np.ndarray
    sizes: np.ndarray
    folder: Path | None = None

    def __len__(self) -> int:
        return len(self.hashes)


def decode(source: Source, image_size: int, *, on_corrupt: str = "raise") -> tuple[Source, np.ndarray, Signatures]:
    """All images as RGB of image_size x image_size (bilinear, aspect not kept), decoded once, cached by the files' content.

    Args:
        on_corrupt: "raise", or "skip" images that cannot be decoded; the card then counts them (`corrupt_files`).

    Returns:
        The source without the images that were skipped; a memory-mapped uint8 array (N, 3, S, S); N signatures.

    Raises:
        ValueError: files that cannot be decoded, all of them named.
        OSError: the cache's disk is full; no cache is left.
    """
    if on_corrupt not in ("raise", "skip"):
        raise ValueError(f"on_corrupt must be 'raise' or 'skip' (got {on_corrupt!r})")
    folder = cache_dir() / f"{source.name}-{image_size}-{_content(source)}"
    if not folder.exists():
        needed = len(source.ids) * 3 * image_size**2 / 2**20
        with built_aside(folder, f"write the image cache, which needs {needed:.0f} MiB,") as aside:
            broken = _build(source, image_size, aside)
            if broken and on_corrupt == "raise":
                raise _corrupt(source, broken)
    broken = {int(i): reason for i, reason in json.loads((folder / "broken.json").read_text()).items()}
    if broken and on_corrupt == "raise":
        raise _corrupt(source, broken)
    if broken:
        source = source.take(np.setdiff1d(np.arange(len(source.ids)), list(broken)))
        source = replace(source, card=source.card | {"corrupt_files": len(broken)})
    with np.load(folder / "signatures.npz") as stored:
        signatures = Signatures(**stored, folder=folder)
    shape = (len(signatures), 3, image_size, image_size)
    return source, np.memmap(folder / "images.uint8", np.uint8, "c", shape=shape), signatures


def remembered(folder: Path | None, name: str, compute: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays that `compute` gives, from `folder`/NAME.npz if they were computed before; a folder of None keeps nothing.

    Raises:
        OSError: the cache's disk is full or read-only.
    """
    if folder is None:
        return compute()
    file = folder / f"{name}.npz"
    if not file.exists():
        arrays = compute()
        aside = file.with_name(f".{name}.{os.getpid()}.npz")
        try:
            np.savez(aside, **arrays)
            aside.replace(file)
        except OSError as error:
            aside.unlink(missing_ok=True)
            raise OSError(f"cannot write {file}: {error}; free some space or set HDKD_CACHE to another disk") from error
        return arrays
    with np.load(file) as stored:
        return dict(stored)


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright, three channels of 8 bits; 16-bit images are divided by 256 and transparency is dropped.

    Integers of 32 bits count as 16-bit values unless none is above 255.

    Raises:
        ValueError: the pixels are floating-point numbers, whose range nobody knows.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels; convert them to 8 or 16 bits")
    if image.mode.startswith("I"):  # 16 bits ("I;16", or "I" from a PGM), which PIL would clip to 255
        pixels = np.asarray(image)
        shift = 8 if image.mode != "I" or pixels.max() > 255 else 0
        image = Image.fromarray((pixels >> shift).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def _corrupt(source: Source, broken: dict[int, str]) -> ValueError:
    lines = "\n".join(f"{source.ids[i]} ({reason})" for i, reason in broken.items())
    return ValueError(
        f"{len(broken)} of {len(source.ids)} images cannot be decoded; replace or remove them, "
        f"or pass on_corrupt='skip':\n{lines}"
    )


def _content(source: Source) -> str:
    """A hash of what is in the files, in order: copies in another place share a cache, a changed byte makes another."""
    total = hashlib.sha256(str(_VERSION).encode())
    if isinstance(source.images, np.ndarray):
        total.update(str(source.images.shape).encode())
        total.update(np.ascontiguousarray(source.images))
    else:
        for path in source.images:  # threads would be slower: most files are small, and the interpreter's lock is passed on
            with open(path, "rb", buffering=0) as file:
                total.update(hashlib.sha1(file.readall()).digest())
    return total.hexdigest()[:16]


def _build(source: Source, image_size: int, folder: Path) -> dict[int, str]:
    """Fills `folder`; the numbers of the images that cannot be decoded, and why."""

    def one(i: int):
        image = source.images[i]
        try:
            with Image.fromarray(image) if isinstance(image, np.ndarray) else Image.open(image) as opened:
                rgb = to_rgb(opened)
        except Exception as error:  # PIL raises many kinds for a broken file
            return str(error).replace(f" {str(image)!r}", "")  # the id names it already
        return (
            np.asarray(rgb.resize((image_size, image_size), Image.Resampling.BILINEAR)).transpose(2, 0, 1),
            hashlib.sha1(str(rgb.size).encode() + rgb.tobytes()).hexdigest()[:16],
            np.asarray(rgb.convert("L").resize((32, 32), Image.Resampling.BOX)),
            rgb.size,
        )

    broken, signatures = {}, []
    # Written piece by piece: a memory map that meets a full disk would end the process with SIGBUS, a write says so.
    with ThreadPoolExecutor() as pool, (folder / "images.uint8").open("wb") as file:
        for start in range(0, len(source.ids), _CHUNK):
            numbers = range(start, min(start + _CHUNK, len(source.ids)))
            for i, answer in zip(numbers, pool.map(one, numbers), strict=True):
                if isinstance(answer, str):
                    broken[i] = answer
                else:
                    file.write(np.ascontiguousarray(answer[0]))
                    signatures.append(answer[1:])
        file.flush()
        os.fsync(file.fileno())
    if not signatures:
        raise _corrupt(source, broken)
    columns = [np.array(column) for column in zip(*signatures, strict=True)]
    names = ("hashes", "thumbnails", "sizes")
    np.savez(folder / "signatures.npz", **dict(zip(names, columns, strict=True)))
    (folder / "broken.json").write_text(json.dumps(broken))
    return broken
