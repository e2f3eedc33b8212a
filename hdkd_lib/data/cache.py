"""Images decoded once: uint8 of one size in a memory-mapped file, and signatures by which duplicates are found."""

import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from hdkd_lib.data.files import DAMAGE, building_prefix, built_aside, cache_dir, remove_abandoned
from hdkd_lib.data.sources import Source

_VERSION = 4  # raise when decoding, resizing or a signature changes
_CHUNK = 256  # images in memory at a time while a cache is built
_CHECKED = 2**30  # bytes of images whose checksum is compared at each reading, about a second; of more only the size
_UNREADABLE = (
    *DAMAGE,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    OSError,
)  # of damaged JSON or arrays


@dataclass(frozen=True)
class Signatures:
    """What is known of N original images, before they are resized.

    Attributes:
        hashes: (N,) text, equal where the decoded RGB pixels are equal.
        thumbnails: (N, 64, 64) uint8, grey.
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
    for place in (cache_dir(), folder):
        remove_abandoned(place)
    if (stored := _read(folder, image_size)) is None:
        needed = len(source.ids) * 3 * image_size**2 / 2**20
        with built_aside(folder, f"write the image cache, which needs {needed:.0f} MiB,") as aside:
            broken = _build(source, image_size, aside)
            if broken and on_corrupt == "raise":
                raise _corrupt(source, broken)
        stored = _read(folder, image_size)
    broken, images, signatures = stored
    if broken and on_corrupt == "raise":
        raise _corrupt(source, broken)
    if broken:
        source = source.take(np.setdiff1d(np.arange(len(source.ids)), list(broken)))
        source = replace(source, card=source.card | {"corrupt_files": len(broken)})
    return source, images, signatures


def _read(folder: Path, image_size: int) -> tuple[dict[int, str], np.ndarray, Signatures] | None:
    """What the cache holds: the images that cannot be decoded, the others, and their signatures. None if it is not there; a
    damaged one is removed."""
    if not folder.exists():
        return None
    try:
        broken = {int(i): reason for i, reason in json.loads((folder / "broken.json").read_text()).items()}
        with np.load(folder / "signatures.npz") as stored:  # a zip, which has checksums of its own
            signatures = Signatures(**stored, folder=folder)
        file, shape = folder / "images.uint8", (len(signatures), 3, image_size, image_size)
        if (size := file.stat().st_size) != np.prod(shape):
            raise ValueError(f"{file.name} has {size} bytes and should have {np.prod(shape)}")
        checksum = folder / "images.crc32"  # older caches have none
        if size <= _CHECKED and checksum.exists() and checksum.read_text() != _checksum(file):
            raise ValueError(f"the checksum of {file.name} has changed")
        return broken, np.memmap(file, np.uint8, "c", shape=shape), signatures
    except _UNREADABLE as error:
        print(f"the image cache {folder} is damaged ({error}); it is built anew")
        with suppress(FileNotFoundError):  # another process removes it, too
            shutil.rmtree(folder.rename(tempfile.mkdtemp(dir=folder.parent, prefix=building_prefix())))
        return None


def _checksum(file: Path) -> str:
    total = 0
    with file.open("rb") as opened:
        while block := opened.read(2**22):
            total = zlib.crc32(block, total)
    return str(total)


def remembered(folder: Path | None, name: str, compute: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays that `compute` gives, from `folder`/NAME.npz if they were computed before; a folder of None keeps nothing.

    Raises:
        OSError: the cache's disk is full or read-only.
    """
    if folder is None:
        return compute()
    file = folder / f"{name}.npz"
    if file.exists():
        try:
            with np.load(file) as stored:
                return dict(stored)
        except _UNREADABLE as error:
            print(f"{file} is damaged ({error}); it is computed anew")
    arrays = compute()
    aside = folder / f"{building_prefix()}{name}.npz"
    try:
        np.savez(aside, **arrays)
        aside.replace(file)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise OSError(f"cannot write {file}: {error}; free some space or set HDKD_CACHE to another disk") from error
    return arrays


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright, three channels of 8 bits; 16-bit images are divided by 256 and transparency is dropped.

    Of a photograph with a preview in the same file (MPO) the photograph is taken.

    Integers of 32 bits count as 16-bit values unless none is above 255.

    Raises:
        ValueError: the pixels are floating-point numbers, whose range nobody knows, or the file holds several images.
    """
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise ValueError(f"{image.n_frames} images in one file; keep one in each")
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels; convert them to 8 or 16 bits")
    if image.mode.startswith("I"):  # 16 bits ("I;16", or "I" from a PGM), which PIL would clip to 255
        pixels = np.asarray(image)
        shift = 8 if image.mode != "I" or pixels.max() > 255 else 0
        image = Image.fromarray((pixels >> shift).clip(0, 255).astype(np.uint8))
    if "transparency" in image.info:  # of a palette's colours
        image = image.convert("RGBA")
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
            try:
                with open(path, "rb", buffering=0) as file:
                    total.update(hashlib.sha1(file.readall()).digest())
            except OSError as error:
                raise OSError(f"cannot read {path}: {error.strerror}; mend or remove it") from error
    return total.hexdigest()[:16]


def _build(source: Source, image_size: int, folder: Path) -> dict[int, str]:
    """Fills `folder`; the numbers of the images that cannot be decoded, and why.

    Raises:
        ValueError: none can be decoded, or those of 16 bits use 12 at most, of which 16 levels of grey would be left.
    """

    def one(i: int):
        image = source.images[i]
        try:
            with Image.fromarray(image) if isinstance(image, np.ndarray) else Image.open(image) as opened:
                brightest[i] = np.asarray(opened).max() if opened.mode.startswith("I") else 0
                rgb = to_rgb(opened)
        except Exception as error:  # PIL raises many kinds for a broken file
            return str(error).replace(f" {str(image)!r}", "")  # the id names it already
        return (
            np.asarray(rgb.resize((image_size, image_size), Image.Resampling.BILINEAR)).transpose(2, 0, 1),
            hashlib.sha1(str(rgb.size).encode() + rgb.tobytes()).hexdigest()[:16],
            np.asarray(rgb.convert("L").resize((64, 64), Image.Resampling.BOX)),
            rgb.size,
        )

    broken, signatures, brightest = {}, [], np.zeros(len(source.ids), int)
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
    (folder / "images.crc32").write_text(_checksum(folder / "images.uint8"))
    if not signatures:
        raise _corrupt(source, broken)
    if 255 < brightest.max() < 2**12:
        raise ValueError(
            f"the 16-bit images of {source.name} use 12 bits at most (no pixel is above {brightest.max()}), and 16 levels of "
            "grey would be left of them; convert them to 8 bits first, with the window that a reader would see"
        )
    columns = [np.array(column) for column in zip(*signatures, strict=True)]
    names = ("hashes", "thumbnails", "sizes")
    np.savez(folder / "signatures.npz", **dict(zip(names, columns, strict=True)))
    (folder / "broken.json").write_text(json.dumps(broken))
    return broken
