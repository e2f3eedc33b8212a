"""Given what was drawn, torchvision (HDKD) and timm's operations on PIL images (DeiT) are the references, image by image."""

import random
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import ks_2samp
from timm.data import auto_augment
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from hdkd_lib.data import augment
from hdkd_lib.data.augment import AUGMENTATIONS, HDKD, RANDAUGMENT, DeiT

HDKD_SHARED = {"angle": 0.0, "flip_x": False, "flip_y": False, "brightness": 1.0, "contrast": 1.0}
HDKD_NEUTRAL = HDKD_SHARED | {"contrast_first": False, "sharpen": False, "sigma": 0.05}
NAMES = auto_augment._RAND_INCREASING_TRANSFORMS
EXACT = ("Equalize", "Invert", "PosterizeIncreasing", "SolarizeIncreasing", "SolarizeAdd")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def smooth(*shape: int, seed: int = 0) -> Tensor:
    """A landscape with a little noise, as uint8: what interpolation is compared on."""
    coarse = torch.rand(shape[0], 3, 5, 6, generator=torch.Generator().manual_seed(seed))
    fine = torch.nn.functional.interpolate(coarse, shape[2:], mode="bicubic") * 220 + noise(*shape, seed=seed) / 16
    return fine.clamp(0, 255).to(torch.uint8)


def seeded(function, *arguments, seed: int = 0):
    torch.manual_seed(seed)
    return function(*arguments)


def same_for_all(count: int, **values) -> dict[str, Tensor]:
    return {name: torch.tensor([value] * count) for name, value in values.items()}


def applied(change, images: Tensor, drawn: dict[str, Tensor]) -> Tensor:
    return change.apply(images, change.place(drawn, images))


def one_by_one(reference, images: Tensor, drawn: dict[str, Tensor]) -> Tensor:
    """`reference(image in [0, 1], its parameters)` for each image."""
    rows = [{name: values[i].item() for name, values in drawn.items()} for i in range(len(images))]
    return torch.stack([reference(image / 255, row) for image, row in zip(images, rows, strict=True)])


# What all share


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("shape", [(1, 3, 16, 16), (5, 3, 12, 20), (4, 3, 21, 9)])
def test_images_keep_their_shape_and_range_and_the_input_is_not_changed(name, shape):
    corners = (noise(*shape) > 127) * torch.tensor(255, dtype=torch.uint8)  # what overshoots leaves [0, 1]
    before, change = corners.clone(), AUGMENTATIONS[name]()
    for seed in range(10):
        drawn = seeded(change.draw, len(corners), seed=seed)
        placed = change.place(drawn, corners)
        out = change.apply(corners, placed)
        assert (out.shape, out.dtype) == (shape, torch.float32)
        assert -1e-6 < out.min() <= out.max() < 1 + 1e-6
        assert torch.equal(change.apply(corners, placed), out), "pure"
    assert torch.equal(corners, before)


@pytest.mark.parametrize("name", ["hdkd", "deit"])
def test_the_same_seed_gives_the_same_images_and_each_image_its_own(name):
    change, images = AUGMENTATIONS[name](), smooth(1, 3, 16, 16).expand(12, -1, -1, -1).contiguous()
    first, second, other = (seeded(change, images, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert len({image.numpy().tobytes() for image in first}) == 12


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_images_do_not_depend_on_the_pieces_that_a_batch_goes_by(name, monkeypatch):
    images, outs = smooth(10, 3, 12, 16), []
    for values in (1, 3 * images[0].numel(), 2**30):
        monkeypatch.setattr(augment, "CACHED", values)
        outs.append(seeded(AUGMENTATIONS[name](), images))
    assert_close(outs[0], outs[2], atol=1e-6, rtol=0)
    assert_close(outs[1], outs[2], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_images_are_standardised_after_they_are_augmented(name):
    change, images = AUGMENTATIONS[name](), noise(6, 3, 12, 16)
    change.finish = lambda out, placed: out
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in ([0.5, 0.25, 0.125], [0.5, 2.0, 0.25]))
    expected = (seeded(change, images) - mean) / std
    assert_close(seeded(change, images, mean, std), expected, atol=1e-5, rtol=0)


class Device(TorchDispatchMode):
    """Counts on torch's meta device, which has no values and so raises where a GPU would be waited for: what launches a kernel,
    and what takes a tensor of the host.
    """

    def __init__(self):
        super().__init__()
        self.launches, self.copies = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given, made = ([leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)] for tree in ((args, kwargs), out))
        if any(tensor.is_meta for tensor in (*given, *made)):
            is_view = any(result.alias_info and not result.alias_info.is_write for result in func._schema.returns)
            if not is_view and "empty" not in func._schema.name:
                self.launches.append(func)
            if any(tensor.is_cpu and tensor.ndim for tensor in given):
                self.copies.append(func)
        return out


@pytest.mark.parametrize(("name", "most"), [("none", 5), ("flip_shift", 20), ("hdkd", 105), ("deit", 150)])
def test_a_batch_needs_one_copy_and_few_launches_and_never_waits(name, most):
    images, mean = torch.empty(128, 3, 224, 224, dtype=torch.uint8, device="meta"), torch.empty(1, 3, 1, 1, device="meta")
    with Device() as device:
        out = seeded(AUGMENTATIONS[name](), images, mean, mean)
    assert out.is_meta
    assert len(device.copies) == (name != "none")
    assert most / 2 < len(device.launches) <= most


def test_the_tensors_of_one_copy_keep_their_values_types_and_shapes():
    tensors = {"coin": torch.tensor([True, False, True]), "index": torch.tensor([[2**40, -1]]), "none": torch.empty(0, 4)}
    tensors |= {"turned": torch.rand(2, 3).T, "number": torch.tensor(0.5)}
    real = Tensor.to
    with mock.patch.object(Tensor, "to", lambda tensor, device, **options: real(tensor, "cpu")):
        placed = augment._on_device(tensors, torch.device("meta"))
    assert placed.keys() == tensors.keys()
    for name, values in tensors.items():
        assert_close(placed[name], values, atol=0, rtol=0)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_images_do_not_depend_on_how_they_lie_in_memory(name):
    images = smooth(10, 3, 12, 16)
    turned = images.contiguous(memory_format=torch.channels_last)
    assert_close(seeded(AUGMENTATIONS[name](), turned), seeded(AUGMENTATIONS[name](), images), atol=1e-6, rtol=0)


def test_no_augmentation_divides_by_255():
    images = noise(4, 3, 8, 8)
    assert_close(AUGMENTATIONS["none"]()(images), images / 255, atol=1e-7, rtol=0)


# HDKD


def turned(image: Tensor, drawn: dict) -> Tensor:
    image = F.rotate(image, drawn["angle"], InterpolationMode.NEAREST)
    image = F.horizontal_flip(image) if drawn["flip_x"] else image
    return F.vertical_flip(image) if drawn["flip_y"] else image


def hdkd_reference(image: Tensor, drawn: dict) -> Tensor:
    image = turned(image, drawn)
    steps = [F.adjust_brightness, "brightness"], [F.adjust_contrast, "contrast"]
    for adjust, name in reversed(steps) if drawn["contrast_first"] else steps:
        image = adjust(image, drawn[name])
    image = F.adjust_sharpness(image, 2.0) if drawn["sharpen"] else image
    return F.gaussian_blur(image, [3, 3], [drawn["sigma"]] * 2)


@pytest.mark.parametrize("size", [(24, 24), (20, 33)])
def test_hdkds_rotation_and_flips_are_torchvisions(size):
    images = noise(64, 3, *size)
    drawn = same_for_all(64, **HDKD_NEUTRAL) | {
        name: values for name, values in seeded(HDKD().draw, 64).items() if name in ("angle", "flip_x", "flip_y")
    }
    out, expected = applied(HDKD(), images, drawn), one_by_one(turned, images, drawn)
    differs = ((out - expected).abs() > 1e-5).any(1)
    assert differs.float().mean() < 1e-3, "positions on a pixel's border may round to either side"


@pytest.mark.parametrize("size", [(24, 24), (20, 33)])
def test_what_hdkd_does_to_a_turned_image_is_torchvisions(size):
    images = noise(64, 3, *size)
    drawn = seeded(HDKD().draw, 64) | {"angle": torch.zeros(64)}
    out = applied(HDKD(), images, drawn)
    assert_close(out, one_by_one(hdkd_reference, images, drawn), atol=1e-5, rtol=0)
    assert (out - images / 255).abs().amax((1, 2, 3)).min() > 0.01, "every image is changed"


def test_hdkd_turns_an_image_before_all_else():
    drawn = seeded(HDKD().draw, 32)
    geometry = {name: drawn[name] for name in ("angle", "flip_x", "flip_y")}
    upright = same_for_all(32, angle=0.0, flip_x=False, flip_y=False)
    images = noise(32, 3, 20, 20)
    rotated = (applied(HDKD(), images, same_for_all(32, **HDKD_NEUTRAL) | geometry) * 255).round().to(torch.uint8)
    assert_close(applied(HDKD(), images, drawn), applied(HDKD(), rotated, drawn | upright), atol=1e-6, rtol=0)


@given(st.fixed_dictionaries({
    **dict.fromkeys(("flip_x", "flip_y", "contrast_first", "sharpen"), st.booleans()),
    **dict.fromkeys(("brightness", "contrast"), st.floats(0.7, 1.3)),
    "sigma": st.floats(0.1, 2), "angle": st.sampled_from([-180.0, 0.0]),
}), st.integers(0, 9))  # fmt: skip
def test_any_draw_of_hdkd_is_torchvisions(values, seed):
    images = noise(1, 3, 10, 12, seed=seed)
    drawn = same_for_all(1, **values)
    assert_close(applied(HDKD(), images, drawn), one_by_one(hdkd_reference, images, drawn), atol=1e-5, rtol=0)


def test_hdkd_draws_over_its_ranges_for_each_image():
    drawn = seeded(HDKD().draw, 2000)
    ranges = {"angle": (-180, 180), "brightness": (0.7, 1.3), "contrast": (0.7, 1.3), "sigma": (0.1, 2.0)}
    coins = {"flip_x", "flip_y", "contrast_first", "sharpen"}
    assert drawn.keys() == ranges.keys() | coins
    for name, (low, high) in ranges.items():
        assert len(drawn[name].unique()) > 1900, "one value per image"
        assert low <= drawn[name].min() < low + 0.01 * (high - low)
        assert high >= drawn[name].max() > high - 0.01 * (high - low)
        assert drawn[name].mean() == pytest.approx((low + high) / 2, abs=0.03 * (high - low))
    for name in coins:
        assert drawn[name].float().mean() == pytest.approx(0.5, abs=0.05)
    together = torch.stack([drawn[name].float() for name in sorted(drawn)]).corrcoef() - torch.eye(len(drawn))
    assert together.abs().max() < 0.1, "independent"


# DeiT


def plain(count: int, **changes) -> dict[str, Tensor]:
    """The whole image, not flipped, no operation; boxes as they are drawn."""
    whole = {"size": [1.0, 1.0], "centre": [0.0, 0.0], "flip": False}
    whole |= {"operation": [-1, -1], "level": [0.9, 0.9], "sign": [1.0, 1.0]}
    return DeiT().draw(count) | same_for_all(count, **(whole | changes))


def operated(images: Tensor, operation: list[int], level: list[float], sign: list[float]) -> Tensor:
    """One layer of RandAugment on images in [0, 1]."""
    drawn = {"operation": operation, "level": level, "sign": sign}
    drawn = plain(len(images)) | {name: torch.tensor(values)[:, None] for name, values in drawn.items()}
    placed = DeiT(layers=1).place(drawn, images)
    x = images[placed["moves"][0]]
    augment._randaugment(x, 0, placed)
    return x[placed["moves"][1]]


def pil_reference(name: str, images: Tensor, level: float, sign: int, monkeypatch) -> Tensor:
    monkeypatch.setattr(auto_augment, "_randomly_negate", lambda value: sign * value)
    to_arguments = auto_augment.LEVEL_TO_ARG[name]
    arguments = to_arguments(level, {}) if to_arguments else ()
    fill = {"fillcolor": (124, 116, 104), "resample": Image.Resampling.BILINEAR}
    pictures = (Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images)
    done = [np.asarray(auto_augment.NAME_TO_OP[name](picture, *arguments, **fill)) for picture in pictures]
    return torch.tensor(np.stack(done)).permute(0, 3, 1, 2) / 255


def test_there_are_timms_fifteen_increasing_operations():
    assert list(RANDAUGMENT) == [name.removesuffix("Increasing").removesuffix("Rel") for name in NAMES]
    assert len(NAMES) == 15


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("level", [3.7, 9, 9.6])
@pytest.mark.parametrize("name", NAMES)
def test_each_operation_is_timms(name, level, sign, monkeypatch):
    images = smooth(3, 3, 48, 64)
    out = operated(images / 255, [NAMES.index(name)] * 3, [level / 10] * 3, [float(sign)] * 3)
    expected = pil_reference(name, images, level, sign, monkeypatch)
    error = (out - expected).abs() * 255
    if name in EXACT:
        assert error.max() < 0.01
    elif name.startswith(("Rotate", "Shear", "Translate")):
        assert error.mean() < 1.5, "PIL rounds, and does not blend the picture's border with the fill"
        assert error.flatten().quantile(0.97) < 2
    else:
        assert error.max() < 2, "PIL rounds"
    assert (expected - images / 255).abs().mean() * 255 > (0.5 if "Sharp" in name else 5), "the reference does something"


@pytest.mark.parametrize("name", ["AutoContrast", "Equalize"])
def test_a_channel_of_one_value_keeps_it(name):
    images = torch.rand(2, 3, 24, 24) ** 2 * 0.8
    images[0, 1] = 0.4
    out = operated(images, [NAMES.index(name)] * 2, [0.9] * 2, [1.0] * 2)
    assert_close(out[0, 1], torch.full((24, 24), 0.4), atol=1e-6, rtol=0)
    assert (out - images).abs().amax((2, 3)).gt(0.005).sum() == 5, "the others are changed"


def test_each_image_has_its_own_operations_levels_and_signs_one_after_the_other():
    images, drawn = smooth(40, 3, 16, 16), seeded(DeiT().draw, 40)
    drawn |= {name: value for name, value in plain(40).items() if name in ("size", "centre", "flip")}
    out = applied(DeiT(), images, drawn)
    for i in range(40):
        expected = images[i : i + 1] / 255
        for layer in range(2):
            expected = operated(expected, *([drawn[name][i, layer].item()] for name in ("operation", "level", "sign")))
        assert_close(out[i : i + 1], expected, atol=1e-5, rtol=0)
    assert (drawn["operation"] >= 0).all(1).any()


@pytest.mark.parametrize("flip", [False, True])
def test_a_crop_is_torchvisions_resized_crop(flip):
    height, width, images = 30, 40, smooth(1, 3, 30, 40)
    for top, left, h, w in [(5, 8, 15, 20), (0, 0, 20, 20), (3, 1, 25, 38), (10, 30, 12, 8)]:
        size = [w / width, h / height]
        centre = [(2 * left + w) / width - 1, (2 * top + h) / height - 1]
        change = DeiT()
        out = applied(change, images, plain(1, size=size, centre=centre, flip=flip))
        mode = InterpolationMode.BICUBIC
        expected = F.resized_crop(images / 255, top, left, h, w, [height, width], mode, antialias=False).clamp(0, 1)
        expected = F.horizontal_flip(expected) if flip else expected
        y, x = 3 * height // h + 1, 3 * width // w + 1  # torchvision does not look beyond the crop
        assert_close(out[..., y:-y, x:-x], expected[..., y:-y, x:-x], atol=1e-4, rtol=0)


def test_a_crop_at_the_images_border_has_no_dark_seam():
    white = torch.full((1, 3, 20, 20), 255, dtype=torch.uint8)
    for x, y in [(0.7, 0.6), (-0.7, -0.6)]:
        out = applied(DeiT(), white, plain(1, size=[0.3, 0.4], centre=[x, y]))
        assert_close(out, torch.ones_like(out), atol=1e-5, rtol=0)


def test_without_a_crop_the_geometry_is_kept_up_to_flips():
    images, change = noise(40, 3, 12, 20), DeiT()
    change.crop = False
    drawn = seeded(change.draw, 40) | {"operation": torch.full((40, 2), -1)}
    out = applied(change, images, drawn)
    expected = torch.where(drawn["flip"].view(-1, 1, 1, 1), images.flip(3), images) / 255
    assert_close(out, expected, atol=1e-6, rtol=0)
    assert 10 < drawn["flip"].sum() < 30


def test_crops_have_deits_areas_and_aspect_ratios_and_lie_within_the_image():
    drawn = seeded(DeiT().draw, 4000)
    (width, height), reach = drawn["size"].T, drawn["centre"].abs() + drawn["size"]
    area, ratio = width * height, width / height
    assert 0.08 <= area.min() < 0.1
    assert 0.9 < area.max() <= 1.0001
    assert 0.7499 <= ratio.min() < 0.78
    assert 1.3334 >= ratio.max() > 1.28
    assert ratio.log().mean().abs() < 0.02
    assert 0.99 < reach.max() <= 1.0001
    assert 0.45 < (drawn["centre"] > 0).float().mean() < 0.55
    torch.manual_seed(0)
    canvas = torch.empty(3, 500, 500)
    boxes = [RandomResizedCrop.get_params(canvas, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(2000)]
    torchvisions = np.mean([h * w / 500**2 for _, _, h, w in boxes])
    assert area.mean() == pytest.approx(torchvisions, abs=0.02), "less than 0.54: large boxes seldom fit"


def test_where_no_box_fits_the_crop_is_the_whole_image(monkeypatch):
    monkeypatch.setattr(augment, "_uniform", lambda shape, low, high: torch.full(torch.Size(shape), float(high)))
    drawn = DeiT().draw(3)  # all of the area, at 4/3
    assert torch.equal(drawn["size"], torch.ones(3, 2))
    assert torch.equal(drawn["centre"], torch.zeros(3, 2))


def test_deit_draws_operations_levels_and_signs_as_rand_m9_mstd05():
    drawn = seeded(DeiT().draw, 4000)
    operation, level, sign = drawn["operation"], drawn["level"], drawn["sign"]
    assert operation.shape == level.shape == sign.shape == (4000, 2)
    counts = (operation + 1).flatten().bincount() / 8000
    assert counts[0] == pytest.approx(0.5, abs=0.02)
    assert counts[1:].tolist() == pytest.approx([1 / 30] * 15, abs=0.01)
    assert 0.6 < level.min() < level.max() == 1
    assert level.median() == pytest.approx(0.9, abs=0.005)
    assert level[level < 0.9].sub(0.9).square().mean().sqrt() == pytest.approx(0.05, abs=0.003)
    assert set(sign.unique().tolist()) == {-1, 1}
    assert sign.mean() == pytest.approx(0, abs=0.05)
    assert drawn["flip"].float().mean() == pytest.approx(0.5, abs=0.03)


def test_a_rectangle_of_noise_is_put_into_a_quarter_of_the_images():
    images = torch.full((400, 3, 16, 16), 7.0)
    drawn = seeded(DeiT().draw, 400)
    out = DeiT().finish(images.clone(), DeiT().place(drawn, images))
    changed = (out != images).any(1)
    touched = changed.flatten(1).any(1)
    assert touched.float().mean() == pytest.approx(0.25, abs=0.06)
    for mask in changed[touched]:
        rows, columns = mask.any(1), mask.any(0)
        assert mask.sum() == rows.sum() * columns.sum() == (rows[:, None] & columns).sum(), "a rectangle"
        assert mask.sum() <= 100
    values = out.permute(0, 2, 3, 1)[changed]
    assert values.mean() == pytest.approx(0, abs=0.05)
    assert values.std() == pytest.approx(1, abs=0.05)
    never = DeiT(erasing=0)
    assert torch.equal(never.finish(images.clone(), never.place(never.draw(400), images)), images)


@pytest.mark.parametrize("size", [(40, 60), (7, 5)])
def test_rectangles_are_drawn_as_timms(size):
    images = torch.full((1500, 3, *size), 7.0)
    ours = DeiT(erasing=1).finish(images.clone(), DeiT(erasing=1).place(seeded(DeiT(erasing=1).draw, 1500), images))
    random.seed(0)
    timms = RandomErasing(1, mode="pixel", device="cpu")(images.clone())
    sides = []
    for out in (ours, timms):
        inside = (out != 7).any(1)
        rows, columns = inside.any(2).float(), inside.any(1).float()
        assert not (rows.all(1) | columns.all(1)).any(), "smaller than the image"
        edges = [(rows.sum(1), rows.argmax(1)), (columns.sum(1), columns.argmax(1))]
        sides.append([values for pair in edges for values in pair])
    for our, timm in zip(*sides, strict=True):  # height, top, width, left
        assert ks_2samp(our, timm).pvalue > 0.001
        for bound in (torch.min, torch.max):
            assert_close(bound(our), bound(timm), atol=2, rtol=0)
    together = [torch.stack([values.float() for values in side]).corrcoef() for side in sides]
    assert_close(*together, atol=0.1, rtol=0)


def test_only_deit_crops_and_erases():
    assert {name: change.crop for name, change in AUGMENTATIONS.items()} == {
        "none": False,
        "flip_shift": False,
        "hdkd": False,
        "deit": True,
    }
    images = torch.randn(50, 3, 8, 8)
    for name in ("none", "flip_shift", "hdkd"):
        change = AUGMENTATIONS[name]()
        assert torch.equal(change.finish(images.clone(), change.place(change.draw(50), images)), images)


@pytest.mark.parametrize("size", [(8, 8), (6, 9)])
def test_flip_shift_moves_whole_pixels_and_leaves_zeros(size):
    images = torch.randint(1, 256, (200, 3, *size), dtype=torch.uint8)
    change = AUGMENTATIONS["flip_shift"]()
    drawn = seeded(change.draw, 200)
    out = (applied(change, images, drawn) * 255).round().to(torch.uint8)
    for image, moved, (down, right), flip in zip(images, out, drawn["shift"].tolist(), drawn["flip"], strict=True):
        padded = torch.nn.functional.pad(image, (4, 4, 4, 4))
        expected = padded[:, 4 - down : 4 - down + size[0], 4 - right : 4 - right + size[1]]
        assert torch.equal(moved, expected.flip(2) if flip else expected)
    assert set(drawn["shift"].flatten().tolist()) == set(range(-4, 5))
    assert 60 < drawn["flip"].sum() < 140
