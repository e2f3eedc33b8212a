"""A dozen of the trials (`trials.py`), and the cache of decoded images: damaged or left half-built."""

import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hdkd_lib.data import cache, files
from hdkd_lib.data.cache import decode, remembered
from hdkd_lib.data.sources import Source


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--trials", "11"], ["--trials", "1", "--workflow"]])
def test_runs_that_were_killed_and_damaged_end_as_undisturbed_ones(arguments):
    command = [sys.executable, str(Path(__file__).with_name("trials.py")), "--seed", "0", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HDKD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize("how", [flip, cut, empty, Path.unlink])
@pytest.mark.parametrize("name", ["images.uint8", "signatures.npz", "broken.json"])
def test_a_damaged_cache_is_built_anew_and_said(name, how, own_cache, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 8), dtype=np.uint8)
    source = Source("test", ["a"], pixels, list("abcde"), np.zeros(5, int))
    expected, signatures = (each.copy() if isinstance(each, np.ndarray) else each for each in decode(source, 8)[1:])
    [folder] = own_cache.iterdir()
    if name == "broken.json" and how is flip:
        (folder / name).write_text("[]")
    else:
        how(folder / name)
    _, images, again = decode(source, 8)
    assert np.array_equal(images, expected)
    assert np.array_equal(again.thumbnails, signatures.thumbnails)
    assert f"the image cache {folder} is damaged (" in capsys.readouterr().out
    assert [path.name for path in own_cache.iterdir()] == [folder.name]
    decode(source, 8)
    assert capsys.readouterr().out == ""


def test_of_a_large_cache_and_of_an_older_one_only_the_size_is_looked_at(own_cache, capsys, monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 8, 8), dtype=np.uint8)
    source = Source("test", ["a"], pixels, list("abcde"), np.zeros(5, int))
    decode(source, 8)
    [folder] = own_cache.iterdir()
    flip(folder / "images.uint8")
    with monkeypatch.context() as patch:
        patch.setattr(cache, "_CHECKED", 100)
        decode(source, 8)
    (folder / "images.crc32").rename(folder / "kept")
    decode(source, 8)
    assert capsys.readouterr().out == ""
    (folder / "kept").rename(folder / "images.crc32")
    decode(source, 8)
    assert "the checksum of images.uint8 has changed" in capsys.readouterr().out


@pytest.mark.parametrize("how", [flip, cut, empty])
def test_what_is_remembered_is_computed_again_if_it_is_damaged(how, tmp_path, capsys):
    arrays = {"a": np.arange(100)}
    remembered(tmp_path, "near", lambda: arrays)
    how(tmp_path / "near.npz")
    assert np.array_equal(remembered(tmp_path, "near", lambda: arrays)["a"], arrays["a"])
    assert "near.npz is damaged (" in capsys.readouterr().out
    assert np.array_equal(remembered(tmp_path, "near", None)["a"], arrays["a"])


def test_what_a_process_left_half_built_goes_when_it_is_gone_or_old(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    here = socket.gethostname()
    names = {
        f".building-{here}-{dead.pid}-ab": False,
        f".building-{here}-1-ab": True,  # its process runs
        f".building-another-{dead.pid}-ab": True,  # of another machine, and young
        ".building-ab": True,  # as older versions named them
    }
    for name in names:
        (tmp_path / name).mkdir()
    (tmp_path / f".building-{here}-{dead.pid}-near.npz").touch()
    files.remove_abandoned(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {name for name, stays in names.items() if stays}
    files.remove_abandoned(tmp_path, age=-1)
    assert [path.name for path in tmp_path.iterdir()] == [f".building-{here}-1-ab"]
