from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def image_folder(tmp_path) -> Callable[..., Path]:
    """Writes 8x8 pictures of noise, each another, under the given names; gives the folder."""
    rng = np.random.default_rng(0)

    def write(*names: str) -> Path:
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
        return tmp_path

    return write
