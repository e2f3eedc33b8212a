"""kornia draws for each image; torchvision, given what was drawn, is the reference for what is then done."""

import kornia.augmentation as K
import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from hdkd_lib.data.augment import AUGMENTATIONS, hdkd


def rotate(image: Tensor, drawn: dict) -> Tensor:
    return F.rotate(image, float(drawn["degrees"]), InterpolationMode.NEAREST)


def jitter(image: Tensor, drawn: dict) -> Tensor:
    for step in drawn["order"].tolist():
        if step == 0:
            image = F.adjust_brightness(image, float(drawn["brightness_factor"]))
        elif step == 1:
            image = F.adjust_contrast(image, float(drawn["contrast_factor"]))
    return image


REFERENCES = {  # in HDKD's order
    K.RandomRotation: rotate,
    K.RandomHorizontalFlip: lambda image, drawn: F.horizontal_flip(image) if drawn["batch_prob"] else image,
    K.RandomVerticalFlip: lambda image, drawn: F.vertical_flip(image) if drawn["batch_prob"] else image,
    K.ColorJitter: jitter,
    K.RandomSharpness: lambda image, drawn: F.adjust_sharpness(image, 2.0) if drawn["batch_prob"] else image,
    K.RandomGaussianBlur: lambda image, drawn: F.gaussian_blur(image, [3, 3], [float(drawn["sigma"])] * 2),
}


def reference(op, images: Tensor) -> Tensor:
    """What torchvision makes of each image with the parameters that `op` drew in its last call."""
    batch = ("order", "forward_input_shape")  # these are drawn once
    drawn = [{k: v if k in batch else v[i] for k, v in op._params.items()} for i in range(len(images))]
    return torch.stack([REFERENCES[type(op)](image, d) for image, d in zip(images, drawn, strict=True)])


@pytest.fixture
def images() -> Tensor:
    torch.manual_seed(0)
    return torch.rand(16, 3, 20, 20)


@pytest.mark.parametrize("position", range(6))
def test_each_operation_equals_torchvisions(images, position):
    op = hdkd()[position]
    out = op(images)
    torch.testing.assert_close(out, reference(op, images), atol=1e-4, rtol=0)
    assert not torch.equal(out, images)


def test_the_operations_follow_hdkds_order(images):
    augment = hdkd()
    assert [type(op) for op in augment] == list(REFERENCES)
    expected, out = images, augment(images)
    for op in augment:
        expected = reference(op, expected)
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=0)


def test_parameters_are_drawn_for_each_image_over_hdkds_ranges():
    torch.manual_seed(0)
    augment, images = hdkd(), torch.rand(400, 3, 4, 4)
    augment(images)
    rotation, *flips, colour, sharpness, blur = (op._params for op in augment)
    for drawn, low, high in [
        (rotation["degrees"], -180, 180),
        (colour["brightness_factor"], 0.7, 1.3),
        (colour["contrast_factor"], 0.7, 1.3),
        (blur["sigma"], 0.1, 2.0),
    ]:
        assert len(drawn.unique()) > 390, "one value per image"
        assert low <= drawn.min() < low + 0.05 * (high - low)
        assert high >= drawn.max() > high - 0.05 * (high - low)
    for drawn in (*flips, sharpness):
        assert drawn["batch_prob"].float().mean() == pytest.approx(0.5, abs=0.1)
    for drawn in (rotation, colour, blur):
        assert drawn["batch_prob"].all(), "always applied"


def test_brightness_and_contrast_come_in_either_order():
    op, orders = hdkd()[3], set()
    for seed in range(20):
        torch.manual_seed(seed)
        op(torch.rand(2, 3, 4, 4))
        orders.add(tuple(step for step in op._params["order"].tolist() if step < 2))
    assert orders == {(0, 1), (1, 0)}


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("shape", [(1, 3, 16, 16), (5, 3, 12, 20)])
def test_images_keep_their_shape_and_range(name, shape):
    torch.manual_seed(0)
    corners = (torch.rand(shape) > 0.5).float()  # black and white: what overshoots leaves [0, 1]
    out = AUGMENTATIONS[name]()(corners)
    assert out.shape == shape
    assert out.dtype == torch.float32
    assert 0 <= out.min() <= out.max() <= 1


def test_the_same_seed_gives_the_same_images(images):
    augment = hdkd()
    outs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outs.append(augment(images))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
