"""Images from a teacher alone, for distillation without data: batch statistics inversion, and how good its images are.

Yin et al., "Dreaming to Distill: Data-free Knowledge Transfer via DeepInversion", CVPR 2020 (arXiv 1912.08795), with the
boundary-preserving intra-divergence loss that DearKD adds (Chen et al., CVPR 2022, arXiv 2204.12997). Images x are optimised
from noise, the teacher f stays as it is:

    L(x) = CE(f(x), y) + a_tv TV(x) + a_l2 |x| + a_bn R(x) + a_div L_BPID + a_comp (1 - JS(f(x), student(x)))
    R(x) = sum over batch norms l of c_l (|mu_l(x) - running mean_l| + |var_l(x) - running var_l|)          norms, not squares

Formulas and settings of DeepInversion from its paper and its public code's documentation; the code itself is non-commercial and
none of it is here. The form of L_BPID is OUR CHOICE: of DearKD's loss only its purpose is known [paper].
"""

import copy
import difflib
import json
import math
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import filelock
import torch
import torch.nn.functional as F
from PIL import Image
from timm.utils import random_seed
from torch import Tensor, nn
from tqdm import tqdm

from hdkd_lib import metrics
from hdkd_lib.data import Data, load
from hdkd_lib.data.batches import Part, Preprocess
from hdkd_lib.device import autocast, resolve_device, resolve_precision
from hdkd_lib.losses import batchnorm_loss, check_balance, competition_loss, intra_divergence_loss, total_variation
from hdkd_lib.methods.teacher import Teacher
from hdkd_lib.models import digest
from hdkd_lib.parameters import one_sentence
from hdkd_lib.runs import config_hash, read_json, results_dir, set_damaged_aside, write_atomically, write_json


@dataclass(frozen=True)
class Inversion:
    """How images are made.

    Attributes:
        batch_size: images that are optimised together; at least four of each of its classes.
        stages: (scale, iterations) in order: the images grow from scale * size to the size itself.
        warmup: iterations at the start of each stage in which the rate rises.
        cosine: whether the rate then falls to zero by a half cosine.
        tv, l2, batchnorm, divergence, competition: weights of the terms.
        first: factor of the first batch norm.
        jitter: largest shift in pixels per side at full size, around the edges; drawn anew in every iteration.
        flip: whether half of the iterations see the images mirrored.
        grey: whether the images have one channel, which the teacher sees three times (OUR CHOICE, for teachers of grey images).
    """

    batch_size: int
    lr: float
    stages: tuple[tuple[float, int], ...]
    betas: tuple[float, float] = (0.9, 0.999)
    warmup: int = 0
    cosine: bool = False
    tv: float = 0.0
    l2: float = 0.0
    batchnorm: float = 1.0
    first: float = 1.0
    divergence: float = 1.0
    competition: float = 0.0
    jitter: int = 0
    flip: bool = False
    grey: bool = False

    def __post_init__(self):
        scales = [scale for scale, _ in self.stages]
        if self.batch_size < 4 or self.lr <= 0 or not scales or scales[-1] != 1 or min(scales) <= 0:
            raise ValueError(f"an inversion needs batch_size >= 4, lr > 0 and stages that end at scale 1 (got {self})")


PRESETS = {
    # DeepInversion's for ResNet-34 on CIFAR-10 [code], but for the intra-divergence loss (OUR CHOICE, in all three presets).
    "cifar": Inversion(batch_size=256, lr=0.05, stages=((1.0, 2000),), tv=2.5e-5, batchnorm=10.0, jitter=2),
    # DeepInversion's for ResNet-50 on ImageNet [code].
    "imagenet": Inversion(
        batch_size=84,
        lr=0.25,
        betas=(0.5, 0.9),
        stages=((0.5, 2000), (1.0, 1000)),
        warmup=100,
        cosine=True,
        tv=1e-4,
        l2=1e-5,
        batchnorm=0.01,
        first=10.0,
        jitter=30,
        flip=True,
    ),
    # OUR CHOICE, for images of 16 to 64 pixels and nano teachers on a CPU, found on digits: of a few tries the nearest to real
    # images in the teacher's features (Frechet distance).
    "small": Inversion(
        batch_size=80, lr=0.3, stages=((0.5, 100), (1.0, 200)), warmup=10, cosine=True, tv=1e-2, batchnorm=0.1, jitter=1
    ),
}


@one_sentence
def settings(preset: str = "small", *, per_class: int = 5, **changes) -> Inversion:
    """The settings of this name in `PRESETS`, with some of them changed.

    Args:
        per_class: images of every class that are to be made; it changes nothing, but is checked early here.

    Raises:
        ValueError: there is no such preset or setting, or a value is out of range.
    """
    if per_class < 5:
        raise ValueError(f"per_class must be at least 5, of which one is for validation (got {per_class})")
    chosen = _preset(preset)
    for name in changes:
        if name not in Inversion.__dataclass_fields__:
            near = difflib.get_close_matches(name, Inversion.__dataclass_fields__, n=1)
            raise ValueError(f"an inversion has no setting {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    return replace(chosen, **changes)


def _preset(name: str) -> Inversion:
    if name not in PRESETS:
        raise ValueError(f"a preset of inversion is one of {', '.join(PRESETS)} (got {name!r})")
    return PRESETS[name]


class _FeatureExtractor(nn.Module):
    """A teacher that also gives the inputs of its batch norms and of its classifier, of one pass.

    Raises:
        ValueError: it has no batch norm with statistics.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network.requires_grad_(False).eval()
        modules = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
        self.norms = [norm for norm in modules if norm.running_mean is not None]
        if not self.norms:
            norms = sorted({type(module).__name__ for module in network.modules() if "Norm" in type(module).__name__})
            raise ValueError(
                f"{type(network).__name__} cannot be inverted: it has no batch norm, whose statistics the images are made from "
                f"({', '.join(norms) or 'no norm at all'} holds none); take a ResNet, RegNet, EfficientNet or hdkd_teacher"
            )

    @contextmanager
    def recording(self) -> Iterator[dict]:
        seen: dict = {}
        handles = [norm.register_forward_pre_hook(lambda m, x: seen.setdefault(m, x[0])) for norm in self.norms]
        classifier = self.network.get_classifier()  # of a CNN: one module
        handles.append(classifier.register_forward_pre_hook(lambda m, x: seen.__setitem__("features", x[0])))
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, list[Tensor], list[nn.BatchNorm2d]]:
        """Logits (B, K), features (B, D), and inputs of the batch norms with these, in the order of their use."""
        with self.recording() as seen:
            logits = self.network(images)
        used = [norm for norm in seen if norm != "features"]
        return logits, seen["features"].flatten(1), [seen[norm] for norm in used], used


def invert(
    teacher: nn.Module,
    labels: Tensor,
    image_size: int,
    settings: Inversion,
    *,
    student: nn.Module | None = None,
    seed: int = 0,
    precision: str = "float32",
    snapshot_at: Sequence[int] = (),
    progress: tqdm | None = None,
    iterations: int | None = None,
) -> tuple[Tensor, dict]:
    """One batch of images (B, 3, size, size), uint8 on the CPU, of the lowest loss at full size, and how it went.

    The second result names each term's value at that point ("loss", "class_loss", ...), "accuracy" (the teacher's, of the
    images as returned), and "snapshots": {iteration: images} for the iterations `snapshot_at`.

    Args:
        labels: (B,) classes to be seen by the teacher; for `settings.divergence` balanced.
        teacher: is left frozen and in eval mode.
        student: whose disagreement with the teacher `settings.competition` rewards; left as it is.
        progress: a bar that is moved by one for every iteration.
        iterations: stop after so many (a probe of the time they take).

    Raises:
        ValueError: the teacher has no batch norm, labels are not balanced, or one of competition and student without the other.
        FloatingPointError: the loss is no longer a number.
    """
    device = next(teacher.parameters()).device
    if settings.divergence:
        check_balance(labels)
    if bool(settings.competition) != (student is not None):
        raise ValueError("competition needs a student to compete with, and no other term has one; set both or neither")
    extractor = _FeatureExtractor(teacher)
    prepare = Preprocess(teacher).to(device)
    mean, std = prepare.mean, prepare.std
    # x is in the teacher's normalisation, or, where it is grey, in the mean of its channels'.
    own_mean, own_std = (v.mean(1, keepdim=True) if settings.grey else v for v in (mean, std))
    black, white = (0 - own_mean) / own_std, (1 - own_mean) / own_std
    competitor = None if student is None else Teacher(copy.deepcopy(student), teacher).to(device)
    labels = labels.to(device)
    random_seed(seed)
    size = max(1, round(settings.stages[0][0] * image_size))
    x = torch.randn(len(labels), own_mean.shape[1], size, size, device=device)
    best, best_loss, snapshots, done = None, None, {}, 0

    for scale, count in settings.stages:
        size = max(1, round(scale * image_size))
        if x.shape[-1] != size:
            x = F.interpolate(x.detach(), size=(size, size), mode="nearest")
        x = x.detach().requires_grad_()
        optimizer = torch.optim.Adam([x], lr=settings.lr, betas=settings.betas)
        reach = round(settings.jitter * scale)
        for i in range(count):
            if done in snapshot_at:
                snapshots[done] = _pixels(x, own_mean, own_std)
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * _rate(i, count, settings)
            shift = torch.randint(-reach, reach + 1, (2,)).tolist()
            whole = (x * own_std + own_mean - mean) / std if settings.grey else x
            seen = whole.roll(shift, (2, 3))
            if settings.flip and torch.rand(()) < 0.5:
                seen = seen.flip(3)
            with autocast(device, precision):
                terms = _terms(extractor, competitor, whole, seen, labels, image_size, settings)
            loss = torch.stack(list(terms.values())).sum()
            if scale == 1:
                values = torch.stack([loss, *terms.values()]).detach()
                if best is None:
                    best, best_loss = x.detach().clone(), values
                is_better = values[0] < best_loss[0]  # kept on the device: nothing waits for it
                best, best_loss = torch.where(is_better, x.detach(), best), torch.where(is_better, values, best_loss)
            [x.grad] = torch.autograd.grad(loss, [x])
            optimizer.step()
            with torch.no_grad():
                x.copy_(torch.minimum(torch.maximum(x, black), white))
            done += 1
            if progress is not None:
                progress.update()
            if done == iterations:
                return _pixels(x, own_mean, own_std), {}
            if (done % 50 == 0 or i == count - 1) and not torch.isfinite(loss + x.sum()):
                raise FloatingPointError(f"the loss became {loss.item()} in iteration {done}")
    if done in snapshot_at:
        snapshots[done] = _pixels(x, own_mean, own_std)
    images = _pixels(best, own_mean, own_std)
    with torch.inference_mode():
        decided = teacher(prepare(images.to(device))).argmax(1)
    report = dict(zip(["loss", *terms], best_loss.tolist(), strict=True))
    return images, report | {"accuracy": (decided == labels).float().mean().item(), "snapshots": snapshots}


def _terms(
    extractor: _FeatureExtractor,
    student: Teacher | None,
    x: Tensor,
    seen: Tensor,
    labels: Tensor,
    image_size: int,
    settings: Inversion,
) -> dict[str, Tensor]:
    """The weighted terms of the loss of images x, of which the networks see `seen`."""
    logits, features, inputs, norms = extractor(seen)
    terms = {
        "class_loss": F.cross_entropy(logits.float(), labels),
        "batchnorm_loss": settings.batchnorm * batchnorm_loss(inputs, norms, settings.first),
    }
    if settings.tv:
        terms["tv_loss"] = settings.tv * total_variation(x)
    if settings.l2:
        terms["l2_loss"] = settings.l2 * x.flatten(1).norm(dim=1).mean()
    if settings.divergence:
        terms["divergence_loss"] = settings.divergence * intra_divergence_loss(features, labels, check=False)
    if settings.competition:  # transformers take images of one size
        size = (image_size, image_size)
        whole = seen if tuple(seen.shape[2:]) == size else F.interpolate(seen, size=size, mode="bilinear")
        student_logits = student.network(student.prepare(whole))
        terms["competition_loss"] = settings.competition * competition_loss(logits, student_logits)
    return terms


def _rate(i: int, count: int, settings: Inversion) -> float:
    if i < settings.warmup:
        return (i + 1) / settings.warmup
    if not settings.cosine:
        return 1.0
    return (1 + math.cos(math.pi * (i - settings.warmup) / max(1, count - settings.warmup))) / 2


def _pixels(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Of one channel or three: uint8 (B, 3, H, W)."""
    return ((x.detach() * std + mean) * 255).round().clamp(0, 255).byte().expand(-1, 3, -1, -1).cpu()


def synthesize(
    teacher: nn.Module,
    classes: Sequence[str],
    per_class: int,
    folder: str | Path,
    *,
    image_size: int,
    settings: Inversion | str = "small",
    student: nn.Module | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
) -> Path:
    """Writes `per_class` images of every class as FOLDER/CLASS/*.png, an image folder that `data.load("folder", ...)` reads.

    An interrupted call goes on with the batch it was in. FOLDER/synthesis.json says what was requested and how each batch went.
    The time that it will take is printed first, from a probe of 20 iterations. A batch whose loss is no longer a number is
    begun again with half the rate, up to three times, and says so.

    Args:
        teacher: in the end on `device`, with its weights as they were; a network with batch norm.
        classes: names in the order of its labels.
        per_class: at least 4; `data.load` splits no fewer than 5.
        settings: an `Inversion`, or the name of a preset: cifar, imagenet, small.
        student: see `invert`.

    Raises:
        ValueError: other classes than the teacher's, too few images, a folder that holds other images, or as `invert`.
        FloatingPointError: also the third restart of a batch failed.
    """
    settings = _preset(settings) if isinstance(settings, str) else settings
    if len(classes) != teacher.num_classes or per_class < 4:
        raise ValueError(
            f"the teacher has {teacher.num_classes} classes and needs as many names, and at least 4 images of each "
            f"(got {len(classes)} and {per_class})"
        )
    if unfit := [name for name in classes if Path(name).name != name]:
        raise ValueError(f"{unfit[0]!r} cannot name a folder; give the classes other names")
    device = resolve_device(device)
    precision = resolve_precision(precision, device)
    teacher = teacher.to(device, memory_format=torch.channels_last)
    folder = Path(folder)
    request = {
        "settings": json.loads(json.dumps(asdict(settings))),
        "classes": list(classes),
        "per_class": per_class,
        "image_size": image_size,
        "seed": seed,
        "teacher": digest(teacher),
        "student": student and digest(student),
    }
    record = folder / "synthesis.json"
    if record.exists() and read_json(record) is None:
        set_damaged_aside(folder)  # nobody knows what these images are
    state = read_json(record) or {"request": request, "batches": []}
    if state["request"] != request or (not record.exists() and folder.exists() and any(folder.iterdir())):
        raise ValueError(f"{folder} holds images that were made otherwise; give another folder or remove it")
    batches = _batches(len(classes), per_class, settings.batch_size)
    if len(state["batches"]) == len(batches):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    write_json(record, state)  # before anything else: it tells whose images these are
    for name in classes:
        (folder / name).mkdir(exist_ok=True)

    each = sum(count for _, count in settings.stages)
    left = batches[len(state["batches"]) :]
    common = {"student": student, "precision": precision}
    start, probe = time.perf_counter(), min(20, each)
    invert(teacher, left[0][0], image_size, replace(settings, stages=((1.0, each),)), iterations=probe, **common)
    seconds = (time.perf_counter() - start) / probe * len(left) * sum(scale**2 * count for scale, count in settings.stages)
    print(f"{len(left)} batches of {each} iterations: about {seconds / 60:.1f} min on {device}")
    with tqdm(total=len(left) * each, desc="images", disable="TQDM_DISABLE" in os.environ) as bar:
        for labels, first in left:
            number, begun = len(state["batches"]), time.perf_counter()
            images, report = _invert_or_restart(teacher, labels, image_size, settings, seed, number, bar, common)
            for image, label, index in zip(images, labels.tolist(), first, strict=True):
                path = folder / classes[label] / f"{index:05d}.png"
                png = Image.fromarray(image.permute(1, 2, 0).numpy())
                write_atomically(path, lambda aside, png=png: png.save(aside, format="png"))
            report |= {"seconds": round(time.perf_counter() - begun, 1)}
            state["batches"].append({name: value for name, value in report.items() if name != "snapshots"})
            write_json(record, state)
    return folder


@one_sentence
def replace_training(
    data: Data,
    teacher: nn.Module,
    *,
    per_class: int,
    folder: str | Path | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
    **of_settings,
) -> Data:
    """The data with images from the teacher in place of those for training and validation; the test part stays real.

    The images are made once and kept, so that runs with one teacher share them. The card has the seconds of their making as
    `synthesis_seconds`, and as `synthesis_quality` what `quality` says of those for training beside the real images for
    validation, which are used for nothing else.

    Args:
        per_class: images of every class, at least 5, of which a part is for validation.
        folder: where they are kept, each set in a folder of its own; default: results/runs/synthetic.
        of_settings: of `settings`, such as preset="cifar", divergence=0.0.

    Raises:
        ValueError, FloatingPointError: as `settings` and `synthesize`.
    """
    chosen, size = settings(per_class=per_class, **of_settings), data.config["image_size"]
    request = {"settings": asdict(chosen), "teacher": digest(teacher), "per_class": per_class, "size": size, "seed": seed}
    place = Path(folder or results_dir() / "runs" / "synthetic") / config_hash(request)
    place.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(place.with_suffix(".lock")):  # of two runs that want these images the second waits
        options = {"image_size": size, "settings": chosen, "seed": seed, "device": device, "precision": precision}
        synthesize(teacher, data.classes, per_class, place, **options)
    seconds = sum(batch["seconds"] for batch in json.loads((place / "synthesis.json").read_text())["batches"])
    synthetic = load("folder", place, image_size=size)
    made = data.trained_on(synthetic)
    measured = {name: round(value, 4) for name, value in quality(teacher, made.train, data.val).items()}
    return replace(made, card=data.card | {"synthesis_seconds": round(seconds, 1), "synthesis_quality": measured})


def _invert_or_restart(teacher, labels, image_size, settings, seed, number, bar, common) -> tuple[Tensor, dict]:
    for restarts in range(4):
        slower = replace(settings, lr=settings.lr / 2**restarts)
        begun = bar.n
        try:
            batch_seed = (1_000_003 * (seed + 1) + number) % 2**32
            images, report = invert(teacher, labels, image_size, slower, seed=batch_seed, progress=bar, **common)
            return images, report | {"restarts": restarts}
        except FloatingPointError as error:
            reason = error
            bar.update(begun - bar.n)
            if restarts < 3:
                warnings.warn(f"batch {number}: {error}; begun again with lr={slower.lr / 2:g}", stacklevel=3)
    raise FloatingPointError(
        f"batch {number} failed at four rates ({reason}); lower lr or the weights of the terms"
    ) from reason


def _batches(classes: int, per_class: int, batch_size: int) -> list[tuple[Tensor, list[int]]]:
    """Batches as (labels, number of each image in its class): equally many of each class, at least four, and two classes."""
    each = min(per_class, max(4, batch_size // classes))
    groups = torch.arange(classes).tensor_split(max(1, classes // max(2, batch_size // each)))
    rounds = torch.arange(per_class).tensor_split(per_class // each)
    return [
        (group.repeat_interleave(len(numbers)), numbers.repeat(len(group)).tolist()) for numbers in rounds for group in groups
    ]


# Quality


@torch.inference_mode()
def features(teacher: nn.Module, images: Tensor, batch_size: int = 256) -> tuple[Tensor, Tensor]:
    """Logits (N, K) and the features before the classifier (N, D), on the CPU, of uint8 images (N, 3, H, W)."""
    device = next(teacher.parameters()).device
    prepare, extractor = Preprocess(teacher).to(device), _FeatureExtractor(teacher)
    parts = [extractor(prepare(images[i : i + batch_size].to(device)))[:2] for i in range(0, len(images), batch_size)]
    logits, found = (torch.cat([part[k].float().cpu() for part in parts]) for k in (0, 1))
    return logits, found


@torch.inference_mode()
def statistics_gap(teacher: nn.Module, images: Tensor, batch_size: int = 64) -> list[dict]:
    """Per batch norm, in the order of use: `layer`; `mean`, the root mean square over channels of the difference of the images'
    mean to the running one, in running standard deviations; `var`, the mean absolute logarithm of the ratio of variances. The
    statistics are those of all images (N, 3, H, W), uint8, together.
    """
    device = next(teacher.parameters()).device
    names = {module: name for name, module in teacher.named_modules()}
    prepare, extractor = Preprocess(teacher).to(device), _FeatureExtractor(teacher)
    moments: dict[nn.BatchNorm2d, Tensor] = {}  # mean of x and of x^2 per channel, (2, C)
    for batch in images.split(batch_size):
        _, _, inputs, norms = extractor(prepare(batch.to(device)))
        for x, norm in zip(inputs, norms, strict=True):
            var, mean = (part.cpu().double() for part in torch.var_mean(x.float(), (0, 2, 3), correction=0))
            moments[norm] = moments.get(norm, 0) + torch.stack([mean, var + mean**2]) * len(batch) / len(images)
    rows = []
    for norm, (mean, square) in moments.items():
        kept = norm.running_var.cpu().double() + norm.eps
        gaps = {
            "mean": ((mean - norm.running_mean.cpu()).square() / kept).mean().sqrt().item(),
            "var": ((square - mean**2 + norm.eps) / kept).log().abs().mean().item(),
        }
        rows.append({"layer": names[norm], **gaps})
    return rows


def quality(teacher: nn.Module, synthetic: Part, real: Part) -> dict[str, float]:
    """What a part of synthetic images is worth beside one of real images, by the teacher that they were made from.

    `accuracy` (its decisions against the labels), `diversity`, `precision`, `recall`, `frechet_distance` and `statistics_gap`
    (mean over layers and both statistics).
    """
    parts = {}
    for name, part in (("synthetic", synthetic), ("real", real)):
        images = part.images[torch.arange(len(part))]
        parts[name] = (images, *features(teacher, images))
    images, logits, found = parts["synthetic"]
    precision, recall = metrics.precision_recall(parts["real"][2], found)
    gaps = statistics_gap(teacher, images)
    return {
        "accuracy": (logits.argmax(1) == synthetic.labels).float().mean().item(),
        "diversity": metrics.diversity(found, synthetic.labels),
        "precision": precision,
        "recall": recall,
        "frechet_distance": metrics.frechet_distance(parts["real"][2], found),
        "statistics_gap": sum(row["mean"] + row["var"] for row in gaps) / (2 * len(gaps)),
    }
