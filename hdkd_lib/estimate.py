"""How long a run will take: a few of its own steps are timed on this machine, and nothing is kept of them."""

import functools
import itertools
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from tqdm import tqdm

from hdkd_lib import data, inversion, models, recipes
from hdkd_lib.data.batches import Part
from hdkd_lib.device import resolve_device, resolve_precision, tune
from hdkd_lib.evaluation import predict
from hdkd_lib.experiment import Experiment, build
from hdkd_lib.methods import Supervised
from hdkd_lib.methods.base import Distillation
from hdkd_lib.runs import Run
from hdkd_lib.training import Epoch, Inputs, Training, make_optimizer, train_epoch

REPLICATE = ("fold", "draw", "fraction", "seed", "run_dir")  # they change how many images there are, not the time of each
SPLIT = ("protocol", "draws", "val_per_class", "groups", "join_chains", "download")  # of `data.load`
CPU_BATCH = 32  # on a CPU a larger batch takes as long for each image


def seconds(parameters: Mapping, teacher: Mapping | None = None) -> float:
    """Seconds that a run with these parameters of run.ipynb will train; of `teacher`, those of its teacher's run, the network
    counts.

    Timed are a few steps of the experiment itself, of its first stage and, where its teacher stops, of its second, and the
    prediction of validation images, once an epoch. Images that the teacher makes count with the time of making them. Loading,
    and the prediction of training and test images at the end, are left out.

    Raises:
        FileNotFoundError: the data are not there.
    """
    same = {key: value for key, value in parameters.items() if key not in ("teacher", *REPLICATE)}
    if teacher and "run_dir" in teacher and "network" not in teacher:  # a finished run, of no arm
        creation = Run(teacher["run_dir"]).config["method"]["student"]
        options = {key: value for key, value in creation.items() if key not in ("name", "num_classes", "img_size")}
        teacher = {"network": creation["name"], "network_options": options}
    of_teacher = teacher and {"network": teacher["network"], "network_options": teacher.get("network_options", {})}
    train, evaluate, make = _seconds_per_image(json.dumps(same), json.dumps(of_teacher))
    split = {key: parameters[key] for key in (*SPLIT, "fold", "fraction")}
    counts = _counts(parameters["dataset"], parameters["root"], parameters["image_size"], json.dumps(split))
    images = parameters["synthesis"].get("per_class", 0) * counts["classes"] or counts["train"]
    return make * images + recipes.get(**parameters["recipe"]).epochs * (train * images + evaluate * counts["val"])


@functools.cache
def _counts(dataset: str, root: str, image_size: int, split: str) -> dict[str, int]:
    loaded = data.load(dataset, root, image_size=image_size, **json.loads(split))
    return {"train": len(loaded.train), "val": len(loaded.val), "classes": len(loaded.classes)}


@functools.cache
def _seconds_per_image(parameters: str, teacher: str) -> tuple[float, float, float]:
    """Of a training step, of prediction, and of making an image; the arguments are JSON."""
    of, its_teacher = json.loads(parameters), json.loads(teacher)
    loaded = data.load(of["dataset"], of["root"], image_size=of["image_size"], **{key: of[key] for key in SPLIT})
    network = None
    if its_teacher:
        size = {"num_classes": len(loaded.classes), "img_size": of["image_size"]}
        network = models.create(its_teacher["network"], **size, **its_teacher["network_options"] | {"pretrained": False})
    recipe = recipes.get(**of["recipe"])
    options = {key: of[key] for key in ("network_options", "method", "options")}
    experiment = build(loaded, of["network"], recipe, teacher=network, **options)
    execution = {"device": of["device"], "precision": of["precision"]}
    train, evaluate = time_of(experiment, **execution)
    if not of["synthesis"]:
        return train, evaluate, 0.0
    settings = inversion.settings(**of["synthesis"])
    step, _ = time_of(replace(experiment, task=Supervised(student=network.requires_grad_(True))), **execution)
    return train, evaluate, step * sum(scale**2 * count for scale, count in settings.stages)


def time_of(experiment: Experiment, *, device: str = "auto", precision: str = "auto") -> tuple[float, float]:
    """Seconds per image of a training step, with all that belongs to it, and of a prediction."""
    device = resolve_device(device)
    precision = resolve_precision(precision, device)
    tune(device)
    task, recipe = experiment.task.to(device, memory_format=torch.channels_last), experiment.recipe
    if device.type == "cpu":
        recipe = replace(recipe, batch_size=min(recipe.batch_size, CPU_BATCH))
    training = Training(task, experiment.data, recipe, None, 0, device, precision)
    inputs, (optimizer, _) = Inputs(training), make_optimizer(task, recipe)
    task.is_fresh = False  # a few steps move its student
    until = task.distill_until if isinstance(task, Distillation) else 1.0
    size = min(recipe.batch_size, len(inputs))
    stream = itertools.chain.from_iterable(map(inputs.epoch, itertools.count()))
    stream = (batch for batch in stream if len(batch[0]) == size)  # an epoch's last batch may be smaller

    def step() -> None:
        train_epoch(itertools.islice(stream, 1), optimizer, training, tqdm(disable=True), Epoch())

    train = 0.0
    for progress, share in ((0.0, until), (1.0, 1 - until)):
        if share:
            task.set_progress(progress)
            train += share * _best(step, device)
    val = experiment.data.val
    some = Part(val.images[:size], val.labels[:size], val.ids[:size], val.groups[:size])
    return train / size, _best(lambda: predict(task, some, precision=precision), device) / len(some)


def _best(action: Callable, device: torch.device, repeats: int = 3) -> float:
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
