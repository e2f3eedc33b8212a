import ctypes
import errno
import multiprocessing
import os
import shutil
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from hdkd_lib.data import cache as module
from hdkd_lib.data.cache import decode, to_rgb
from hdkd_lib.data.sources import Source

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)
GREY16 = RNG.integers(0, 2**16, (8, 8), dtype=np.uint16)
GREY = COLOURS[..., 0]
FILES = {  # what is saved, and what it must be decoded to
    "grey.png": (GREY, GREY[..., None]),
    "colour.png": (COLOURS, COLOURS),
    "alpha.png": (np.dstack([COLOURS, GREY]), COLOURS),
    "grey_alpha.png": (np.dstack([GREY, GREY16 % 256]).astype(np.uint8), GREY[..., None]),
    "palette.png": (Image.fromarray(COLOURS).quantize(256), COLOURS),
    "binary.png": (GREY > 127, np.where(GREY > 127, 255, 0)[..., None]),
    "grey16.png": (GREY16, GREY16[..., None] // 256),
    "grey16.tif": (GREY16, GREY16[..., None] // 256),
    "grey16.pgm": (GREY16, GREY16[..., None] // 256),
}
NO_MOUNT = 77  # exit code


def source_of(*images: Path) -> Source:
    return Source("test", ["a"], list(images), [path.name for path in images], np.zeros(len(images), int))


def array_source(images: np.ndarray) -> Source:
    return Source("test", ["a"], images, [str(i) for i in range(len(images))], np.zeros(len(images), int))


def saved(path: Path, pixels: np.ndarray, **options) -> Path:
    Image.fromarray(pixels).save(path, **options)
    return path


@pytest.fixture
def broken(tmp_path) -> Source:
    """Two good images and between them three that cannot be decoded."""
    good = saved(tmp_path / "good.jpg", RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    (tmp_path / "cut.jpg").write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("no image")
    saved(tmp_path / "last.png", COLOURS)
    return source_of(*(tmp_path / name for name in ("good.jpg", "cut.jpg", "empty.png", "text.png", "last.png")))


# --- decoding ---


@pytest.mark.parametrize("file", FILES)
def test_every_kind_of_file_becomes_rgb_of_eight_bits(tmp_path, file):
    pixels, expected = FILES[file]
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(tmp_path / file)
    _, images, _ = decode(source_of(tmp_path / file), 8)
    assert images.dtype == np.uint8
    assert np.array_equal(images[0].transpose(1, 2, 0), np.broadcast_to(expected, (8, 8, 3)))


@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 8, 8, 3)])
def test_arrays_become_rgb_too(shape):
    pixels = RNG.integers(0, 256, shape, dtype=np.uint8)
    _, images, signatures = decode(array_source(pixels), 8)
    assert np.array_equal(images.transpose(0, 2, 3, 1), np.broadcast_to(pixels.reshape(3, 8, 8, -1), (3, 8, 8, 3)))
    assert len(set(signatures.hashes)) == 3


def test_floating_point_pixels_are_refused(tmp_path):
    path = saved(tmp_path / "float.tif", RNG.random((8, 8), dtype=np.float32))
    with pytest.raises(ValueError, match=r"float.tif \(floating-point pixels; convert them to 8 or 16 bits\)"):
        decode(source_of(path), 8)


def test_a_photograph_taken_on_its_side_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees clockwise to view"
    wide = np.tile(COLOURS, (1, 2, 1))
    paths = saved(tmp_path / "plain.jpg", wide), saved(tmp_path / "turned.jpg", wide, exif=exif)
    _, (plain, turned), signatures = decode(source_of(*paths), 8)
    assert signatures.sizes.tolist() == [[16, 8], [8, 16]]
    upright = np.rot90(np.asarray(Image.open(paths[0])), k=-1)
    expected = Image.fromarray(upright).resize((8, 8), Image.Resampling.BILINEAR)
    assert np.array_equal(turned.transpose(1, 2, 0), expected)
    assert not np.array_equal(plain, turned)


def test_a_picture_is_squeezed_and_not_cropped(tmp_path):
    stripes = np.repeat(COLOURS[0, :4], 8, axis=0)  # four vertical stripes, 8 wide
    _, images, _ = decode(source_of(saved(tmp_path / "wide.png", np.tile(stripes, (16, 1, 1)))), 8)
    assert images.shape == (1, 3, 8, 8)
    assert np.array_equal(images[0, :, 3, [0, 7]], COLOURS[0, [0, 3]])


# --- signatures ---


def test_equal_pixels_have_equal_hashes_whatever_the_encoding(tmp_path):
    changed = COLOURS.copy()
    changed[7, 7, 2] ^= 1
    pixels = {"a.png": COLOURS, "a.bmp": COLOURS, "b.png": changed, "c.png": COLOURS.reshape(4, 16, 3)}  # c: the same bytes
    source = source_of(*(saved(tmp_path / name, values) for name, values in pixels.items()))
    hashes = decode(source, 4)[2].hashes
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3
    assert np.array_equal(decode(source, 8)[2].hashes, hashes), "the size to which they are resized does not matter"


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 3), min_size=2, max_size=8))
def test_hashes_are_equal_exactly_where_pixels_are(cache, numbers):
    pixels = np.stack([np.roll(COLOURS, i, axis=0) for i in numbers])
    hashes = decode(array_source(pixels), 4)[2].hashes
    assert np.array_equal(hashes[:, None] == hashes, np.equal.outer(numbers, numbers))


def test_signatures_describe_the_original_and_not_the_resized_image(tmp_path):
    ramp = np.tile(np.arange(64, dtype=np.uint8) * 4, (48, 1))
    _, _, signatures = decode(source_of(saved(tmp_path / "up.png", ramp), saved(tmp_path / "down.png", ramp[:, ::-1])), 4)
    assert signatures.sizes.tolist() == [[64, 48]] * 2
    assert signatures.thumbnails[0, 0].tolist() == [4 * i for i in range(64)]
    assert np.array_equal(signatures.thumbnails[0], signatures.thumbnails[1][:, ::-1])
    assert len(signatures) == 2


# --- what cannot be decoded ---


def test_all_broken_files_are_named_at_once_and_nothing_is_cached(broken, cache):
    with pytest.raises(ValueError, match="3 of 5 images cannot be decoded; replace or remove them, or pass") as raised:
        decode(broken, 8)
    assert [line.split(" ")[0] for line in str(raised.value).split("\n")[1:]] == ["cut.jpg", "empty.png", "text.png"]
    assert list(cache.iterdir()) == []


def test_broken_files_are_skipped_and_counted_where_that_is_asked_for(broken, cache):
    kept, images, signatures = decode(broken, 8, on_corrupt="skip")
    assert kept.ids == ["good.jpg", "last.png"]
    assert kept.labels.shape == (2,)
    assert kept.card["corrupt_files"] == 3
    assert len(images) == len(signatures) == 2
    assert np.array_equal(images[1].transpose(1, 2, 0), COLOURS)
    again, same, _ = decode(broken, 8, on_corrupt="skip")
    assert (again.ids, again.card) == (kept.ids, kept.card)
    assert np.array_equal(images, same)
    with pytest.raises(ValueError, match=r"3 of 5 images cannot be decoded.*\ncut.jpg .*\nempty.png .*\ntext.png"):
        decode(broken, 8)
    assert len(list(cache.iterdir())) == 1


def test_the_given_source_keeps_its_card(broken):
    decode(broken, 8, on_corrupt="skip")
    assert broken.card == {}


def test_a_set_without_a_whole_image_is_refused(tmp_path, cache):
    (tmp_path / "text.png").write_text("no image")
    for how in ("skip", "raise"):
        with pytest.raises(ValueError, match="1 of 1 images cannot be decoded"):
            decode(source_of(tmp_path / "text.png"), 8, on_corrupt=how)
    assert list(cache.iterdir()) == []


def test_another_way_to_meet_broken_files_is_refused(broken):
    with pytest.raises(ValueError, match=r"on_corrupt must be 'raise' or 'skip' \(got 'ignore'\)"):
        decode(broken, 8, on_corrupt="ignore")


# --- the cache ---


def test_the_second_call_reads_the_cache(image_folder, cache, monkeypatch):
    source = source_of(image_folder("a.png", "b.png") / "a.png", image_folder() / "b.png")
    _, images, signatures = decode(source, 8)
    monkeypatch.setattr(module, "_build", None)
    _, images_again, signatures_again = decode(source, 8)
    assert np.array_equal(images, images_again)
    for field in fields(signatures):
        assert np.array_equal(getattr(signatures, field.name), getattr(signatures_again, field.name))


def test_what_is_written_to_the_images_stays_in_memory(image_folder, cache):
    source = source_of(image_folder("a.png") / "a.png")
    _, images, _ = decode(source, 8)
    images[:] = 0
    assert decode(source, 8)[1].any()


def test_more_images_than_are_decoded_at_a_time_keep_their_order(cache, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 4)
    pixels = RNG.integers(0, 256, (11, 8, 8), dtype=np.uint8)
    assert np.array_equal(decode(array_source(pixels), 8)[1][:, 0], pixels)


def test_copies_in_another_place_share_the_cache_and_another_order_or_size_does_not(image_folder, cache):
    root = image_folder("here/a.png", "here/b.png")
    shutil.copytree(root / "here", root / "there")
    for place in ("here", "there"):
        _, images, _ = decode(source_of(root / place / "a.png", root / place / "b.png"), 8)
    assert len(list(cache.iterdir())) == 1
    _, reverse, _ = decode(source_of(root / "here" / "b.png", root / "here" / "a.png"), 8)
    assert np.array_equal(reverse, images[::-1])
    assert decode(source_of(root / "here" / "a.png", root / "here" / "b.png"), 4)[1].shape == (2, 3, 4, 4)
    assert len(list(cache.iterdir())) == 3


def test_a_changed_byte_is_noticed_though_size_and_time_are_the_same(tmp_path, cache):
    path = saved(tmp_path / "a.bmp", COLOURS)
    before, time = path.read_bytes(), path.stat().st_mtime_ns
    _, images, _ = decode(source_of(path), 8)
    path.write_bytes(before[:-8] + bytes([before[-8] ^ 255]) + before[-7:])
    os.utime(path, ns=(time, time))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (len(before), time)
    _, changed, _ = decode(source_of(path), 8)
    assert (images != changed).sum() == 1
    assert np.array_equal(changed[0].transpose(1, 2, 0), np.asarray(Image.open(path)))


def test_changed_arrays_are_noticed(cache):
    pixels = np.zeros((2, 8, 8), np.uint8)
    assert not decode(array_source(pixels), 8)[1].any()
    pixels[1, 7, 7] = 1
    assert decode(array_source(pixels), 8)[1].any()


def test_the_same_bytes_in_another_shape_are_another_set(cache):
    pixels = RNG.integers(0, 256, (2, 8, 8), dtype=np.uint8)
    decode(array_source(pixels), 8)
    assert len(decode(array_source(pixels.reshape(4, 4, 8)), 8)[1]) == 4


def test_a_half_written_cache_is_never_used(image_folder, cache):
    source = source_of(image_folder("a.png") / "a.png")
    expected = decode(source, 8)[1].copy()
    (whole,) = cache.iterdir()
    half = cache / ".building-killed"
    shutil.copytree(whole, half)
    (half / "images.uint8").write_bytes(b"")
    shutil.rmtree(whole)
    assert np.array_equal(decode(source, 8)[1], expected)
    assert whole.is_dir()


def test_of_two_builders_at_once_both_succeed(image_folder, cache, monkeypatch):
    source, build, both = source_of(image_folder("a.png") / "a.png"), module._build, threading.Barrier(2, timeout=20)

    def build_together(*arguments):
        broken = build(*arguments)
        both.wait()  # neither has renamed its folder yet
        return broken

    monkeypatch.setattr(module, "_build", build_together)
    with ThreadPoolExecutor(2) as pool:
        (_, first, signatures), (_, second, others) = pool.map(lambda _: decode(source, 8), range(2))
    assert np.array_equal(first, second)
    assert signatures.hashes.tolist() == others.hashes.tolist()
    assert len(list(cache.iterdir())) == 1


def test_a_failed_write_leaves_no_cache_and_tells_the_space_it_needs(cache, monkeypatch):
    def full(source, image_size, folder):
        (folder / "images.uint8").write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "_build", full)
    with pytest.raises(
        OSError, match=r"cannot write the image cache, which needs 3 MiB, in .*cache: .*No space left.*free some"
    ):
        decode(array_source(np.zeros((4, 8, 8), np.uint8)), 512)
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
    with pytest.raises(OSError, match=r"cannot write the image cache, which needs 5 MiB, in "):
        decode(array_source(np.zeros((100, 8, 8), np.uint8)), 128)
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


def test_integers_of_32_bits_are_eight_bit_values_if_none_is_larger(tmp_path):
    for level, expected in ((200, 200), (51_200, 200)):
        Image.fromarray(np.full((8, 8), level, np.int32)).save(tmp_path / "i.tif")
        with Image.open(tmp_path / "i.tif") as image:
            assert np.asarray(to_rgb(image)).min() == np.asarray(to_rgb(image)).max() == expected
