import ctypes
import errno
import multiprocessing
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from hdkd_lib.data import batches as module
from hdkd_lib.data.batches import Normalise, Part, batches, decode
from hdkd_lib.data.sources import Source

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)
GREY16 = RNG.integers(0, 2**16, (8, 8), dtype=np.uint16)
GREY = COLOURS[..., 0]
FILES = {  # what is saved, and what it must be decoded to
    "grey.png": (GREY, GREY[..., None]),
    "colour.png": (COLOURS, COLOURS),
    "alpha.png": (np.dstack([COLOURS, GREY]), COLOURS),
    "palette.png": (Image.fromarray(COLOURS).quantize(256), COLOURS),
    "binary.png": (GREY > 127, np.where(GREY > 127, 255, 0)[..., None]),
    "grey16.png": (GREY16, GREY16[..., None] // 256),
    "grey16.tif": (GREY16, GREY16[..., None] // 256),
    "grey16.pgm": (GREY16, GREY16[..., None] // 256),
}
NO_MOUNT = 77  # exit code


def source_of(*images: Path) -> Source:
    return Source("test", ["a"], list(images), [path.name for path in images], np.zeros(len(images), int))


def array_source(count: int) -> Source:
    return Source("test", ["a"], np.zeros((count, 8, 8), np.uint8), [str(i) for i in range(count)], np.zeros(count, int))


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """A cache of this test alone."""
    monkeypatch.setenv("HDKD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# --- decoding ---


@pytest.mark.parametrize("file", FILES)
def test_every_kind_of_file_becomes_rgb_of_eight_bits(tmp_path, file):
    pixels, expected = FILES[file]
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(tmp_path / file)
    images, _ = decode(source_of(tmp_path / file), 8)
    assert images.dtype == np.uint8
    assert np.array_equal(images[0].transpose(1, 2, 0), np.broadcast_to(expected, (8, 8, 3)))


def test_a_photograph_taken_on_its_side_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees clockwise to view"
    Image.fromarray(COLOURS).save(tmp_path / "plain.jpg")
    Image.fromarray(COLOURS).save(tmp_path / "turned.jpg", exif=exif)
    plain, turned = decode(source_of(tmp_path / "plain.jpg", tmp_path / "turned.jpg"), 8)[0]
    assert np.array_equal(turned, np.rot90(plain, k=-1, axes=(1, 2)))


def test_a_picture_is_squeezed_and_not_cropped(tmp_path):
    stripes = np.repeat(COLOURS[0, :4], 8, axis=0)  # four vertical stripes, 8 wide
    Image.fromarray(np.tile(stripes, (16, 1, 1))).save(tmp_path / "wide.png")
    images, _ = decode(source_of(tmp_path / "wide.png"), 8)
    assert images.shape == (1, 3, 8, 8)
    assert np.array_equal(images[0, :, 3, [0, 7]], COLOURS[0, [0, 3]])


def test_equal_pixels_have_equal_hashes_whatever_the_encoding(tmp_path):
    Image.fromarray(COLOURS).save(tmp_path / "a.png")
    Image.fromarray(COLOURS).save(tmp_path / "a.bmp")
    changed = COLOURS.copy()
    changed[7, 7, 2] ^= 1
    Image.fromarray(changed).save(tmp_path / "b.png")
    Image.fromarray(COLOURS.reshape(4, 16, 3)).save(tmp_path / "c.png")  # the same bytes in another shape
    _, hashes = decode(source_of(*(tmp_path / name for name in ("a.png", "a.bmp", "b.png", "c.png"))), 4)
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3


# --- the cache ---


def test_all_broken_files_are_named_at_once_and_nothing_is_cached(tmp_path, cache):
    good, cut, empty, text = (tmp_path / name for name in ("good.jpg", "cut.jpg", "empty.png", "text.png"))
    Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(good)
    cut.write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    empty.touch()
    text.write_text("no image")
    with pytest.raises(ValueError, match="3 of 4 images cannot be decoded; replace or remove them") as raised:
        decode(source_of(good, cut, empty, text), 8)
    assert all(str(path) in str(raised.value) for path in (cut, empty, text))
    assert str(good) not in str(raised.value)
    assert list(cache.iterdir()) == []


def test_the_second_call_reads_the_cache(image_folder, cache, monkeypatch):
    source = source_of(image_folder("a.png") / "a.png")
    images, hashes = decode(source, 8)
    monkeypatch.setattr(module, "_build", None)
    images_again, hashes_again = decode(source, 8)
    assert np.array_equal(images, images_again)
    assert hashes == hashes_again


def test_another_size_or_a_changed_file_is_decoded_anew(image_folder, cache):
    path = image_folder("a.bmp") / "a.bmp"
    before, _ = decode(source_of(path), 8)
    assert decode(source_of(path), 4)[0].shape == (1, 3, 4, 4)
    size, time = path.stat().st_size, path.stat().st_mtime_ns
    image_folder("a.bmp")
    assert path.stat().st_size == size, "only the time of change tells"
    os.utime(path, ns=(time + 1, time + 1))
    after, _ = decode(source_of(path), 8)
    assert not np.array_equal(before, after)
    assert np.array_equal(after[0].transpose(1, 2, 0), np.asarray(Image.open(path)))


def test_of_two_builders_at_once_both_succeed(image_folder, cache, monkeypatch):
    source, build, both = source_of(image_folder("a.png") / "a.png"), module._build, threading.Barrier(2, timeout=20)

    def build_together(*arguments):
        build(*arguments)
        both.wait()  # neither has renamed its folder yet

    monkeypatch.setattr(module, "_build", build_together)
    with ThreadPoolExecutor(2) as pool:
        (first, hashes), (second, hashes_too) = pool.map(lambda _: decode(source, 8), range(2))
    assert np.array_equal(first, second)
    assert hashes == hashes_too
    assert len(list(cache.iterdir())) == 1


def test_a_failed_write_leaves_no_cache_and_tells_the_space_it_needs(cache, monkeypatch):
    def full(source, image_size, folder):
        (folder / "images.npy").write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "_build", full)
    with pytest.raises(OSError, match=r"cannot write the image cache in .*cache, which needs 3 MiB: .*No space left"):
        decode(array_source(4), 512)
    assert list(cache.iterdir()) == []


def fill_a_small_disk(folder: Path) -> None:
    """For a child process, which alone sees the 1 MiB file system that it mounts; exits with 0 if all is as it should be."""
    libc, user, group = ctypes.CDLL(None), os.getuid(), os.getgid()
    try:
        if libc.unshare(0x10000000 | 0x00020000):  # CLONE_NEWUSER | CLONE_NEWNS
            sys.exit(NO_MOUNT)
        for file, line in [("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")]:
            Path("/proc/self", file).write_text(line)
    except OSError:
        sys.exit(NO_MOUNT)
    if libc.mount(b"none", bytes(folder), b"tmpfs", 0, b"size=1m"):
        sys.exit(NO_MOUNT)
    with pytest.raises(OSError, match=r"cannot write the image cache in .*, which needs 5 MiB"):
        decode(array_source(100), 128)
    assert list(folder.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a small file system by Linux's calls")
def test_a_disk_that_is_really_full_ends_in_the_same_sentence_and_not_in_a_crash(cache):
    cache.mkdir()
    child = multiprocessing.get_context("fork").Process(target=fill_a_small_disk, args=(cache,))
    child.start()
    child.join(60)
    if child.exitcode == NO_MOUNT:
        pytest.skip("no small file system can be mounted here")
    assert child.exitcode == 0, "-7 is SIGBUS: a memory map met the full disk"


# --- batches ---


def numbered(count: int) -> Part:
    """Images that are filled with their own number, labelled with twice that."""
    numbers = torch.arange(count)
    images = numbers.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    return Part(images, 2 * numbers, [str(i) for i in range(count)], np.arange(count))


def numbers_in(part: Part, size: int, **options) -> list[int]:
    given = list(batches(part, size, **options))
    assert all(torch.equal(labels, 2 * images[:, 0, 0, 0].long()) for images, labels in given), "labels follow their images"
    assert all(len(labels) == size for _, labels in given[:-1])
    return [int(i) for images, _ in given for i in images[:, 0, 0, 0]]


@pytest.mark.parametrize("size", [1, 3, 4, 10, 16])
def test_batches_in_order_give_each_image_once(size):
    assert numbers_in(numbered(10), size) == list(range(10))


@pytest.mark.parametrize("size", [1, 4, 10, 16])
def test_shuffled_batches_give_each_image_once(size):
    numbers = numbers_in(numbered(10), size, shuffle=True)
    assert sorted(numbers) == list(range(10))


def test_shuffling_repeats_with_torchs_seed_and_changes_from_epoch_to_epoch():
    part = numbered(40)
    torch.manual_seed(0)
    first, second = (numbers_in(part, 8, shuffle=True) for _ in range(2))
    torch.manual_seed(0)
    assert numbers_in(part, 8, shuffle=True) == first
    assert list(range(40)) != first != second


def test_a_last_batch_of_one_is_left_out_only_when_shuffling():
    assert len(numbers_in(numbered(10), 3, shuffle=True)) == 9
    assert len(numbers_in(numbered(10), 3)) == 10
    assert numbers_in(numbered(1), 3, shuffle=True) == [0], "a part of one image still has a batch"


@pytest.mark.parametrize("augment", [None, nn.Threshold(0.5, 0.25)])
def test_normalise_scales_then_augments_then_standardises(augment):
    mean, std = (0.5, 0.25, 0.125), (0.5, 2.0, 0.25)
    model = SimpleNamespace(pretrained_cfg={"mean": mean, "std": std})
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    out = Normalise(model, augment)(images)
    for c in range(3):
        scaled = images[:, c].numpy() / np.float32(255)
        if augment is not None:
            scaled = np.where(scaled > 0.5, scaled, 0.25)
        assert out[:, c].numpy() == pytest.approx((scaled - mean[c]) / std[c], abs=1e-6)
