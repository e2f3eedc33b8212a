"""Training and evaluation: the loop."""

import copy
import hashlib
import math
import os
import tempfile
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from timm.data import Mixup
from timm.layers import convert_sync_batchnorm
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from timm.utils import random_seed
from torch import Tensor, nn
from tqdm.auto import tqdm

from hdkd_lib import metrics, runs
from hdkd_lib.data import Data
from hdkd_lib.data.augment import AUGMENTATIONS
from hdkd_lib.data.batches import Files, Normalise, Part, batches
from hdkd_lib.data.imbalance import class_weights, smote
from hdkd_lib.methods import Supervised
from hdkd_lib.methods.base import Method
from hdkd_lib.recipes import Recipe
from hdkd_lib.runs import Run, write_atomically, write_json


def fit(
    task: Method,
    data: Data,
    recipe: Recipe,
    run_dir: str | Path | None = None,
    *,
    seed: int = 0,
    device: str = "auto",
    precision: str = "auto",
    resident: str | bool = "auto",
    num_processes: int = 1,
    resume: bool = True,
    force: bool = False,
) -> Run:
    """Trains the task's student, measures it and returns the run; a finished one of the same configuration is not repeated.

    The epoch with the highest validation balanced accuracy (then the lowest validation cross-entropy) is "best". The test part
    is touched once, at the end, with those weights and with the last ones; the predictions of both are kept. Each epoch draws
    its randomness from (seed, epoch) alone, so an interrupted and resumed run ends with the weights of an uninterrupted one
    (bitwise on one CPU with one number of threads). With `recipe.protocol` "paper" the test part chooses the epoch, by
    accuracy.

    Args:
        run_dir: the run folder; default: one named after the configuration, under results/runs/interactive/.
        device: "auto" (CUDA, then Apple's MPS, then the CPU) or a torch device.
        precision: "float32" (on NVIDIA's GPUs PyTorch's: convolutions in TF32), "bf16" (autocast), or "auto": bf16 where the
            device computes in it.
        resident: whether the images are kept in the device's memory; "auto": if they fill at most half of it.
        num_processes: train in so many processes, each with its share of every batch, on as many GPUs, or on the CPU. It is no
            part of the configuration: the weights are those of one process but for rounding where nothing is drawn for a batch
            (augmentation, mixup) or counted in one (class weights, DearKD's standardised targets, and on CPUs batch norm).
        resume: whether to go on from the folder's checkpoint.
        force: whether a teacher may teach that is no better than chance on the validation part.

    Raises:
        ValueError: the classes of data and student differ, an argument is unknown, the task was trained in another run, or the
            teacher is at chance level, was trained on other classes or has seen test images.
        FloatingPointError: the loss is no longer a number; the checkpoint of the epoch before is kept.
    """
    device = resolve_device(device)
    precision = resolve_precision(precision, device)
    most = {"cuda": torch.cuda.device_count(), "mps": 1}.get(device.type, num_processes)
    if not 1 <= num_processes <= max(1, most):
        raise ValueError(
            f"num_processes must be at least 1, and on GPUs at most their number (got {num_processes}, {most} of {device.type})"
        )
    _check_classes(task.student, data)
    config = {
        "method": task.describe() | ({"teacher_weights": digest(task.teacher)} if hasattr(task, "teacher") else {}),
        "data": data.config,
        "recipe": asdict(recipe),
        "seed": seed,
        "precision": precision,
    }
    if hasattr(task, "teacher"):
        _check_provenance(task.teacher.network, data, recipe)
    run = Run.create(run_dir, config)
    with run.lock():
        if not run.is_finished:
            if not task.is_fresh and not (resume and (run.path / "checkpoint.pt").exists()):
                raise ValueError(
                    "this task's student is trained already, and a new run must not start from it; create both again"
                )
            task.to(device, memory_format=torch.channels_last)
            if hasattr(task, "teacher"):
                _check_skill(task, data, precision, force)
            task.is_fresh = False
            task.student.is_trained = True
            if recipe.protocol == "paper":
                data = data.chosen_on_test()
                task.follow_paper()
            arguments = (task, data, recipe, run, seed, device, precision, resident, resume)
            if num_processes == 1:
                _train(*arguments)
            else:
                _train_in_processes(num_processes, *arguments)
    return run


def _train_in_processes(
    count: int, task: Method, data: Data, recipe: Recipe, run: Run, seed: int, device: torch.device, *options
):
    """`_train` in `count` processes of this machine, which sum their gradients; leaves the task as `_train` does."""
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{folder}/meeting"
        arguments = (count, meeting, task.cpu(), data, recipe, run, seed, device.type, *options)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # the first process works on the same GPU
        try:
            torch.multiprocessing.spawn(_train_one, arguments, nprocs=count)
        except torch.multiprocessing.ProcessRaisedException as error:
            raise RuntimeError(str(error).strip().splitlines()[-1]) from error
    task.to(device).student.load_state_dict(load_file(run.path / "best.safetensors"))


def _train_one(rank: int, count: int, meeting: str, task, data, recipe, run, seed: int, kind: str, *options) -> None:
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    torch.set_num_threads(max(1, torch.get_num_threads() // count))
    if kind == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if kind == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, init_method=meeting, rank=rank, world_size=count)
    try:
        task = copy.deepcopy(task).to(device, memory_format=torch.channels_last)  # what was sent is in memory that all share
        _train(task, data, recipe, run, seed, device, *options)
    finally:
        torch.distributed.destroy_process_group()


def _train(
    task: Method,
    data: Data,
    recipe: Recipe,
    run: Run,
    seed: int,
    device: torch.device,
    precision: str,
    resident: str | bool,
    resume: bool,
) -> None:
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    whole, classes = data.train, len(data.classes)
    if recipe.imbalance == "smote":
        whole = smote(whole, seed=seed)
    weights = class_weights(whole.labels, classes)
    task.class_weights = weights.to(device) if recipe.imbalance == "class_weights" else None
    task.label_smoothing = recipe.label_smoothing
    train, val = whole.resident(device, resident), data.val.resident(device, resident)
    augment = AUGMENTATIONS[recipe.augment]()
    crop, augment.crop = augment.crop, augment.crop and not isinstance(train.images, Files)  # files are cropped when decoded
    prepare = Normalise(task.student, augment).to(device)
    mix = None
    if recipe.mixup or recipe.cutmix:
        mix = Mixup(recipe.mixup, recipe.cutmix, label_smoothing=recipe.label_smoothing, num_classes=classes)
    order = {"weights": weights if recipe.imbalance == "balanced_sampler" else None, "repeats": recipe.aug_repeats}
    order["shard"] = (rank, processes)
    undecayed = getattr(task.student, "no_weight_decay", set)()
    groups = param_groups_weight_decay(task.student, recipe.weight_decay, no_weight_decay_list=undecayed)
    if len(task.auxiliary):
        groups += param_groups_weight_decay(task.auxiliary, recipe.weight_decay)
    optimizer = create_optimizer_v2(groups, opt=recipe.optimizer, lr=recipe.lr, weight_decay=0.0, fused=device.type != "mps")
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="cosine" if recipe.schedule == "cosine" else "step",
        num_epochs=recipe.epochs,
        decay_epochs=recipe.epochs + 1,  # a step schedule that never steps is constant
        min_lr=recipe.min_lr,
        warmup_epochs=recipe.warmup_epochs,
        warmup_lr=recipe.warmup_lr,
    )
    lag, criterion = (1, "accuracy") if recipe.protocol == "paper" else (0, "balanced_accuracy")
    history, best = [], {criterion: -1.0, "nll": math.inf}
    checkpoint = run.path / "checkpoint.pt"
    if resume and checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        task.student.load_state_dict(state["student"])
        task.auxiliary.load_state_dict(state["auxiliary"])
        optimizer.load_state_dict(state["optimizer"])
        history, best = state["history"], state["best"]
    network = task
    if processes > 1:
        if device.type == "cuda":
            _synchronise_norms(task)
        network = nn.parallel.DistributedDataParallel(task, forward_sync_buffers=False, find_unused_parameters=True)
    if rank == 0:
        write_json(run.path / "environment.json", runs.environment(device) | {"processes": processes})
        _write_split(run, data, with_groups=False)

    done = len(history)
    quiet = "TQDM_DISABLE" in os.environ or rank > 0  # tqdm's notebook bar does not read the variable itself
    progress = tqdm(range(done, recipe.epochs), desc=type(task).__name__, initial=done, total=recipe.epochs, disable=quiet)
    for epoch in progress:
        start = time.perf_counter()
        random_seed(epoch_seed := (1_000_003 * (seed + 1) + epoch) % 2**32)  # torch's, NumPy's (mixup), Python's (erasing)
        scheduler.step(max(0, epoch - lag))
        task.set_progress(epoch / recipe.epochs)
        task.train()
        totals, seen = defaultdict(lambda: torch.zeros((), device=device)), 0
        for images, target in batches(
            train, recipe.batch_size, shuffle=True, crop=crop, even=mix is not None, device=device, **order
        ):
            if rank and not seen:  # the order is drawn, the same in all processes; what follows is each one's own
                random_seed(epoch_seed + rank)
            images, label = prepare(images), target
            if mix is not None:
                images, target = mix(images, target)
            with autocast(device, precision):
                result = network(images, target)
            optimizer.zero_grad()
            result["loss"].backward()
            optimizer.step()
            with torch.no_grad():  # sums stay on the device: nothing in a step waits for it
                seen += len(label)
                totals["accuracy"] += (result["output"].argmax(1) == label).sum()
                for name, term in result.items():
                    if name != "output":
                        totals[name] += term.detach().float() * len(label)
        if processes > 1:
            for total in totals.values():
                dist.all_reduce(total)
            seen *= processes
        row = {"epoch": epoch, "lr": optimizer.param_groups[0]["lr"]}
        row |= {f"train_{name}": (total / seen).item() for name, total in totals.items()}  # the epoch's one wait
        if not math.isfinite(row["train_loss"]):
            raise FloatingPointError(
                f"the loss of {type(task).__name__} became {row['train_loss']} in epoch {epoch}; lower lr (now {recipe.lr}) "
                f"or set precision='float32' (now {precision}); {len(history)} epochs are kept in {run.path}"
            )
        seconds = time.perf_counter() - start
        if rank > 0:
            history.append(row)
            continue
        scores = metrics.classification(predict(task, val, precision=precision), data.val.labels)
        row |= {f"val_{name}": scores[name] for name in ("accuracy", "balanced_accuracy", "nll")} | {"seconds": seconds}
        history.append(row)
        if (scores[criterion], -scores["nll"]) > (best[criterion], -best["nll"]):
            best = {"epoch": epoch, criterion: scores[criterion], "nll": scores["nll"]}
            _save_weights(task, run.path / "best.safetensors")
        networks = {"student": task.student.state_dict(), "auxiliary": task.auxiliary.state_dict()}
        state = {**networks, "optimizer": optimizer.state_dict(), "history": history, "best": best}
        write_atomically(checkpoint, lambda aside, state=state: torch.save(state, aside))
        write_atomically(run.path / "history.csv", lambda aside: pd.DataFrame(history).to_csv(aside, index=False))
        progress.set_postfix(loss=f"{row['train_loss']:.3f}", val=f"{scores['balanced_accuracy']:.3f}")
    if rank > 0:
        return
    _save_weights(task, run.path / "last.safetensors")
    _finish(task, data, recipe, run, precision, {"best": best["epoch"], "last": recipe.epochs - 1}, history)
    checkpoint.unlink()


def _synchronise_norms(task: Method) -> None:
    """Batch norms count the images of all processes. timm's conversion keeps the activation that some of its norms hold."""
    task.trainable_module = convert_sync_batchnorm(task.student)
    task.auxiliary = convert_sync_batchnorm(task.auxiliary)


def _check_classes(network: nn.Module, data: Data) -> None:
    if network.num_classes != len(data.classes):
        raise ValueError(
            f"the network has {network.num_classes} classes and {data.config['dataset']} has {len(data.classes)}; "
            f"create it with num_classes={len(data.classes)}"
        )


def _check_provenance(teacher: nn.Module, data: Data, recipe: Recipe) -> None:
    """A teacher that has seen the test images would carry them into its student."""
    origin = getattr(teacher, "trained_on", None)  # `Run.student` says so; other networks cannot
    if origin is None:
        return
    if origin["classes"] != data.classes:
        raise ValueError(
            f"the teacher was trained on the classes {', '.join(origin['classes'])} and the data have "
            f"{', '.join(data.classes)}; train the teacher on the student's data"
        )
    seen = origin["ids"].intersection(data.test.ids) if origin["content"] == data.config["content"] else ()
    if origin["protocol_of_training"] == "paper" and recipe.protocol != "paper":
        raise ValueError(
            "the teacher's epoch was chosen on its test part (protocol 'paper'): it can teach under the same protocol only"
        )
    if seen:
        raise ValueError(
            f"the teacher was trained on {len(seen)} of the {len(data.test)} test images ({origin['protocol']} split, fold "
            f"{origin['fold']}; here {data.config['protocol']}, {data.config['fold']}); train it on the student's split"
        )


def _check_skill(task: Method, data: Data, precision: str, force: bool) -> None:
    """Says what the teacher knows before anything is learned from it."""
    scores = evaluate(task.teacher.network, data, "val", device=next(task.parameters()).device, precision=precision)
    chance = 1 / len(data.classes)
    margin = 2 * math.sqrt(chance * (1 - chance) / len(data.val))
    print(f"teacher on validation: balanced accuracy {scores['balanced_accuracy']:.3f}, chance {chance:.3f}")
    if scores["balanced_accuracy"] <= chance + margin and not force:
        raise ValueError(
            f"the teacher is no better than chance (balanced accuracy {scores['balanced_accuracy']:.3f}, chance "
            f"{chance:.3f} + {margin:.3f}): train it first, or pass force=True"
        )


def _write_split(run: Run, data: Data, with_groups: bool) -> None:
    """split.csv: before training who is where; what belongs together of the test part is read after it."""
    sides = {part: getattr(data, part) for part in ("train", "val", "test") if part != "val" or data.val is not data.test}
    split = pd.concat([pd.DataFrame({"id": of.ids, "part": part}) for part, of in sides.items()])
    if with_groups:
        split["group"] = np.concatenate([of.groups for of in sides.values()])
    write_atomically(run.path / "split.csv", lambda aside: split.to_csv(aside, index=False))


def _finish(
    task: Method, data: Data, recipe: Recipe, run: Run, precision: str, epochs: dict[str, int], history: list[dict]
) -> None:
    """The one use of the test part."""
    _write_split(run, data, with_groups=True)
    measured = {}
    for which, file in (("last", "predictions_last.csv"), ("best", "predictions.csv")):
        task.student.load_state_dict(load_file(run.path / f"{which}.safetensors"))
        probabilities = predict(task, data.test, precision=precision)
        measured[which] = {
            "epoch": epochs[which],
            "val": metrics.classification(predict(task, data.val, precision=precision), data.val.labels),
            "test": metrics.classification(probabilities, data.test.labels),
        }
        table = pd.DataFrame(probabilities.numpy(), columns=data.classes).round(6)
        table.insert(0, "label", [data.classes[label] for label in data.test.labels])
        table.insert(0, "id", data.test.ids)
        write_atomically(run.path / file, lambda aside, table=table: table.to_csv(aside, index=False))
        if which == "last":  # has it learned its images? In training it sees them augmented
            fitted = predict(task, data.train, precision=precision).argmax(1) == data.train.labels
            measured[which]["train"] = {"accuracy": round(fitted.float().mean().item(), 6)}
    seconds = sum(row["seconds"] for row in history)
    write_json(
        run.path / "metrics.json",
        {
            "config_hash": runs.config_hash(run.config),
            **measured,
            "images": {part: len(getattr(data, part)) for part in ("train", "val", "test")},
            "parameters": sum(p.numel() for p in task.student.parameters()),
            "seconds": round(seconds, 1),
            "images_per_second": round(len(data.train) * recipe.epochs / seconds, 1),
        },
    )


def evaluate(network: nn.Module, data: Data, part: str = "test", *, device: str = "auto", precision: str = "auto") -> dict:
    """`metrics.classification` of a network that comes from elsewhere, on the part "train", "val" or "test" of the data.

    Raises:
        ValueError: the classes of network and data differ in number.
    """
    _check_classes(network, data)
    device, chosen = resolve_device(device), getattr(data, part)
    task = Supervised(student=network).to(device).train(network.training)  # `predict` leaves the mode as it was
    return metrics.classification(predict(task, chosen, precision=resolve_precision(precision, device)), chosen.labels)


@torch.inference_mode()
def predict(task: Method, part: Part, *, precision: str = "float32", batch_size: int = 256) -> Tensor:
    """Probabilities (N, C), float32 on the CPU, by the task's own prediction in eval mode, on the device the student is on."""
    device = next(task.student.parameters()).device
    prepare = Normalise(task.student).to(device)
    was_training = task.training
    task.eval()
    with autocast(device, precision):
        logits = [task.predict(prepare(images)).float() for images, _ in batches(part, batch_size, device=device)]
    task.train(was_training)
    return torch.cat(logits).softmax(1).cpu()


def resolve_device(device: str) -> torch.device:
    if device != "auto":
        return torch.device(device)
    return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")


def resolve_precision(precision: str, device: torch.device) -> str:
    """ "float32" or "bf16"; "auto" takes bf16 on GPUs that have it and on CPUs with AVX512-BF16 or AMX instructions."""
    if precision not in ("auto", "float32", "bf16"):
        raise ValueError(f"precision must be 'auto', 'float32' or 'bf16' (got {precision!r})")
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    cpu = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16" if device.type == "cpu" and (cpu.get("avx512_bf16") or cpu.get("amx_bf16")) else "float32"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def digest(model: nn.Module) -> str:
    """A hash of a network's weights: the identity of a teacher in its student's configuration."""
    total = hashlib.sha256()
    for name, value in model.state_dict().items():
        total.update(name.encode())
        total.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]


def _save_weights(task: Method, path: Path) -> None:
    weights = {name: value.contiguous() for name, value in task.student.state_dict().items()}
    write_atomically(path, lambda aside: save_file(weights, aside, metadata={"format": "pt"}))
