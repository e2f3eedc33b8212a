"""A run as a configuration: `build` puts data, network, method and recipe together, every name checked before anything trains.

    experiment = build(data, "hdkd_student_distilled_nano", recipe, method="HDKD", teacher=teacher_run, seed=1)
    experiment.task, experiment.data, experiment.recipe     # to look at
    run = experiment.run("results/runs/mine/hdkd")
"""  # fmt: skip

import difflib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from hdkd_lib import methods, models
from hdkd_lib.data import Data
from hdkd_lib.methods.base import Distillation, Method
from hdkd_lib.recipes import Recipe
from hdkd_lib.runs import Run
from hdkd_lib.training import fit


@dataclass(frozen=True)
class Experiment:
    """A method with its student and teacher (`task`), what it trains on, how, and the seed of all that is drawn."""

    task: Method
    data: Data
    recipe: Recipe
    seed: int

    def run(self, run_dir: str | Path | None = None, **execution) -> Run:
        """`training.fit`, whose `execution` says where and in what precision it computes; a finished run is not repeated."""
        return fit(self.task, self.data, self.recipe, run_dir, seed=self.seed, **execution)


def build(
    data: Data,
    network: str,
    recipe: Recipe,
    *,
    network_options: Mapping | None = None,
    method: str = "Supervised",
    options: Mapping | None = None,
    teacher: Run | nn.Module | None = None,
    seed: int = 0,
) -> Experiment:
    """The experiment in which `network` learns the data by a method and a recipe.

    Two experiments with the same network, options and seed start from the same weights, whatever their methods.

    Args:
        network: a name that timm knows (`models.create`); it gets the data's classes and image size.
        network_options: of the network, such as {"stem_stride": 1}.
        method: a name in `hdkd_lib.methods`.
        options: of the method, such as {"alpha": 0.7}; what is not named has the paper's value.
        teacher: a network, or a finished run, whose student at the epoch that validation chose is the teacher.

    Raises:
        ValueError: unknown network, method or option (the nearest name is suggested), a value out of range, or a teacher where
            the method has none, or none where it needs one.
        FileNotFoundError: the teacher's run has no weights.
    """
    task_class = check(method, options or {}, has_teacher=teacher is not None)
    teacher = teacher.student() if isinstance(teacher, Run) else teacher
    torch.manual_seed(seed)  # after the teacher, whose making draws numbers too
    size = {"num_classes": len(data.classes), "img_size": data.config["image_size"]}
    student = models.create(network, **size, **(network_options or {}))
    networks = {"student": student} if teacher is None else {"student": student, "teacher": teacher}
    return Experiment(task_class(**networks, **(options or {})), data, recipe, seed)


def check(method: str, options: Mapping, *, has_teacher: bool) -> type[Method]:
    """The method of that name, once it is sure that it has these options.

    Raises:
        ValueError: as `build`.
    """
    if method not in methods.__all__:
        raise ValueError(f"unknown method {method!r}; {_nearest(method, methods.__all__)}")
    task_class = getattr(methods, method)
    known = [name for name in inspect.signature(task_class).parameters if name not in ("student", "teacher")]
    for name in options:
        if name not in known:
            raise ValueError(f"{method} has no option {name!r}; {_nearest(name, known)}")
    if has_teacher != issubclass(task_class, Distillation):
        raise ValueError(f"{method} has no teacher; leave it out" if has_teacher else f"{method} needs a teacher; name one")
    return task_class


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
