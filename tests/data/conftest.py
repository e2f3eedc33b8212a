import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hdkd_lib.data import Data, load

REAL_DATA = os.environ.get("HDKD_DATA")  # read here, before a fixture hides it from the tests


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


@pytest.fixture
def cache(tmp_path_factory, monkeypatch) -> Path:
    """A cache of this test alone."""
    folder = tmp_path_factory.mktemp("own") / "cache"
    monkeypatch.setenv("HDKD_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def real(temporary_folders) -> Callable[..., Data]:
    """`real(name, **options of load)`: a real data set of 32 px, where HDKD_DATA holds it."""
    loaded = {}

    def real(name: str, **options) -> Data:
        key = (name, *options.items())
        if not REAL_DATA:
            pytest.skip("HDKD_DATA is not set")
        try:
            loaded[key] = loaded.get(key) or load(name, REAL_DATA, image_size=32, **options)
        except FileNotFoundError as absent:
            pytest.skip(str(absent))
        return loaded[key]

    return real
