"""How long a run will take: a few steps of its networks are timed on this machine, and nothing is trained."""

import time
from collections.abc import Mapping

import torch

from hdkd_lib import data, inversion, models, recipes
from hdkd_lib.methods import Supervised
from hdkd_lib.methods.base import Teacher
from hdkd_lib.training import autocast, resolve_device, resolve_precision


def seconds(parameters: Mapping, teacher: Mapping | None = None) -> float:
    """Training time of a run with these notebook parameters, and those of the run that trains its teacher, if it has one.

    The networks run as they do in training, on random images: the student forwards and backwards, the teacher forwards, and
    once an epoch the student on the validation part. Images that are made by inversion count with the time of making them.
    Augmentation, decoding, the optimiser's step and the notebook's own seconds are left out, and teachers and comparisons that
    a notebook trains itself.

    Raises:
        FileNotFoundError: the data are not there.
    """
    which = {k: parameters[k] for k in ("image_size", "protocol", "fold", "fraction", "draws", "draw") if k in parameters}
    images = data.load(parameters["dataset"], parameters["root"], **which)
    recipe = parameters["recipe"]
    if not isinstance(recipe, Mapping):  # a chapter's
        recipe = {"name": recipe, "epochs": parameters["epochs"], "batch_size": parameters["batch_size"]}
    plan = recipes.get(**recipe)
    device = resolve_device(parameters["device"])
    precision = resolve_precision(parameters["precision"], device)
    batch = plan.batch_size if device.type == "cuda" else min(plan.batch_size, 8)

    def create(of: Mapping) -> torch.nn.Module:
        size = {"num_classes": len(images.classes), "img_size": parameters["image_size"]}
        return models.create(of["network"], **size, **of["network_options"]).to(device, memory_format=torch.channels_last)

    if teacher is None and "teacher_network" in parameters:  # the notebook has its own
        teacher = {"network": parameters["teacher_network"], "network_options": {}}
    task = Supervised(student=create(parameters)).to(device)
    expert = None if teacher is None else Teacher(create(teacher), task.student).to(device)
    pictures = torch.randn(batch, 3, *[parameters["image_size"]] * 2, device=device).contiguous(
        memory_format=torch.channels_last
    )
    labels = torch.randint(len(images.classes), (batch,), device=device)

    def forward(task: Supervised = task) -> torch.Tensor:
        with autocast(device, precision):
            return task(pictures, labels)["loss"]

    def step() -> None:
        forward().backward()
        if expert is not None:
            with autocast(device, precision):
                expert(pictures)

    count, making = len(images.train), 0.0
    if "per_class" in parameters:  # 07_data_free: the teacher makes the images
        count = parameters["per_class"] * len(images.classes)
        inverted = Supervised(student=create(teacher)).to(device)
        iterations = sum(scale**2 * each for scale, each in inversion.preset(parameters["preset"]).stages)
        making = iterations * count * _timed(lambda: forward(inverted).backward(), device)
    per_epoch = count * _timed(step, device) + len(images.val) * _timed(torch.no_grad()(forward), device)
    return (making + plan.epochs * per_epoch) / batch


def _timed(action, device: torch.device, repeats: int = 2) -> float:
    """Seconds of one call, the best of a few after the first."""
    best = float("inf")
    for i in range(repeats + 1):
        start = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if i:
            best = min(best, time.perf_counter() - start)
    return best
