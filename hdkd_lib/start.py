"""What 00_start_here needs beside the library: a small set of images, the report of one comparison, and the plan to run next."""

import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from hdkd_lib import statistics, tables
from hdkd_lib.data import Data
from hdkd_lib.export import accuracy_interval
from hdkd_lib.runs import Run, write_atomically

FOLDS = 5  # of `data.splits`
PATTERNS = {
    "checks": lambda u, v: np.sin(u) * np.sin(v),
    "dots": lambda u, v: np.cos(u) + np.cos(v) - 0.8,
    "stripes": lambda u, v: np.sin(u),
}


def make_textures(folder: str | Path, per_class: int = 120, size: int = 64, seed: int = 0) -> Path:
    """Writes an image folder of three classes, checks, dots and stripes, as PNG files of `size` pixels.

    Colours, period, angle and place are drawn at random, and noise lies over all. Two images of each class are there twice, so
    that the audit has something to find. The same arguments give the same pixels; a folder of that name is replaced.
    """
    folder, random = Path(folder), np.random.default_rng(seed)
    shutil.rmtree(folder, ignore_errors=True)
    for name, pattern in PATTERNS.items():
        (folder / name).mkdir(parents=True)
        images = [_texture(pattern, size, random) for _ in range(per_class - 2)]
        for i, pixels in enumerate([*images, *images[:2]]):
            Image.fromarray(pixels).save(folder / name / f"{i:03d}.png")
    return folder


def _texture(pattern: Callable, size: int, random: np.random.Generator) -> np.ndarray:
    y, x = np.mgrid[:size, :size]
    angle, period, (at_u, at_v) = random.uniform(0, math.pi), random.uniform(size / 6, size / 3), random.uniform(0, 9, 2)
    u = 2 * math.pi / period * (x * math.cos(angle) + y * math.sin(angle)) + at_u
    v = 2 * math.pi / period * (y * math.cos(angle) - x * math.sin(angle)) + at_v
    colours = random.uniform(40, 215, (2, 3))
    pixels = colours[(pattern(u, v) > 0).astype(int)] + random.normal(0, 25, (size, size, 3))
    return pixels.clip(0, 255).astype(np.uint8)
