"""Images as one uint8 tensor: decoded once, cached on disk, batched and augmented on the device."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from hdkd_lib.data.sources import Source

_CACHE_VERSION = 1  # raise when decoding or resizing changes


@dataclass(frozen=True)
class Part:
    """One side of a split: images (N, 3, S, S) uint8, labels (N,) int64, ids and groups of length N."""

    images: Tensor
    labels: Tensor
    ids: list[str]
    groups: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


def cache_dir() -> Path:
    return Path(os.environ.get("HDKD_CACHE", "~/.cache/hdkd_lib")).expanduser()


def decode(source: Source, image_size: int) -> tuple[np.ndarray, list[str]]:
    """All images as RGB of image_size x image_size (bilinear, aspect not kept) and a hash of each one's original pixels.

    Returns:
        A memory-mapped uint8 array (N, 3, S, S), and N hashes: equal for images whose decoded pixels are equal.

    Raises:
        ValueError: files that cannot be decoded, all of them named.
        OSError: the cache's disk is full.
    """
    folder = cache_dir() / f"{source.name}-{image_size}-{_fingerprint(source)}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Built aside and renamed: a half-written cache is never seen, and of two builders the first to finish wins.
        aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".building-"))
        try:
            _build(source, image_size, aside)
            try:
                aside.rename(folder)
            except OSError:
                if not folder.exists():
                    raise
        except OSError as error:
            needed = len(source.ids) * 3 * image_size**2 / 2**20
            raise OSError(f"cannot write the image cache in {folder.parent}, which needs {needed:.0f} MiB: {error}") from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    return np.load(folder / "images.npy", mmap_mode="r"), json.loads((folder / "hashes.json").read_text())


def _fingerprint(source: Source) -> str:
    digest = hashlib.sha256(str(_CACHE_VERSION).encode())
    if isinstance(source.images, np.ndarray):
        digest.update(source.images.tobytes())
    else:
        for name, path in zip(source.ids, source.images, strict=True):
            stat = path.stat()
            digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    return digest.hexdigest()[:16]


def _build(source: Source, image_size: int, folder: Path) -> None:
    images = np.empty((len(source.ids), 3, image_size, image_size), np.uint8)

    def one(i: int) -> str | Exception:
        image = source.images[i]
        try:
            with Image.fromarray(image) if isinstance(image, np.ndarray) else Image.open(image) as opened:
                rgb = _to_rgb(opened)
        except Exception as error:  # PIL raises many kinds for a broken file
            return error
        images[i] = np.asarray(rgb.resize((image_size, image_size), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
        return hashlib.sha1(str(rgb.size).encode() + rgb.tobytes()).hexdigest()[:16]

    with ThreadPoolExecutor() as pool:
        hashes = list(pool.map(one, range(len(source.ids))))
    if broken := [f"{source.images[i]} ({h})" for i, h in enumerate(hashes) if isinstance(h, Exception)]:
        raise ValueError(
            f"{len(broken)} of {len(hashes)} images cannot be decoded; replace or remove them:\n" + "\n".join(broken)
        )
    np.save(folder / "images.npy", images)  # written at once: a memory map on a full disk ends the process with SIGBUS
    (folder / "hashes.json").write_text(json.dumps(hashes))


def _to_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits ("I;16", or "I" from a PGM), which PIL would clip to 255
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


class Normalise(nn.Module):
    """uint8 images (B, 3, H, W) to [0, 1], augmented if `augment` is given, then in the model's normalisation."""

    def __init__(self, model: nn.Module, augment: nn.Module | None = None):
        super().__init__()
        self.augment = augment or nn.Identity()
        for key in ("mean", "std"):
            self.register_buffer(key, torch.tensor(model.pretrained_cfg[key]).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        images = self.augment(images.float() / 255)
        return ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)


def batches(part: Part, size: int, *, shuffle: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
    """(images uint8, labels) by batches, on the part's device; `shuffle` draws one permutation from torch's global generator.

    A last batch of one image is left out when shuffling (unless `size` is one): batch norm has no variance for it.
    """
    order = torch.randperm(len(part)) if shuffle else torch.arange(len(part))
    for index in order.to(part.labels.device).split(size):
        if shuffle and len(index) == 1 < min(size, len(part)):
            continue
        yield part.images[index], part.labels[index]
