import random
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch.testing import assert_close

from hdkd_lib.data.augment import Augmentation, DeiT
from hdkd_lib.data.batches import Files, Part, Preprocess, Rows, _ahead, batches


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


# --- what holds images ---


@pytest.mark.parametrize(
    "index",
    [
        *(slice(None), slice(1, 4), slice(None, None, 2), 3, -1, [1, 3], np.array([3, 1]), torch.tensor(2)),
        *(torch.tensor([4, 0, 0]), torch.tensor([], dtype=torch.long), torch.tensor([True, False, True, False, True])),
    ],
)
def test_rows_are_indexed_as_the_tensor_of_these_images(index):
    store, chosen = torch.arange(9 * 12, dtype=torch.uint8).view(9, 3, 2, 2), np.array([8, 1, 5, 5, 0])
    rows, tensor = Rows(store, chosen), store[chosen]
    assert torch.equal(rows[index], tensor[index])
    assert (len(rows), rows.shape) == (5, tensor.shape)


@pytest.mark.parametrize("cache", ["auto", True, False])
def test_caching_changes_nothing_on_a_cpu(cache):
    part = numbered(4)
    assert part.on_device(torch.device("cpu"), cache) is part


@pytest.mark.parametrize("cache", ["yes", None, 2])
def test_an_unknown_way_of_caching_is_refused(cache):
    with pytest.raises(ValueError, match=r"cache_on_device must be 'auto', True or False \(got"):
        numbered(4).on_device(torch.device("cpu"), cache)


@pytest.mark.parametrize("cache", ["auto", True])
def test_images_and_labels_are_cached_on_another_device_unless_it_is_switched_off(cache):
    part, device = numbered(4), torch.device("meta")
    cached = part.on_device(device, cache)
    assert cached.images.device == cached.labels.device == device
    assert (cached.images.shape, cached.ids) == (part.images.shape, part.ids)
    assert part.on_device(device, False) is part


def test_images_that_fill_more_than_half_of_a_gpus_free_memory_are_not_cached_there(monkeypatch):
    part = numbered(4)
    free = 2 * part.images.shape.numel()
    moved = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free - 1, 10 * free))
    assert part.on_device(torch.device("cuda"), "auto") is part
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10 * free))
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device: moved.append(device) or tensor)
    assert part.on_device(torch.device("cuda"), "auto") is not part
    assert moved == [torch.device("cuda")] * 2


# --- order ---


@pytest.mark.parametrize("size", [1, 3, 4, 10, 16])
def test_batches_in_order_give_each_image_once(size):
    assert numbers_in(numbered(10), size) == list(range(10))


@pytest.mark.parametrize("size", [1, 4, 10, 16])
def test_shuffled_batches_give_each_image_once(size):
    numbers = numbers_in(numbered(10), size, shuffle=True)
    assert sorted(numbers) == list(range(10))


def test_batches_of_rows_are_those_of_the_tensor():
    part, store = numbered(10), torch.arange(12, dtype=torch.uint8).flip(0).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    rows = Part(Rows(store, np.arange(11, 1, -1)), part.labels, part.ids, part.groups)
    assert numbers_in(rows, 4) == list(range(10))


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


def test_weights_draw_the_classes_evenly_and_the_images_of_a_class_too():
    labels = torch.tensor([0] * 10 + [1] * 190)
    part = Part(torch.arange(200, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 1, 1), labels, [""] * 200, labels.numpy())
    torch.manual_seed(0)
    epochs = [list(batches(part, 16, shuffle=True, weights=1 / labels.bincount().float()[labels])) for _ in range(20)]
    drawn = torch.cat([label for epoch in epochs for _, label in epoch])
    assert len(drawn) == 20 * 200
    assert drawn.float().mean() == pytest.approx(0.5, abs=0.03)
    images = torch.cat([images[:, 0, 0, 0] for epoch in epochs for images, _ in epoch])
    counts = images.long().bincount(minlength=200).float()
    assert counts[:10].tolist() == pytest.approx([200] * 10, rel=0.3)
    assert counts[10:].max() < 30


def test_what_is_not_on_the_device_is_read_ahead_in_the_same_order():
    assert numbers_in(numbered(10), 3, device="cpu:0") == list(range(10))  # "cpu:0" is not "cpu", where the part is
    assert readers() == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_batches_come_on_the_gpu_whether_cached_there_or_not(device, cache):
    part = numbered(10).on_device(torch.device(device), cache)
    given = list(batches(part, 3, device=device))
    assert all(images.is_cuda and labels.is_cuda for images, labels in given)
    assert torch.cat([labels for _, labels in given]).tolist() == list(range(0, 20, 2))


@given(st.integers(2, 60), st.integers(1, 4), st.integers(2, 9))
def test_each_used_image_comes_as_often_as_repeats_tells_and_the_epoch_is_as_long(count, repeats, size):
    numbers = numbers_in(numbered(count), size, shuffle=True, repeats=repeats)
    left_out = 1 if count % size == 1 and count > 1 else 0
    assert len(numbers) == count - left_out
    counts = np.bincount(numbers)
    assert (counts > 0).sum() in (-(-count // repeats), -(-(count - left_out) // repeats))
    assert ((counts != 0) & (counts != repeats)).sum() <= 1, "the last image, where the epoch ends"
    assert all(len(set(numbers[i : i + repeats])) == 1 for i in range(0, len(numbers), repeats)), "in one batch or the next"


@given(st.integers(2, 40), st.integers(2, 9))
def test_even_batches_leave_out_one_image_of_an_odd_number(count, size):
    given = [len(labels) for _, labels in batches(numbered(count), size, shuffle=True, even=True)]
    assert all(length and length % 2 == 0 for length in given)
    whole, rest = divmod(count, size)
    assert sum(given) == whole * (size // 2 * 2) + rest // 2 * 2


def test_a_part_too_small_for_an_even_batch_has_none():
    assert list(batches(numbered(1), 4, shuffle=True, even=True)) == []


# --- reading ahead ---


def readers() -> int:
    return sum(thread.name.endswith("(work)") for thread in threading.enumerate())


CHUNKS = list(torch.arange(60).split(3))


def test_reading_ahead_gives_what_reading_gives():
    assert list(_ahead(lambda chunk: (chunk.tolist(), 2), CHUNKS)) == [(chunk.tolist(), 2) for chunk in CHUNKS]
    assert list(_ahead(len, [])) == []
    assert readers() == 0


def test_a_few_results_are_prepared_before_they_are_asked_for_and_no_more():
    done, begun = [], threading.Event()

    def read(chunk):
        done.append(chunk)
        if len(done) == 4:  # one given, two waiting, one in hand
            begun.set()
        return chunk

    ahead = _ahead(read, CHUNKS)
    next(ahead)
    assert begun.wait(10)
    assert not threading.Event().wait(0.1)
    assert len(done) == 4
    ahead.close()


def test_an_exception_of_the_reader_reaches_the_caller_in_its_place():
    def read(chunk):
        if 9 in chunk:
            raise ValueError("image 9 is broken")
        return chunk

    given = []
    with pytest.raises(ValueError, match="image 9 is broken"):
        given.extend(iter_into(given, _ahead(read, CHUNKS)))
    assert len(given) == 3
    assert readers() == 0


def iter_into(given: list, results):
    for result in results:
        given.append(result)
    return ()


@pytest.mark.parametrize("taken", [1, 2, 3])
def test_no_thread_outlives_a_caller_that_leaves_early(taken):
    done = []
    ahead = _ahead(done.append, CHUNKS)
    for _ in range(taken):
        next(ahead)
    ahead.close()
    assert readers() == 0
    assert len(done) <= taken + 4, "nor does it read to the end"


# --- image files ---


@pytest.fixture
def files(tmp_path) -> Part:
    """Seven pictures of noise on one grey level each, wider than high, labelled with their number."""
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{i}.png" for i in range(7)]
    for i, path in enumerate(paths):
        Image.fromarray(rng.integers(30 * i, 30 * i + 30, (40, 60, 3), dtype=np.uint8)).save(path)
    return Part(Files(paths, 16), torch.arange(7), [path.name for path in paths], np.arange(7))


def epoch_of(part: Part, **options) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = zip(*batches(part, 3, **({"workers": 0} | options)), strict=True)
    return torch.cat(images), torch.cat(labels)


def test_image_files_are_indexed_as_a_tensor(files):
    whole = files.images[:]
    assert (len(files.images), files.images.shape) == (7, (7, 3, 16, 16))
    assert (whole.shape, whole.dtype) == ((7, 3, 16, 16), torch.uint8)
    assert torch.equal(files.images[2], whole[2])
    for index in (slice(1, 5, 2), torch.tensor([6, 0]), files.labels > 3):
        assert torch.equal(files.images[index], whole[index])


@pytest.mark.parametrize("shape", [(64, 128), (128, 64)])
def test_evaluation_shows_the_centre_of_a_file_its_short_side_eight_sevenths(tmp_path, shape):
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    top, left = (shape[0] - 56) // 2, (shape[1] - 56) // 2  # 64 is 8/7 of 56: nothing is resized
    centre = pixels[top : top + 56, left : left + 56].transpose(2, 0, 1)
    assert np.array_equal(Files([tmp_path / "a.png"], 56)[0], centre)


@pytest.mark.parametrize("workers", [0, 2])
def test_labels_follow_the_files_and_nothing_is_random_without_a_crop(files, workers):
    images, labels = epoch_of(files, workers=workers)
    assert torch.equal(images, files.images[:])
    assert torch.equal(labels, files.labels)
    torch.manual_seed(0)
    images, labels = epoch_of(files, shuffle=True, even=True, workers=workers)
    assert len(labels) == 4
    assert torch.equal(images, files.images[labels])


def test_crops_differ_between_epochs_and_repeat_with_torchs_seed(files):
    outs = []
    for seed in (0, None, 0):
        if seed is not None:
            torch.manual_seed(seed)
        random.seed(len(outs))  # the workers' seeds come from torch's
        outs.append(epoch_of(files, crop=True, workers=2))
    (first, labels), (second, _), (again, _) = outs
    assert torch.equal(first, again)
    assert (first != second).flatten(1).any(1).all()
    assert (first != files.images[:]).flatten(1).any(1).all()
    assert torch.equal(first.float().mean((1, 2, 3)).div(30).floor().long(), labels), "each crop is of its own file"


def test_processes_crop_copies_of_an_image_each_in_its_own_way(files):
    seen = []
    for index in (0, 1):
        torch.manual_seed(0)
        read = batches(files, 4, shuffle=True, repeats=2, crop=True, shard=(index, 2), workers=1)
        seen.append([torch.cat(of) for of in zip(*read, strict=True)])
    (first, labels), (second, same) = seen
    assert torch.equal(labels, same), "each process has one of two copies"
    assert (first != second).flatten(1).any(1).all()


def test_a_broken_file_is_named(files):
    path = files.images.paths[4]
    path.write_bytes(path.read_bytes()[:2000])
    for read in (lambda: files.images[4], lambda: epoch_of(files), lambda: epoch_of(files, crop=True)):
        with pytest.raises(ValueError, match=r"4\.png cannot be decoded \(.*\); replace or remove it"):
            read()


def test_a_file_of_floating_point_pixels_is_named(tmp_path):
    path = tmp_path / "f.tif"
    Image.fromarray(np.zeros((8, 8), np.float32)).save(path)
    with pytest.raises(ValueError, match=r"f\.tif cannot be decoded \(floating-point pixels"):
        Files([path], 8)[0]


def test_files_are_never_cached_on_the_device(files):
    assert files.on_device(torch.device("meta"), True) is files


# --- normalisation ---

MEAN, STD = (0.5, 0.25, 0.125), (0.5, 2.0, 0.25)
MODEL = SimpleNamespace(pretrained_cfg={"mean": MEAN, "std": STD})


class Threshold(Augmentation):
    """Values up to a half become a quarter; at the end all is doubled."""

    def apply(self, images, placed):
        return nn.functional.threshold(images / 255, 0.5, 0.25)

    def finish(self, images, placed):
        return images.mul_(2)


@pytest.mark.parametrize("augment", [None, Threshold()])
def test_normalise_scales_then_augments_then_standardises_then_finishes(augment):
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    out = Preprocess(MODEL, augment)(images)
    assert out.is_contiguous(memory_format=torch.channels_last)
    for c in range(3):
        scaled, factor = images[:, c].numpy() / np.float32(255), 1
        if augment is not None:
            scaled, factor = np.where(scaled > 0.5, scaled, 0.25), 2
        assert out[:, c].numpy() == pytest.approx(factor * (scaled - MEAN[c]) / STD[c], abs=1e-6)


def test_erasing_comes_after_standardising():
    images = torch.full((200, 3, 12, 12), 255, dtype=torch.uint8)
    change = DeiT(layers=0, erasing=1.0)
    change.crop = False
    random.seed(0)
    out = Preprocess(MODEL, change)(images)
    white = ((1 - torch.tensor(MEAN)) / torch.tensor(STD)).view(1, 3, 1, 1)
    noise = out[(out - white).abs() > 1e-5]
    assert_close(noise.mean(), torch.tensor(0.0), atol=0.05, rtol=0)
    assert_close(noise.std(), torch.tensor(1.0), atol=0.05, rtol=0)


@given(count=st.integers(2, 40), size=st.integers(2, 16), shards=st.integers(2, 4), even=st.booleans())
def test_shards_share_every_batch_equally_and_nothing_twice(count, size, shards, even):
    part = numbered(count)
    order = {"shuffle": True, "even": even}

    def of(index: int, shards: int) -> list[list[int]]:
        torch.manual_seed(0)
        given = batches(part, size, shard=(index, shards), **order)
        return [images[:, 0, 0, 0].tolist() for images, _ in given]

    whole, pieces = of(0, 1), [of(index, shards) for index in range(shards)]
    assert {len(piece) for piece in pieces} == {len(pieces[0])}
    for batch, *shares in zip([b for b in whole if len(b) >= shards * (1 + even)], *pieces, strict=True):
        assert len({len(share) for share in shares}) == 1
        assert not even or len(shares[0]) % 2 == 0
        together = {number for share in shares for number in share}
        assert len(together) == sum(map(len, shares))
        assert together <= set(batch)
        assert len(batch) - len(together) < shards * (1 + even)
