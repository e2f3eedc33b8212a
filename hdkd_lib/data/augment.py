"""Training-time augmentation of whole uint8 batches on their device, with parameters drawn for each image.

An augmentation maps images (B, 3, H, W) uint8 to float32 in [0, 1], in three steps:

1. `draw` takes the random numbers of a batch from torch's global CPU generator, so that a seed means the same on every device;
2. `place` brings them, with all that the host can compute from them, to the images' device in one copy;
3. `apply` is a pure function of images and of what was placed. The host never waits for it.

On a CPU the passes over memory decide the speed: rotation and flips are one gather of bytes, and a batch goes by pieces that
stay in a core's cache from the first operation to the last. On a GPU the number of kernels does: images are sorted by their
operation, and operations that share a formula are computed together.
"""

import math

import torch
import torch.nn.functional as F
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
            placed = self.place({name: values[chunk] for name, values in drawn.items()}, images)
            out[chunk] = self.finish(self.apply(images[chunk], placed).sub_(mean).div_(std), placed)
        return out

    def draw(self, count: int) -> dict[str, Tensor]:
        """Parameters of `count` images: tensors (count, ...) on the CPU."""
        return {}

    def place(self, drawn: dict[str, Tensor], images: Tensor) -> dict:
        """What `apply` and `finish` take, on the images' device; of the images only shape and device matter."""
        return _on_device(drawn, images.device)

    def apply(self, images: Tensor, placed: dict) -> Tensor:
        return images / 255

    def finish(self, images: Tensor, placed: dict) -> Tensor:
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

    def place(self, drawn: dict[str, Tensor], images: Tensor) -> dict:
        return super().place({name: values.float().view(-1, 1, 1, 1) for name, values in drawn.items()}, images)

    def apply(self, images: Tensor, placed: dict) -> Tensor:
        x = _rotate_and_flip(images, placed["angle"], placed["flip_x"], placed["flip_y"]) / 255
        # Contrast blends with the mean grey, brightness with black: one formula, so that either can come first.
        for is_contrast in (placed["contrast_first"], 1 - placed["contrast_first"]):
            factor = torch.lerp(placed["brightness"], placed["contrast"], is_contrast)
            x = _blend(x, _grey(x.mean((2, 3), keepdim=True)) * is_contrast, factor)
        if images.device.type != "cpu" or placed["sharpen"].any():  # elsewhere, looking would wait for the device
            side = (1 - (factor := 1 + placed["sharpen"])) / 13
            _sharpen(x, factor + 4 * side, side)
        side = (-0.5 / placed["sigma"] ** 2).exp()
        return _filter3(F.pad(x, (1, 1, 1, 1), mode="reflect"), 1 / (1 + 2 * side), side / (1 + 2 * side))


class DeiT(Augmentation):
    """DeiT's training transforms, also CSKD's [code; timm's `rand-m9-mstd0.5-inc1`, random erasing .25].

    A random crop of 8 to 100 % of the area and aspect 3/4 to 4/3, resized (bicubic) and flipped with probability .5; two draws
    of RandAugment's fifteen operations, each applied with probability .5 at a magnitude of N(9, .5) of 10; after normalisation
    a rectangle of noise with probability .25, of 2 to 33 % of the area and aspect .3 to 3.3. OUR CHOICE: crops are taken from
    the cached image, their borders at fractions of a pixel, and RandAugment's own geometry is bilinear (timm: bilinear or
    bicubic) on values that are not rounded in between. Rectangles are drawn by `draw` (timm: from Python's generator), their
    noise by `finish` from the generator of the images' device.
    """

    crop = True

    def __init__(self, layers: int = 2, magnitude: float = 9.0, deviation: float = 0.5, erasing: float = 0.25):
        self.layers, self.magnitude, self.deviation, self.erasing = layers, magnitude, deviation, erasing

    def draw(self, count: int) -> dict[str, Tensor]:
        # As torchvision's RandomResizedCrop: of ten boxes the first that fits, else the whole image.
        area, log_ratio = _uniform((count, 10), 0.08, 1), _uniform((count, 10), math.log(3 / 4), math.log(4 / 3))
        width, height = (area * log_ratio.exp()).sqrt(), (area / log_ratio.exp()).sqrt()
        size, fits = _first(width, height, (width <= 1) & (height <= 1))
        size[~fits] = 1.0
        shape = (count, self.layers)
        return {
            "size": size,  # of the crop, (width, height) in image widths
            "centre": _uniform((count, 2), -1, 1) * (1 - size),  # of the crop, in half image widths from the image's centre
            "flip": _coin(count),
            "operation": torch.where(_coin(shape), torch.randint(len(RANDAUGMENT), shape), -1),
            "level": torch.normal(self.magnitude, self.deviation, shape).clamp_(0, 10) / 10,
            "sign": 1 - 2 * _coin(shape).float(),
            "erase": torch.rand(count) < self.erasing,
            "box_area": _uniform((count, 10), 0.02, 1 / 3),
            "box_log_ratio": _uniform((count, 10), math.log(0.3), -math.log(0.3)),
            "box_place": torch.rand(count, 2),  # of the positions that the box can take, from left and from above
        }

    def place(self, drawn: dict[str, Tensor], images: Tensor) -> dict:
        height, width = images.shape[2:]
        # The rows of the batch sorted by kind of operation, anew for each layer, and how to get from one order to the next.
        rank, order = _RANK[drawn["operation"].T].sort(dim=1, stable=True)
        level, sign = (drawn[name].T.gather(1, order) for name in ("level", "sign"))
        as_they_came = torch.arange(len(drawn["flip"]))[None]
        orders = torch.cat([as_they_came, order, as_they_came])
        moves = orders[:-1].argsort(1).gather(1, orders[1:])
        flip, size, centre = (drawn[name][moves[0]] for name in ("flip", "size", "centre"))
        scale = torch.diag_embed(size * torch.stack([1 - 2 * flip.float(), torch.ones(len(flip))], 1))
        kinds = _one_hot(rank).sum(1)  # (layers, operations) images
        return _on_device(
            {
                "moves": moves,
                "flip": flip.view(-1, 1, 1, 1),
                "crop": torch.cat([scale, centre[:, :, None]], 2),
                "fill": torch.tensor(IMAGENET_MEAN).view(3, 1, 1),
                "row": ((2 * torch.arange(height) + 1) / height - 1).view(-1, 1),
                "column": (2 * torch.arange(width) + 1) / width - 1,
                **_parameters(rank, level, sign, height / width),
                **_boxes(drawn, height, width),
            },
            images.device,
        ) | {"kinds": kinds.tolist()}

    def apply(self, images: Tensor, placed: dict) -> Tensor:
        x = images.index_select(0, placed["moves"][0])
        if self.crop:
            sampling = {"mode": "bicubic", "padding_mode": "border"}
            x = _warp(x / 255, placed["crop"], placed["row"], placed["column"], **sampling).clamp_(0, 1)
        else:
            x = torch.where(placed["flip"], x.flip(3), x) / 255
        for layer in range(self.layers):
            _randaugment(x, layer, placed)
            x = x.index_select(0, placed["moves"][layer + 1])
        return x

    def finish(self, images: Tensor, placed: dict) -> Tensor:
        if len(rows := placed["erased"]):
            erased = images.index_select(0, rows)
            is_inside = placed["box_rows"] & placed["box_columns"]
            images.index_copy_(0, rows, torch.where(is_inside, torch.randn_like(erased), erased))
        return images


class FlipShift(Augmentation):
    """For photographs of 32 pixels or so: a shift by up to 4 pixels in each direction, zeros outside, and a horizontal flip
    with probability .5; He et al. 2016 (arXiv 1512.03385), section 4.2.
    """

    reach = 4

    def draw(self, count: int) -> dict[str, Tensor]:
        return {"shift": torch.randint(-self.reach, self.reach + 1, (count, 2)), "flip": _coin(count)}

    def apply(self, images: Tensor, placed: dict) -> Tensor:
        (height, width), edge = images.shape[2:], self.reach
        shift, flip = placed["shift"], placed["flip"]
        row = torch.arange(edge, edge + height, device=images.device) - shift[:, :1]
        column = torch.arange(edge, edge + width, device=images.device) - shift[:, 1:]
        column = torch.where(flip[:, None], column.flip(1), column)
        index = (row[:, :, None] * (width + 2 * edge) + column[:, None, :]).flatten(1)[:, None].expand(-1, images.shape[1], -1)
        return F.pad(images, (edge,) * 4).flatten(2).gather(2, index).view_as(images) / 255


AUGMENTATIONS = {"none": Augmentation, "flip_shift": FlipShift, "hdkd": HDKD, "deit": DeiT}

# timm's increasing operations in its order; and sorted, so that those of one formula are neighbours and none (-1) comes last.
RANDAUGMENT = (
    *("AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color", "Contrast"),
    *("Brightness", "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY"),
)
_LINEAR = ("SolarizeAdd", "Solarize", "Invert", "Brightness", "Contrast", "Color")
_GEOMETRIC = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")
_SORTED = (*_LINEAR, *_GEOMETRIC, "Posterize", "Sharpness", "AutoContrast", "Equalize")
_RANK = torch.tensor([*(_SORTED.index(name) for name in RANDAUGMENT), len(_SORTED)])
_PER_IMAGE = ("scale", "shift", "grey", "threshold", "step", "centre", "side", "theta")


def _parameters(rank: Tensor, level: Tensor, sign: Tensor, aspect: float) -> dict[str, Tensor]:
    """What timm makes of levels in [0, 1] and signs -1 or 1, for images of height / width `aspect`.

    All are (layers, B), sorted by rank; the results (layers, B, 1, 1, 1), and `theta` (layers, B, 2, 3).
    """
    is_drawn = dict(zip(_SORTED, _one_hot(rank).unbind(2), strict=True))
    is_added, is_reflected = is_drawn["SolarizeAdd"], is_drawn["Solarize"] | is_drawn["Invert"]
    signed = level * sign
    factor = (1 + 0.9 * signed).clamp_(min=0.1)
    side = (1 - factor) / 13
    reach = {"Rotate": math.radians(30), "ShearX": 0.3 * aspect, "ShearY": 0.3 / aspect, "TranslateX": 0.9, "TranslateY": 0.9}
    turn, shear_x, shear_y, move_x, move_y = (signed * is_drawn[name] * most for name, most in reach.items())
    cos, sin = turn.cos(), turn.sin()
    theta = torch.stack([cos, shear_x - sin * aspect, shear_x + move_x, sin / aspect + shear_y, cos, shear_y + move_y], 2)
    columns = {
        "scale": torch.where(is_added, 1, torch.where(is_reflected, -1, factor)),
        "shift": torch.where(is_added, (110 * level).floor_() / 255, is_reflected.float()),
        "grey": 1 - factor,
        "threshold": torch.where(is_added, 128, 256 - (256 * level).floor_()),
        "step": 2 ** (4 + (4 * level).floor_()),
        "centre": factor + 4 * side,
        "side": side,
    }
    return {name: values[..., None, None, None] for name, values in columns.items()} | {"theta": theta.unflatten(2, (2, 3))}


def _one_hot(rank: Tensor) -> Tensor:
    return rank[..., None] == torch.arange(len(_SORTED))


def _randaugment(x: Tensor, layer: int, placed: dict) -> None:
    """The operations of this layer, in place, on x in [0, 1], sorted as the layer's parameters are."""
    kinds, start = iter(placed["kinds"][layer]), 0
    for change, names in _CHANGES:
        counts = [next(kinds) for _ in names]
        rows = slice(start, start := start + sum(counts))
        if rows.start < start:
            change(x[rows], counts, placed | {name: placed[name][layer, rows] for name in _PER_IMAGE})


def _linear(x: Tensor, counts: list[int], placed: dict) -> None:
    """scale x + shift, on one side of a threshold or everywhere, and for contrast and colour a part of grey; cut to [0, 1]."""
    added, solarized, _, _, contrasted, coloured = counts
    y = (x * placed["scale"]).add_(placed["shift"])
    if thresholded := added + solarized:
        is_dark = x[:thresholded] * 255 < placed["threshold"][:thresholded]
        torch.where(is_dark[:added], y[:added], x[:added], out=y[:added])
        torch.where(is_dark[added:], x[added:thresholded], y[added:thresholded], out=y[added:thresholded])
    if blended := contrasted + coloured:
        grey = _grey(x[-blended:])
        grey[:contrasted] = grey[:contrasted].mean((2, 3), keepdim=True)
        y[-blended:] += grey.mul_(placed["grey"][-blended:])
    torch.clamp(y, 0, 1, out=x)


def _geometric(x: Tensor, counts: list[int], placed: dict) -> None:
    """Bilinear, with ImageNet's mean outside."""
    torch.add(_warp(x - placed["fill"], placed["theta"], placed["row"], placed["column"]), placed["fill"], out=x)


def _posterize(x: Tensor, counts: list[int], placed: dict) -> None:
    torch.mul((x * 255).round_().div_(placed["step"]).floor_(), placed["step"] / 255, out=x)


def _autocontrast(x: Tensor, counts: list[int], placed: dict) -> None:
    low, high = (bound[..., None, None] for bound in x.flatten(2).aminmax(dim=2))
    torch.where(high > low, (x - low).div_(high - low), x, out=x)


def _equalize(x: Tensor, counts: list[int], placed: dict) -> None:
    """PIL's and torchvision's, of values rounded down to 256 levels."""
    level = (x * 255.999).long().flatten(2)
    histogram = x.new_zeros(*level.shape[:2], 256).scatter_add_(2, level, x.new_ones(()).expand_as(level))
    step = (level.shape[2] - histogram.gather(2, level.amax(2, keepdim=True))).div_(255, rounding_mode="floor")
    half = step.div(2, rounding_mode="floor")
    table = histogram.cumsum(2).sub_(histogram).add_(half).div_(step, rounding_mode="floor").clamp_(max=255)
    table = torch.where(step > 0, table, torch.arange(256, device=x.device)).div_(255)  # step 0: hardly more than one level
    torch.gather(table, 2, level, out=x.view(level.shape))


_CHANGES = (
    (_linear, _LINEAR),
    (_geometric, _GEOMETRIC),
    (_posterize, ("Posterize",)),
    (lambda x, counts, placed: _sharpen(x, placed["centre"], placed["side"]), ("Sharpness",)),
    (_autocontrast, ("AutoContrast",)),
    (_equalize, ("Equalize",)),
)


def _boxes(drawn: dict[str, Tensor], height: int, width: int) -> dict[str, Tensor]:
    """timm's boxes of noise, of ten the first that is smaller than the image: which of the images are `erased`, and the rows
    (erased, 1, H, 1) and columns (erased, 1, 1, W) of their boxes.
    """
    area, ratio = drawn["box_area"] * (height * width), drawn["box_log_ratio"].exp()
    heights, widths = (area * ratio).sqrt_().round_(), (area / ratio).sqrt_().round_()
    size, fits = _first(widths, heights, (widths < width) & (heights < height))
    room = torch.tensor([width, height]) - size
    start = (drawn["box_place"] * (room + 1)).floor_().minimum(room)  # the product may be rounded up
    erased = (drawn["erase"] & fits).nonzero().flatten()
    (left, top), (right, bottom) = (corner[erased].T[:, :, None] for corner in (start, start + size))
    row, column = torch.arange(height), torch.arange(width)
    rows, columns = (top <= row) & (row < bottom), (left <= column) & (column < right)
    return {"erased": erased, "box_rows": rows[:, None, :, None], "box_columns": columns[:, None, None, :]}


def _first(width: Tensor, height: Tensor, fits: Tensor) -> tuple[Tensor, Tensor]:
    """Of several boxes (B, n) the first that fits, as (width, height), and whether one does."""
    first = fits.float().argmax(1, keepdim=True)
    return torch.cat([width.gather(1, first), height.gather(1, first)], 1), fits.any(1)


def _uniform(shape: int | tuple[int, ...], low: float, high: float) -> Tensor:
    return torch.empty(shape).uniform_(low, high)


def _coin(shape: int | tuple[int, ...]) -> Tensor:
    return torch.rand(shape) < 0.5


def _on_device(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The tensors on the device. All bytes go in one copy, which the host does not wait for."""
    if device.type == "cpu" or not tensors:
        return tensors
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())  # so that each begins at a multiple of its size
    parts = [values.contiguous().view(-1).view(torch.uint8) for _, values in ordered]
    packed = torch.cat(parts)
    packed = packed.pin_memory() if device.type == "cuda" else packed
    pieces = packed.to(device, non_blocking=True).split([len(part) for part in parts])
    return {name: piece.view(v.dtype).view(v.shape) for (name, v), piece in zip(ordered, pieces, strict=True)}


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


def _sharpen(x: Tensor, centre: Tensor, side: Tensor) -> None:
    """In place, but for the border: `centre` times x and `side` times the sum of the 3x3 pixels around it, cut to [0, 1].

    A blend by `factor` with PIL's smoothing filter, ones around a five over 13, has side (1 - factor) / 13 and centre
    factor + 4 side.
    """
    total = (x[..., :-2] + x[..., 2:]).add_(x[..., 1:-1])
    total = (total[..., :-2, :] + total[..., 2:, :]).add_(total[..., 1:-1, :])
    inside = x[..., 1:-1, 1:-1]
    torch.clamp(total.mul_(side).add_(inside * centre), 0, 1, out=inside)


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


def _warp(x: Tensor, theta: Tensor, row: Tensor, column: Tensor, **sampling: str) -> Tensor:
    """Samples x at theta (B, 2, 3) . (column, row, 1)."""
    by_column, by_row, shift = theta[..., None, None].unbind(2)
    grid = torch.addcmul(shift, by_row, row) + by_column * column  # (B, 2, H, W)
    return F.grid_sample(x, grid.permute(0, 2, 3, 1), align_corners=False, **sampling)
