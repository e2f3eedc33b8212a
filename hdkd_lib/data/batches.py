"""Batches of uint8 images on the device, from its own memory, from the cache on disk, or from image files."""

import math
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.loader import fast_collate
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from hdkd_lib.data.augment import Augmentation
from hdkd_lib.data.cache import to_rgb


class Rows:
    """Some images (N, 3, S, S) of a store (M, 3, S, S), copied only when indexed: `rows[index]` is a tensor as of a tensor."""

    def __init__(self, store: Tensor, rows: np.ndarray):
        self.store, self.rows = store, torch.from_numpy(rows)
        self.shape = torch.Size((len(rows), *store.shape[1:]))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index) -> Tensor:
        return self.store[self.rows[index]]


class Files:
    """N image files, decoded when they are read, with timm's transforms: `files[index]` as of a tensor, `loader` for epochs."""

    def __init__(self, paths: list[Path], image_size: int):
        self.paths = paths
        self.shape = torch.Size((len(paths), 3, image_size, image_size))
        self._evaluation = create_transform(image_size, interpolation="bicubic", use_prefetcher=True)
        self._training = create_transform(image_size, is_training=True, hflip=0, color_jitter=None, use_prefetcher=True)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index) -> Tensor:
        chosen = torch.arange(len(self))[index]
        if chosen.ndim == 0:
            return self.read(int(chosen), False)
        return torch.stack([self.read(i, False) for i in chosen.tolist()])

    def read(self, i: int, crop: bool) -> Tensor:
        """(3, S, S): a random crop of 8 to 100 % of the area, or the centre of the image, its short side 8/7 of S."""
        try:
            with Image.open(self.paths[i]) as image:
                pixels = (self._training if crop else self._evaluation)(to_rgb(image))
        except (OSError, ValueError, SyntaxError) as error:  # what PIL raises for broken files
            raise ValueError(f"{self.paths[i]} cannot be decoded ({error}); replace or remove it") from error
        return torch.as_tensor(pixels)


@dataclass(frozen=True)
class Part:
    """One side of a split: images (N, 3, S, S) uint8, labels (N,) int64, ids and groups of length N.

    `images` is a tensor, `Rows` of a store, or `Files`: indexing with a slice, a mask or numbers gives a uint8 tensor.
    """

    images: Tensor | Rows | Files
    labels: Tensor
    ids: list[str]
    groups: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def on_device(self, device: torch.device, cache_on_device: str | bool = "auto") -> "Part":
        """The part with its images in the device's memory: "auto" if they fill at most half of what is free there.

        On a CPU the cache is memory already, shared with other runs; image files are always read anew.
        """
        if cache_on_device not in ("auto", True, False):
            raise ValueError(f"cache_on_device must be 'auto', True or False (got {cache_on_device!r})")
        if device.type == "cpu" or isinstance(self.images, Files) or not cache_on_device:
            return self
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf
        if cache_on_device == "auto" and self.images.shape.numel() > free / 2:
            return self
        return replace(self, images=self.images[:].to(device), labels=self.labels.to(device))


class Preprocess(nn.Module):
    """uint8 images (B, 3, H, W), augmented if `augment` is given, in the model's normalisation, float32 and channels last."""

    def __init__(self, model: nn.Module, augment: Augmentation | None = None):
        super().__init__()
        self.augment = augment or Augmentation()
        for key in ("mean", "std"):
            self.register_buffer(key, torch.tensor(model.pretrained_cfg[key]).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.augment(images, self.mean, self.std)


def batches(
    part: Part,
    size: int,
    *,
    shuffle: bool = False,
    weights: Tensor | None = None,
    repeats: int = 1,
    crop: bool = False,
    even: bool = False,
    skip: int = 0,
    shard: tuple[int, int] = (0, 1),
    device: torch.device | str = "cpu",
    workers: int | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """(images uint8, labels) by batches on the device; the order is drawn from torch's global CPU generator.

    Images outside of its memory are read ahead by a thread (from the cache) or by `workers` processes (from files;
    None: as many as this process has cores, at most 16).

    Args:
        weights: (N,) on the CPU: draw each image with its weight, with replacement, instead of once (the balanced sampler).
        repeats: augmented copies of each image per epoch; an epoch keeps its length, so it uses 1/`repeats` of the images
            (repeated augmentation, Hoffer et al. 2020, arXiv 1901.09335, as DeiT).
        crop: whether files are cropped at random; without effect on decoded images.
        even: leave out the last image of a batch of an odd number (mixup pairs them).
        skip: leave out so many batches, which are drawn as the others are.
        shard: (i, n) gives the i-th of n equal parts of every batch; what does not divide is left out.

    A last batch of one image is left out when shuffling (unless `size` is one): batch norm has no variance for it.
    """
    order = torch.arange(len(part))
    if weights is not None:
        order = torch.multinomial(weights, len(part), replacement=True)
    elif shuffle:
        order = torch.randperm(len(part))
    chunks = list(order.repeat_interleave(repeats)[: len(part)].split(size))
    if shuffle and len(chunks[-1]) == 1 < min(size, len(part)):
        chunks.pop()
    index, shards = shard
    multiple = shards * (2 if even else 1)
    chunks = [chunk[: len(chunk) // multiple * multiple][index::shards] for chunk in chunks if len(chunk) >= multiple][skip:]

    device = torch.empty(0, device=device).device  # "cuda" is "cuda:0", say, as tensors there have it
    if isinstance(part.images, Files):
        if workers is None:
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            workers = max(1, min(16, cores // shards))
        own = (
            torch.Generator().manual_seed(torch.initial_seed() + index) if shards > 1 else None
        )  # of crops; all draw one order
        read = DataLoader(
            _Reader(part, crop), batch_sampler=[chunk.tolist() for chunk in chunks], collate_fn=fast_collate,
            num_workers=workers, pin_memory=device.type == "cuda", generator=own,
            multiprocessing_context="fork" if workers and sys.platform == "linux" else None,  # a spawned process would spawn
        )  # fmt: skip
    elif part.labels.device == device:
        chunks = torch.cat([order[:0], *chunks]).to(device).split([len(chunk) for chunk in chunks])  # one copy an epoch
        read = ((part.images[chunk], part.labels[chunk]) for chunk in chunks)
    else:
        pin = Tensor.pin_memory if device.type == "cuda" else Tensor.contiguous
        read = _ahead(lambda chunk: (pin(part.images[chunk]), pin(part.labels[chunk])), chunks)
    ahead = device.type == "cuda"  # elsewhere the memory may be gone before it is read
    for images, labels in read:
        yield images.to(device, non_blocking=ahead), labels.to(device, non_blocking=ahead)


class _Reader(Dataset):
    def __init__(self, part: Part, crop: bool):
        self.part, self.crop = part, crop

    def __getitem__(self, i: int) -> tuple[np.ndarray, int]:
        return self.part.images.read(i, self.crop).numpy(), int(self.part.labels[i])


def _ahead(read: Callable, chunks: list[Tensor], depth: int = 2) -> Iterator[tuple[Tensor, Tensor]]:
    """`map(read, chunks)`, of which `depth` results are prepared by a thread while the caller works."""
    results, is_stopped = queue.Queue(depth), threading.Event()

    def work() -> None:
        for chunk in chunks:
            try:
                result = read(chunk)
            except Exception as error:
                result = error
            results.put(result)
            if is_stopped.is_set() or isinstance(result, Exception):
                return

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        for _ in chunks:
            if isinstance(result := results.get(), Exception):
                raise result
            yield result
    finally:  # the caller may leave before the end
        is_stopped.set()
        while thread.is_alive():
            while not results.empty():
                results.get()
            thread.join(0.01)
