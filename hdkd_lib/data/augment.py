"""Training-time augmentation of whole uint8 batches on their device, with parameters drawn for each image.

An augmentation maps images (B, 3, H, W) uint8 to float32 in [0, 1]. `draw` takes the random numbers of a batch from torch's
global CPU generator, so that a seed means the same on every device; `apply` is a pure function of images and what was drawn.
Few passes over memory decide the speed: rotation and flips are one gather of bytes, and on a CPU a batch goes by pieces that
stay in a core's cache from the first operation to the last.
"""

import math

import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from timm.data.random_erasing import RandomErasing
from torch import Tensor

CACHED = 2**19  # values, 2 MiB as float32: what a CPU augments at a time
IMAGENET_MEAN = (124 / 255, 116 / 255, 104 / 255)  # what timm fills the corners of RandAugment's rotations with


class Augmentation:
    """No augmentation, and what the others share. `crop`: whether images are cropped at random."""

    crop = False

    def __call__(self, images: Tensor, mean: Tensor | float = 0.0, std: Tensor | float = 1.0) -> Tensor:
        """Augmented images less `mean` over `std`, in the memory format channels_last."""
        drawn = self.draw(len(images))
        out = torch.empty(images.shape, device=images.device, memory_format=torch.channels_last)
        size = max(1, CACHED // images[0].numel()) if images.device.type == "cpu" else len(images)
        for start in range(0, len(images), size):
            chunk = slice(start, start + size)
            augmented = self.apply(images[chunk], {name: values[chunk] for name, values in drawn.items()})
            out[chunk] = augmented.sub_(mean).div_(std)
        return self.finish(out)

    def draw(self, count: int) -> dict[str, Tensor]:
        """Parameters of `count` images: tensors (count, ...) on the CPU."""
        return {}

    def apply(self, images: Tensor, drawn: dict[str, Tensor]) -> Tensor:
        return images.float().div_(255)

    def finish(self, images: Tensor) -> Tensor:
        """What is done to normalised images, in place."""
        return images


class HDKD(Augmentation):
    """HDKD's training transforms in their order [code, omarsherif200/HDKD at f7c7dae].

    Rotation by +-180 degrees (nearest, black fill), both flips with probability .5, brightness and contrast +-30 % in either
    order, sharpness 2 with probability .5, and always a 3x3 Gaussian blur of sigma .1 to 2.
    """

    def draw(self, count: int) -> dict[str, Tensor]:
        return {
            "angle": _uniform(count, -180, 180),
            "flip_x": _coin(count),
            "flip_y": _coin(count),
            "brightness": _uniform(count, 0.7, 1.3),
            "contrast": _uniform(count, 0.7, 1.3),
            "contrast_first": _coin(count),
            "sharpen": _coin(count),
            "sigma": _uniform(count, 0.1, 2.0),
        }

    def apply(self, images: Tensor, drawn: dict[str, Tensor]) -> Tensor:
        is_any_sharpened = any(drawn["sharpen"].tolist())
        drawn = _on_device(drawn, images)
        x = _rotate_and_flip(images, drawn["angle"], drawn["flip_x"], drawn["flip_y"]).float().div_(255)
        # Contrast blends with the mean grey, brightness with black: one formula, so that either can come first.
        for is_contrast in (drawn["contrast_first"], 1 - drawn["contrast_first"]):
            factor = torch.lerp(drawn["brightness"], drawn["contrast"], is_contrast)
            x = _blend(x, _grey(x.mean((2, 3), keepdim=True)) * is_contrast, factor)
        if is_any_sharpened:
            x = _sharpen(x, 1 + drawn["sharpen"])
        side = (-0.5 / drawn["sigma"] ** 2).exp()
        return _filter3(F.pad(x, (1, 1, 1, 1), mode="reflect"), 1 / (1 + 2 * side), side / (1 + 2 * side))


class DeiT(Augmentation):
    """DeiT's training transforms, also CSKD's [code; timm's `rand-m9-mstd0.5-inc1`, random erasing .25].

    A random crop of 8 to 100 % of the area and aspect 3/4 to 4/3, resized (bicubic) and flipped with probability .5; two draws
    of RandAugment's fifteen operations, each applied with probability .5 at a magnitude of N(9, .5) of 10; after normalisation
    a rectangle of noise with probability .25. OUR CHOICE: crops are taken from the cached image, their borders at fractions of
    a pixel, and RandAugment's own geometry is bilinear (timm: bilinear or bicubic) on values that are not rounded in between.
    """

    crop = True

    def __init__(self, layers: int = 2, magnitude: float = 9.0, deviation: float = 0.5, erasing: float = 0.25):
        self.layers, self.magnitude, self.deviation, self.erasing = layers, magnitude, deviation, erasing

    def draw(self, count: int) -> dict[str, Tensor]:
        # As torchvision's RandomResizedCrop: of ten boxes the first that fits, else the whole image.
        area, log_ratio = _uniform((count, 10), 0.08, 1), _uniform((count, 10), math.log(3 / 4), math.log(4 / 3))
        width, height = (area * log_ratio.exp()).sqrt(), (area / log_ratio.exp()).sqrt()
        fits = (width <= 1) & (height <= 1)
        first = fits.float().argmax(1, keepdim=True)
        size = torch.stack([width.gather(1, first), height.gather(1, first)], 1).squeeze(2)
        size[~fits.any(1)] = 1.0
        shape = (count, self.layers)
        return {
            "size": size,  # of the crop, (width, height) in image widths
            "centre": _uniform((count, 2), -1, 1) * (1 - size),  # of the crop, in half image widths from the image's centre
            "flip": _coin(count),
            "operation": torch.where(_coin(shape), torch.randint(len(RANDAUGMENT), shape), -1),
            "level": torch.normal(self.magnitude, self.deviation, shape).clamp_(0, 10) / 10,
            "sign": 1 - 2 * _coin(shape).float(),
        }

    def apply(self, images: Tensor, drawn: dict[str, Tensor]) -> Tensor:
        crop = _on_device({name: drawn[name] for name in ("size", "centre", "flip")}, images)
        (width, height), (x, y) = crop["size"].view(-1, 2).T, crop["centre"].view(-1, 2).T
        mirror = 1 - 2 * crop["flip"].view(-1)
        if self.crop:
            sampling = {"mode": "bicubic", "padding_mode": "border"}
            out = _warp(images.float().div_(255), (width * mirror, 0.0, x), (0.0, height, y), **sampling).clamp_(0, 1)
        else:
            out = torch.where(crop["flip"] > 0, images.flip(3), images).float().div_(255)
        for layer in range(self.layers):
            operations = drawn["operation"][:, layer].tolist()
            for operation in sorted(set(operations) - {-1}):
                rows = [row for row, drawn_here in enumerate(operations) if drawn_here == operation]
                chosen = _on_device({"level": drawn["level"][rows, layer], "sign": drawn["sign"][rows, layer]}, images)
                change = RANDAUGMENT[operation]
                if len(rows) == len(out):
                    out = change(out, chosen["level"], chosen["sign"])
                else:
                    index = torch.tensor(rows).to(out.device, non_blocking=out.is_cuda)
                    out.index_copy_(0, index, change(out[index], chosen["level"], chosen["sign"]))
        return out

    def finish(self, images: Tensor) -> Tensor:
        return RandomErasing(self.erasing, mode="pixel", device=images.device)(images)


class FlipShift(Augmentation):
    """For photographs of 32 pixels or so: a shift by up to 4 pixels in each direction, zeros outside, and a horizontal flip
    with probability .5; He et al. 2016 (arXiv 1512.03385), section 4.2.
    """

    reach = 4

    def draw(self, count: int) -> dict[str, Tensor]:
        return {"shift": torch.randint(-self.reach, self.reach + 1, (count, 2)), "flip": _coin(count)}

    def apply(self, images: Tensor, drawn: dict[str, Tensor]) -> Tensor:
        (height, width), edge = images.shape[2:], self.reach
        shift, flip = (drawn[name].to(images.device, non_blocking=images.is_cuda) for name in ("shift", "flip"))
        row = torch.arange(edge, edge + height, device=images.device) - shift[:, :1]
        column = torch.arange(edge, edge + width, device=images.device) - shift[:, 1:]
        column = torch.where(flip[:, None], column.flip(1), column)
        index = (row[:, :, None] * (width + 2 * edge) + column[:, None, :]).flatten(1)[:, None].expand(-1, images.shape[1], -1)
        return F.pad(images, (edge,) * 4).flatten(2).gather(2, index).view_as(images).float().div_(255)


AUGMENTATIONS = {"none": Augmentation, "flip_shift": FlipShift, "hdkd": HDKD, "deit": DeiT}

# timm's increasing operations: x (B, 3, H, W) in [0, 1], level in [0, 1] and sign -1 or 1, both (B, 1, 1, 1).
RANDAUGMENT = (
    lambda x, level, sign: TF.autocontrast(x),
    lambda x, level, sign: TF.equalize(x),
    lambda x, level, sign: 1 - x,
    lambda x, level, sign: _turn(x, sign * level * math.radians(30)),
    lambda x, level, sign: _posterize(x, 4 - (4 * level).floor()),
    lambda x, level, sign: torch.where(x * 255 < 256 - (256 * level).floor(), x, 1 - x),
    lambda x, level, sign: torch.where(x * 255 < 128, (x + (110 * level).floor() / 255).clamp(max=1), x),
    lambda x, level, sign: _blend(x, _grey(x), _enhancement(level, sign)),
    lambda x, level, sign: _blend(x, _grey(x.mean((2, 3), keepdim=True)), _enhancement(level, sign)),
    lambda x, level, sign: _blend(x, torch.zeros_like(x[:1, :1, :1, :1]), _enhancement(level, sign)),
    lambda x, level, sign: _sharpen(x, _enhancement(level, sign)),
    lambda x, level, sign: _move(x, (1.0, shear := 0.3 * level * sign * x.shape[2] / x.shape[3], shear), (0.0, 1.0, 0.0)),
    lambda x, level, sign: _move(x, (1.0, 0.0, 0.0), (shear := 0.3 * level * sign * x.shape[3] / x.shape[2], 1.0, shear)),
    lambda x, level, sign: _move(x, (1.0, 0.0, 0.9 * level * sign), (0.0, 1.0, 0.0)),
    lambda x, level, sign: _move(x, (1.0, 0.0, 0.0), (0.0, 1.0, 0.9 * level * sign)),
)


def _uniform(shape: int | tuple[int, ...], low: float, high: float) -> Tensor:
    return torch.empty(shape).uniform_(low, high)


def _coin(shape: int | tuple[int, ...]) -> Tensor:
    return torch.rand(shape) < 0.5


def _on_device(drawn: dict[str, Tensor], images: Tensor) -> dict[str, Tensor]:
    """As float32 that broadcasts over images; a small copy that does not wait for the device."""
    return {k: v.float().view(len(v), -1, 1, 1).to(images.device, non_blocking=images.is_cuda) for k, v in drawn.items()}


def _grey(x: Tensor) -> Tensor:
    """Luma (B, 1, H, W), ITU-R 601-2 as PIL and torchvision."""
    return 0.2989 * x[:, 0:1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:3]


def _blend(x: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    """factor 1 keeps x, 0 gives `other`, and above 1 goes away from it; cut to [0, 1]."""
    return (x * factor).add_(other * (1 - factor)).clamp_(0, 1)


def _filter3(padded: Tensor, centre: Tensor | float, side: Tensor | float) -> Tensor:
    """The separable 3x3 filter (side, centre, side) of each image, (B, C, H + 2, W + 2) to (B, C, H, W)."""
    x = (padded[..., :-2] + padded[..., 2:]).mul_(side).add_(padded[..., 1:-1] * centre)
    return (x[..., :-2, :] + x[..., 2:, :]).mul_(side).add_(x[..., 1:-1, :] * centre)


def _sharpen(x: Tensor, factor: Tensor) -> Tensor:
    """`_blend` with x under PIL's smoothing filter, ones around a five, over 13; the border is kept."""
    inside = x[..., 1:-1, 1:-1]
    out, box = x.clone(), _filter3(x, 1.0, 1.0)
    out[..., 1:-1, 1:-1] = box.mul_((1 - factor) / 13).add_(inside * (factor + (1 - factor) * 4 / 13)).clamp_(0, 1)
    return out


def _rotate_and_flip(images: Tensor, angle: Tensor, flip_x: Tensor, flip_y: Tensor) -> Tensor:
    """Counter-clockwise rotation in degrees about the centre, then flips; nearest pixels, black outside; any dtype."""
    height, width = images.shape[2:]
    y = torch.arange(height, device=images.device).view(-1, 1) - (height - 1) / 2
    x = torch.arange(width, device=images.device).view(1, -1) - (width - 1) / 2
    y, x, angle = y * (1 - 2 * flip_y), x * (1 - 2 * flip_x), angle.deg2rad()
    column, row = angle.cos() * x - angle.sin() * y, angle.sin() * x + angle.cos() * y
    # A black frame of one pixel takes all that lies outside.
    row = row.add_((height + 1) / 2).round_().clamp_(0, height + 1)
    column = column.add_((width + 1) / 2).round_().clamp_(0, width + 1)
    index = row.mul_(width + 2).add_(column).long().flatten(1)[:, None].expand(-1, images.shape[1], -1)
    return F.pad(images, (1, 1, 1, 1)).flatten(2).gather(2, index).view_as(images)


def _warp(x: Tensor, row_x: tuple, row_y: tuple, **sampling: str) -> Tensor:
    """Samples x at (row_x, row_y) . (column, row, 1) in coordinates from -1 to 1; each entry a number or B of them."""
    zero = x.new_zeros(len(x))
    theta = torch.stack(
        [torch.stack([zero + (v.flatten() if isinstance(v, Tensor) else v) for v in r], 1) for r in (row_x, row_y)], 1
    )
    return F.grid_sample(x, F.affine_grid(theta, x.shape, align_corners=False), align_corners=False, **sampling)


def _move(x: Tensor, row_x: tuple, row_y: tuple) -> Tensor:
    """`_warp`, bilinear, with ImageNet's mean outside."""
    fill = torch.cat([torch.full_like(x[:1, :1, :1, :1], value) for value in IMAGENET_MEAN], 1)
    return _warp(x - fill, row_x, row_y) + fill


def _turn(x: Tensor, radians: Tensor) -> Tensor:
    aspect = x.shape[2] / x.shape[3]
    cos, sin = radians.cos(), radians.sin()
    return _move(x, (cos, -sin * aspect, 0.0), (sin / aspect, cos, 0.0))


def _posterize(x: Tensor, bits: Tensor) -> Tensor:
    step = 2 ** (8 - bits)
    return ((x * 255).round() / step).floor() * step / 255


def _enhancement(level: Tensor, sign: Tensor) -> Tensor:
    return (1 + 0.9 * level * sign).clamp(min=0.1)
