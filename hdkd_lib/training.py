"""Training: `fit`, and the loop."""

import inspect
import math
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from timm.data import Mixup
from timm.optim import create_optimizer_v2, get_optimizer_class, param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import random_seed, unwrap_model
from torch import Tensor, nn
from tqdm import tqdm

from hdkd_lib import distributed, metrics, models, runs
from hdkd_lib.data import Data
from hdkd_lib.data.augment import AUGMENTATIONS
from hdkd_lib.data.batches import Files, Preprocess, batches
from hdkd_lib.data.imbalance import class_weights, smote
from hdkd_lib.device import autocast, resolve_compile, resolve_device, resolve_precision, tune
from hdkd_lib.evaluation import check_classes, evaluate, predict
from hdkd_lib.methods.base import Distillation, Method
from hdkd_lib.methods.teacher import check_provenance, check_skill
from hdkd_lib.recipes import Recipe
from hdkd_lib.runs import Run, write_atomically, write_json


@dataclass(frozen=True)
class Training:
    """A run to be trained: what learns, from what, how and where."""

    task: Method
    data: Data
    recipe: Recipe
    run: Run | None  # None where steps are timed only
    seed: int
    device: torch.device
    precision: str
    cache_on_device: str | bool = "auto"
    compile: bool = False
    resume: bool = True
    checkpoint_seconds: float = 60.0


def fit(
    task: Method,
    data: Data,
    recipe: Recipe,
    run_dir: str | Path | None = None,
    *,
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
    cache_on_device: str | bool = "auto",
    compile: str | bool = "auto",
    num_processes: int = 1,
    checkpoint_seconds: float = 60.0,
    resume: bool = True,
    force: bool = False,
) -> Run:
    """Trains the task's student, measures it and returns the run; a finished one of the same configuration is not repeated.

    The epoch with the highest validation balanced accuracy (then the lowest validation cross-entropy) is "best". The test part
    is touched once, at the end, with those weights, with the last ones and with their moving average, if the recipe has one;
    the predictions of each are kept. An interrupted and resumed run ends with the weights of an uninterrupted one (bitwise on
    one CPU with one number of threads): each epoch draws its randomness from (seed, epoch) alone, and a checkpoint within an
    epoch keeps the generators (image files are cropped in other processes: those crops are drawn anew). On SIGTERM the run
    keeps its state before it ends. Damaged files are set aside, and the run goes on from the best state that is whole
    (`runs.mend`). With `recipe.protocol` "paper" the test part chooses the epoch, by accuracy.

    Args:
        run_dir: the run folder; default: one named after the configuration, under results/runs/interactive/.
        device: "auto" (CUDA, then Apple's MPS, then the CPU) or a torch device.
        precision: "float32" (on NVIDIA's GPUs convolutions and products in TF32), "bf16" (autocast), or "auto": bf16 on GPUs
            that have it.
        cache_on_device: whether the images are kept in the device's memory; "auto": if they fill at most half of it.
        compile: whether networks are compiled (torch.compile); "auto": on GPUs, if the run is long enough to repay it. Like
            num_processes it is no part of the configuration: the weights differ by rounding, and by what a network drops at
            random, which compiled code draws in another way.
        num_processes: train in so many processes, each with its share of every batch, on as many GPUs, or on the CPU. It is no
            part of the configuration: the weights are those of one process but for rounding where nothing is drawn for a batch
            (augmentation, mixup) or counted in one (class weights, DearKD's standardised targets, and on CPUs batch norm).
        checkpoint_seconds: how much work may be lost; besides, each epoch ends with a checkpoint. In several processes there
            are the epochs' alone.
        resume: whether to go on from the folder's checkpoint.
        force: whether a teacher may teach that is no better than chance on the validation part.

    Raises:
        ValueError: the classes of data and student differ, an argument is unknown, the task was trained in another run, or the
            teacher is at chance level, was trained on other classes or has seen test images.
        FloatingPointError: the loss is no longer a number; the last checkpoint is kept.
        MemoryError: a batch does not fit the device's memory.
        RuntimeError: one of several processes failed, from whatever cause.
    """
    device = resolve_device(device)
    precision = resolve_precision(precision, device)
    distributed.check_count(num_processes, device)
    steps = recipe.epochs * math.ceil(len(data.train) / recipe.batch_size)
    compile = resolve_compile(compile, device, steps)
    tune(device)
    check_classes(task.student, data)
    is_distillation = isinstance(task, Distillation)
    if is_distillation:
        check_provenance(task.teacher.network, data, recipe)
    config = {
        "method": task.describe() | ({"teacher_weights": models.digest(task.teacher)} if is_distillation else {}),
        "data": data.config,
        "recipe": asdict(recipe),
        "seed": seed,
        "precision": precision,
    }
    with runs.lock(runs.place(run_dir, config)):
        run = Run.create(run_dir, config)
        if run.is_finished:
            _remove_checkpoints(run)
            print(f"already trained: {run.shown_path}")
            return run
        if not task.is_fresh and not (resume and any((run.path / name).exists() for name in runs.CHECKPOINTS)):
            raise ValueError("this task's student is trained already, and a new run must not start from it; create both again")
        task.to(device, memory_format=torch.channels_last)
        if is_distillation:
            skill = evaluate(task.teacher.network, data, "val", device=device, precision=precision)["balanced_accuracy"]
            print(f"teacher on validation: balanced accuracy {skill:.3f}, chance {1 / len(data.classes):.3f}")
            if not force:
                check_skill(skill, len(data.classes), len(data.val))
        task.is_fresh = False
        task.student.is_trained = True
        if recipe.protocol == "paper":
            data = data.chosen_on_test()
            task.follow_paper()
        training = Training(
            task, data, recipe, run, seed, device, precision, cache_on_device, compile, resume, checkpoint_seconds
        )
        if num_processes == 1:
            train(training)
        else:
            distributed.spawn(train, training, num_processes)
            task.to(device).student.load_state_dict(load_file(run.path / "best.safetensors"))
    return run


def train(training: Training) -> None:
    """Epoch after epoch: train, choose, checkpoint; at the end, measure. In each of several processes, if there are some."""
    task, data, recipe, run = training.task, training.data, training.recipe, training.run
    inputs, validation = Inputs(training), data.val.on_device(training.device, training.cache_on_device)
    optimizer, scheduler = make_optimizer(task, recipe)
    if recipe.ema:
        task.setup_ema(decay=recipe.ema)
    history, best, epoch = _restore(training, optimizer)
    distributed.sync_batch_norms(task, training.device)
    if training.compile:
        task.compile(dynamic=False)
    distributed.prepare(task, training.device)
    rank, processes = distributed.rank_and_count()
    if rank == 0:
        if len(history) < recipe.epochs or not (run.path / "environment.json").exists():  # else it has been trained elsewhere
            execution = {"processes": processes, "compiled": training.compile}
            before = runs.read_json(run.path / "environment.json") if history or epoch.steps else None
            write_json(run.path / "environment.json", runs.environment(training.device, before) | execution)
        if len(history) < recipe.epochs:
            (run.path / "checksums.json").unlink(missing_ok=True)
        _write_split(run, data, with_groups=False)
        if history:  # whose last row is not in the table if the process was killed after the checkpoint
            _write_history(run, history)
        _announce(training, len(history))
    lag, criterion = (1, "accuracy") if recipe.protocol == "paper" else (0, "balanced_accuracy")
    bar = tqdm(
        desc=type(task).__name__, initial=len(history) * len(inputs) + epoch.images, total=recipe.epochs * len(inputs),
        unit="image", unit_scale=True, leave=False, disable="TQDM_DISABLE" in os.environ or rank > 0,
    )  # fmt: skip
    with _ended_by_sigterm() as is_ended:
        for number in range(first := len(history), recipe.epochs):
            start = time.perf_counter()
            scheduler.step(max(0, number - lag))
            task.set_progress(number / recipe.epochs)
            row = {"epoch": number, "lr": max(group["lr"] for group in optimizer.param_groups)}
            after_step = partial(_keep_within_epoch, training, optimizer, history, best, is_ended)
            row |= train_epoch(inputs.epoch(number, epoch), optimizer, training, bar, epoch, after_step)
            if not math.isfinite(row["train_loss"]):
                raise FloatingPointError(
                    f"the loss of {type(task).__name__} became {row['train_loss']} in epoch {number}; lower lr (now "
                    f"{recipe.lr}) or set precision='float32' (now {training.precision}); {len(history)} epochs are kept in "
                    f"{run.path}"
                )
            seconds, epoch = epoch.seconds, Epoch()
            history.append(row)
            if rank > 0:
                continue
            scores = metrics.classification(predict(task, validation, precision=training.precision), data.val.labels)
            row |= {f"val_{name}": scores[name] for name in ("accuracy", "balanced_accuracy", "nll")} | {"seconds": seconds}
            if (scores[criterion], -scores["nll"]) > (best[criterion], -best["nll"]):
                best = {"epoch": number, criterion: scores[criterion], "nll": scores["nll"], "weights": _weights(task.student)}
            _save_checkpoint(training, optimizer, history, best, epoch)
            if number == first and (left := (time.perf_counter() - start) * (recipe.epochs - number - 1)) > 60:
                print(f"about {_duration(left)} to go")
            shown = {"loss": f"{row['train_loss']:.3f}", "val": f"{scores[criterion]:.3f}"}
            bar.set_postfix(epoch=f"{number + 1}/{recipe.epochs}", **shown)
    bar.close()
    if rank == 0:
        epochs = {"last": recipe.epochs - 1, "best": best["epoch"]}
        weights = {"last": _weights(task.student), "best": best["weights"]}
        if recipe.ema:
            epochs["ema"], weights["ema"] = epochs["last"], _weights(task.get_eval_model(ema=True))
        for which, values in weights.items():
            write_atomically(run.path / f"{which}.safetensors", partial(save_file, values, metadata={"format": "pt"}))
        _finish(training, epochs, history)
        _remove_checkpoints(run)
        seconds = sum(row["seconds"] for row in history)
        print(
            f"trained {recipe.epochs} epochs in {_duration(seconds)}; validation chose epoch {best['epoch']}: {run.shown_path}"
        )


@dataclass
class Epoch:
    """What an epoch has come to: steps, images, seconds, and the sums of accuracy and of every term of the loss."""

    steps: int = 0
    images: int = 0
    seconds: float = 0.0
    kept: float = 0.0  # seconds at its last checkpoint
    names: list[str] = field(default_factory=list)
    sums: Tensor | None = None  # on the device: nothing in a step waits for them
    generators: dict | None = None  # their states, where it goes on

    @torch.no_grad()
    def add(self, result: dict[str, Tensor], label: Tensor) -> None:
        self.steps, self.images = self.steps + 1, self.images + len(label)
        terms = {name: term.detach().float() for name, term in result.items() if name != "output"}
        self.names = ["accuracy", *terms]
        correct = (result["output"].argmax(1) == label).sum(0, keepdim=True)
        sums = torch.cat([correct, torch.stack(list(terms.values())) * len(label)])
        self.sums = sums if self.sums is None else self.sums + sums

    def means(self) -> dict[str, float]:
        """Over the images of all processes; this is the epoch's one wait."""
        means = distributed.sum_over_processes(self.sums) / (self.images * distributed.rank_and_count()[1])
        return {f"train_{name}": mean for name, mean in zip(self.names, means.cpu().tolist(), strict=True)}


def train_epoch(
    inputs: Iterator[tuple[Tensor, Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    training: Training,
    bar: tqdm,
    epoch: Epoch,
    after_step: Callable[[Epoch], None] = lambda epoch: None,
) -> dict[str, float]:
    """A step for each of the batches (`Inputs.epoch`); means over their images of every term of the loss, and accuracy.

    Raises:
        MemoryError: a batch does not fit the device's memory.
    """
    training.task.train()
    start = time.perf_counter() - epoch.seconds
    for images, target, label in inputs:
        try:
            result = _step(training, optimizer, images, target)
        except torch.OutOfMemoryError:
            result = None  # what the step held is free once this block is left
        if result is None:
            raise MemoryError(_too_large(training, images, target))
        epoch.add(result, label)
        bar.update(len(label) * distributed.rank_and_count()[1])
        epoch.seconds = time.perf_counter() - start
        after_step(epoch)
    means = epoch.means()
    epoch.seconds = time.perf_counter() - start
    return means


def _step(training: Training, optimizer: torch.optim.Optimizer, images: Tensor, target: Tensor) -> dict[str, Tensor]:
    with autocast(training.device, training.precision):
        result = training.task(images, target)
    optimizer.zero_grad()
    result["loss"].backward()
    optimizer.step()
    training.task.update_ema()
    return result


def _too_large(training: Training, images: Tensor, target: Tensor) -> str:
    """What to say of a batch that does not fit, after trying halves of it."""
    size = len(images) // 2
    while size >= 2:
        training.task.zero_grad()
        try:
            with autocast(training.device, training.precision):
                loss = training.task(images[:size], target[:size])["loss"]
            loss.backward()
            break
        except torch.OutOfMemoryError:
            size //= 2
    fits = f"batch_size={size} fits" if size >= 2 else "not even two do: take smaller images or a smaller network"
    return f"{len(images)} images at a time do not fit the memory of {training.device}; {fits}"


def _keep_within_epoch(
    training: Training, optimizer: torch.optim.Optimizer, history: list[dict], best: dict, is_ended: Callable, epoch: Epoch
) -> None:
    """A checkpoint, if the last is too old or the process was asked to end."""
    is_due = is_ended() or epoch.seconds - epoch.kept > training.checkpoint_seconds
    if is_due and distributed.rank_and_count()[1] == 1:
        epoch.kept = epoch.seconds
        _save_checkpoint(training, optimizer, history, best, epoch)
    if is_ended():
        raise SystemExit


@contextmanager
def _ended_by_sigterm() -> Iterator[Callable[[], bool]]:
    """Gives whether the process was asked to end; it does at the end of the block, as it would have without it."""
    asked = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGTERM, lambda *_: asked.append(True))
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGTERM, before)
        if asked:
            os.kill(os.getpid(), signal.SIGTERM)


class Inputs:
    """The training images of a run, prepared batch by batch. Their number is `len`.

    What the recipe says of labels goes to the task: class weights and label smoothing.
    """

    def __init__(self, training: Training):
        task, data, recipe, device = training.task, training.data, training.recipe, training.device
        self.seed, self.device, self.size, (self.rank, processes) = (
            training.seed,
            device,
            recipe.batch_size,
            distributed.rank_and_count(),
        )
        part = smote(data.train, seed=training.seed) if recipe.imbalance == "smote" else data.train
        weights = class_weights(part.labels, len(data.classes))
        task.class_weights = weights.to(device) if recipe.imbalance == "class_weights" else None
        task.label_smoothing = recipe.label_smoothing
        self.part = part.on_device(device, training.cache_on_device)
        augment = AUGMENTATIONS[recipe.augment]()
        crop, augment.crop = augment.crop, augment.crop and not isinstance(self.part.images, Files)  # cropped when decoded
        self.prepare = Preprocess(task.student, augment).to(device)
        self.mix = None
        if recipe.mixup or recipe.cutmix:
            options = {"label_smoothing": recipe.label_smoothing, "num_classes": len(data.classes)}
            self.mix = Mixup(recipe.mixup, recipe.cutmix, **options)
        self.order = {"repeats": recipe.aug_repeats}
        self.order["weights"] = weights[part.labels] if recipe.imbalance == "balanced_sampler" else None
        self.order |= {"shard": (self.rank, processes), "crop": crop, "even": self.mix is not None}

    def __len__(self) -> int:
        return len(self.part)

    def epoch(self, number: int, so_far: Epoch | None = None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(images, target, label): images (B, 3, H, W) as the student takes them; target (B,) is the label, or, with mixup,
        (B, C) probabilities. What is drawn depends on the run's seed and the epoch's number alone; an epoch that has come some
        way goes on there."""
        random_seed(seed := (1_000_003 * (self.seed + 1) + number) % 2**32)  # torch's, NumPy's (mixup) and Python's
        so_far = so_far or Epoch()
        read = batches(self.part, self.size, shuffle=True, skip=so_far.steps, device=self.device, **self.order)
        for count, (images, label) in enumerate(read):
            if self.rank and count == 0:  # the order is drawn, the same in all processes; what follows is each one's own
                random_seed(seed + self.rank)
            if so_far.generators and count == 0:
                _set_generators(so_far.generators, self.device)
            images = self.prepare(images)
            yield (images, label, label) if self.mix is None else (*self.mix(images, label), label)


def make_optimizer(task: Method, recipe: Recipe) -> tuple[torch.optim.Optimizer, Scheduler]:
    learner = task.get_trainable_module()
    layered = {} if recipe.layer_decay == 1 else {"layer_decay": recipe.layer_decay}
    make_groups = param_groups_layer_decay if layered else param_groups_weight_decay
    groups = make_groups(learner, recipe.weight_decay, no_weight_decay_list=learner.no_weight_decay(), **layered)
    made = get_optimizer_class(recipe.optimizer, bind_defaults=False)
    can_fuse = "fused" in inspect.signature(made).parameters and next(task.student.parameters()).device.type != "mps"
    fused = {"fused": True} if can_fuse else {}
    optimizer = create_optimizer_v2(groups, opt=recipe.optimizer, lr=recipe.lr, weight_decay=0.0, **fused)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="cosine" if recipe.schedule == "cosine" else "step",
        num_epochs=recipe.epochs,
        decay_epochs=recipe.epochs + 1,  # a step schedule that never steps is constant
        min_lr=recipe.min_lr,
        warmup_epochs=recipe.warmup_epochs,
        warmup_lr=recipe.warmup_lr,
    )
    return optimizer, scheduler


def _restore(training: Training, optimizer: torch.optim.Optimizer) -> tuple[list[dict], dict, Epoch]:
    """The history so far, the best epoch with its weights, and what the next one has come to.

    Networks and optimiser are then as the last whole checkpoint has them, or, where a finished run lost other files, as it
    ended.
    """
    folder, task = training.run.path, training.task
    if not training.resume:
        return [], dict(NO_EPOCH), Epoch()
    checkpoint = next((folder / name for name in runs.CHECKPOINTS if (folder / name).exists()), None)
    if checkpoint is None:
        return _ended(training) or ([], dict(NO_EPOCH), Epoch())
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)  # the generators' states are for the CPU
    task.load_checkpoint_state(state["state_dict"], state["task_state"])
    if task.has_ema():
        task.load_checkpoint_state(state["state_dict_ema"], state["task_state_ema"], ema=True)
    optimizer.load_state_dict(state["optimizer"])
    epoch, best = Epoch(**state["epoch"]), state["best"]
    epoch.sums = None if epoch.sums is None else epoch.sums.to(training.device)
    return state["history"], best, epoch


NO_EPOCH = {"accuracy": -1.0, "balanced_accuracy": -1.0, "nll": math.inf}


def _ended(training: Training) -> tuple[list[dict], dict, Epoch] | None:
    """What `_restore` gives of a run that is trained and only has to be measured again, from its weights and history."""
    run, task = training.run, training.task
    names = ["last", "best"] + ["ema"] * bool(training.recipe.ema)
    needed = ["history.csv", *(f"{name}.safetensors" for name in names)]
    known = runs.checksums(run.path)  # `mend` has looked at them
    if not all(name in known and (run.path / name).exists() for name in needed):
        return None
    weights = {name: load_file(run.path / f"{name}.safetensors") for name in names}
    task.student.load_state_dict(weights["last"])
    if training.recipe.ema:
        unwrap_model(task.get_eval_model(ema=True)).load_state_dict(weights["ema"])
    table = pd.read_csv(run.path / "history.csv", dtype=str).astype(float)  # as Python reads numbers: to the last bit
    history = table.astype({"epoch": int}).to_dict("records")
    criterion = "accuracy" if training.recipe.protocol == "paper" else "balanced_accuracy"
    best = max(history, key=lambda row: (row[f"val_{criterion}"], -row["val_nll"]))
    return history, {"epoch": best["epoch"], "weights": weights["best"]}, Epoch()


def _save_checkpoint(
    training: Training, optimizer: torch.optim.Optimizer, history: list[dict], best: dict, epoch: Epoch
) -> None:
    """All that is needed to go on, after the epochs of the history and the steps of the one after them."""
    task, (checkpoint, before) = training.task, (training.run.path / name for name in runs.CHECKPOINTS)
    state = task.get_checkpoint_state() | (task.get_checkpoint_state(ema=True) if task.has_ema() else {})
    state |= {"optimizer": optimizer.state_dict(), "history": history, "best": best}
    state["epoch"] = vars(epoch) | {"generators": _generators(training.device) if epoch.steps else None}
    state["config_hash"] = runs.config_hash(training.run.config)

    def write(aside: Path) -> None:
        torch.save(state, aside)
        if checkpoint.exists():
            checkpoint.replace(before)

    write_atomically(checkpoint, write)
    _write_history(training.run, history)


def _remove_checkpoints(run: Run) -> None:
    for name in runs.CHECKPOINTS:
        (run.path / name).unlink(missing_ok=True)


def _write_history(run: Run, history: list[dict]) -> None:
    write_atomically(run.path / "history.csv", lambda aside: pd.DataFrame(history).to_csv(aside, index=False))


def _generators(device: torch.device) -> dict:
    """The states of torch's, NumPy's (mixup) and Python's generators."""
    _, keys, *numpy = np.random.get_state()  # noqa: NPY002, the one that timm's mixup draws from
    states = {"torch": torch.get_rng_state(), "numpy": [torch.from_numpy(keys.astype(np.int64)), *numpy]}
    states["python"] = random.getstate()
    return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def _set_generators(states: dict, device: torch.device) -> None:
    keys, *numpy = states["numpy"]
    torch.set_rng_state(states["torch"])
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), *numpy))  # noqa: NPY002
    random.setstate(states["python"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)


def _weights(network: nn.Module) -> dict[str, Tensor]:
    """A copy of a network's weights, as they are written."""
    return {name: value.to("cpu", copy=True).contiguous() for name, value in unwrap_model(network).state_dict().items()}


def _announce(training: Training, done: int) -> None:
    network, count = training.task.student, sum(p.numel() for p in training.task.student.parameters())
    print(
        f"{type(training.task).__name__} trains {models.describe(network)['name']} ({count:,} parameters) on "
        f"{len(training.data.train):,} images for {training.recipe.epochs} epochs, on {training.device} in {training.precision}"
        + (f", resumed from epoch {done}" if done else "")
    )


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else f"{seconds / 60:.1f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"


def _write_split(run: Run, data: Data, with_groups: bool) -> None:
    """split.csv: before training who is where; what belongs together of the test part is read after it."""
    sides = {part: getattr(data, part) for part in ("train", "val", "test") if part != "val" or data.val is not data.test}
    split = pd.concat([pd.DataFrame({"id": of.ids, "part": part}) for part, of in sides.items()])
    if with_groups:
        split["group"] = np.concatenate([of.groups for of in sides.values()])
    write_atomically(run.path / "split.csv", lambda aside: split.to_csv(aside, index=False))


def _finish(training: Training, epochs: dict[str, int], history: list[dict]) -> None:
    """The one use of the test part."""
    task, data, run = training.task, training.data, training.run
    trained = ["config.json", "environment.json", "history.csv", *(f"{which}.safetensors" for which in epochs)]
    runs.write_checksums(run, trained)
    _write_split(run, data, with_groups=True)
    measured = {}
    for which, epoch in epochs.items():
        task.student.load_state_dict(load_file(run.path / f"{which}.safetensors"))
        probabilities = predict(task, data.test, precision=training.precision)
        validated = predict(task, data.val, precision=training.precision)
        measured[which] = {
            "epoch": epoch,
            "val": metrics.classification(validated, data.val.labels),
            "test": metrics.classification(probabilities, data.test.labels),
        }
        table = pd.DataFrame(probabilities.numpy(), columns=data.classes)
        table.insert(0, "label", [data.classes[label] for label in data.test.labels])
        table.insert(0, "id", data.test.ids)
        write_atomically(
            run.path / runs.PREDICTIONS[which],
            lambda aside, table=table: table.to_csv(aside, index=False, float_format="%.6g"),
        )
        if which == "last":  # has it learned its images? In training it sees them augmented
            fitted = predict(task, data.train, precision=training.precision).argmax(1) == data.train.labels
            measured[which]["train"] = {"accuracy": round(fitted.float().mean().item(), 6)}
    task.student.load_state_dict(load_file(run.path / "best.safetensors"))
    seconds = sum(row["seconds"] for row in history)
    measured = {
        "config_hash": runs.config_hash(run.config),
        **measured,
        "images": {part: len(getattr(data, part)) for part in ("train", "val", "test")},
        "parameters": sum(p.numel() for p in task.student.parameters()),
        "seconds": round(seconds, 1),
        **{key: data.card[key] for key in ("synthesis_seconds", "synthesis_quality") if key in data.card},
        "images_per_second": round(len(data.train) * training.recipe.epochs / seconds, 1),
    }
    runs.write_checksums(run, [*trained, "split.csv", *(runs.PREDICTIONS[which] for which in epochs)], measured)
    write_json(run.path / "metrics.json", measured)
