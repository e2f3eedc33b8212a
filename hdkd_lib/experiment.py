"""A run as a configuration: `build` puts data, network, method and recipe together, every name checked before anything trains.

    experiment = build(data, "hdkd_student_distilled_nano", recipe, method="HDKD", teacher=teacher_run, seed=1)
    experiment.task, experiment.data, experiment.recipe     # to look at
    run = experiment.run("results/runs/mine/hdkd")
"""  # fmt: skip

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from hdkd_lib import methods, models
from hdkd_lib.data import Data
from hdkd_lib.methods.base import Distillation, Method
from hdkd_lib.parameters import check_call, one_sentence
from hdkd_lib.recipes import Recipe
from hdkd_lib.runs import Run
from hdkd_lib.training import fit


@dataclass(frozen=True)
class Experiment:
    """A method with its student and teacher (`task`), what it trains on, how, and the seed of all that is drawn.

    `teacher` is the experiment that trains the teacher, where there is one; until `train_teacher` the task's is untrained.
    """

    task: Method
    data: Data
    recipe: Recipe
    seed: int
    teacher: "Experiment | None" = None

    @one_sentence
    def train_teacher(self, run_dir: str | Path | None = None, **execution) -> Run:
        """Runs `teacher`, and gives the task's teacher the weights of its best epoch."""
        run = self.teacher.run(run_dir, **execution)
        trained = run.student()
        network = self.task.teacher.network
        network.load_state_dict(trained.state_dict())
        network.is_trained, network.trained_on = True, trained.trained_on
        return run

    @one_sentence
    def run(self, run_dir: str | Path | None = None, **execution) -> Run:
        """`training.fit`, whose `execution` says where and in what precision it computes; a finished run is not repeated.

        A teacher that is an untrained experiment is trained first.
        """
        if self.teacher is not None and not getattr(self.task.teacher.network, "is_trained", False):
            self.train_teacher(**execution)
        return fit(self.task, self.data, self.recipe, run_dir, seed=self.seed, **execution)


@one_sentence
def find_teacher(teacher: Mapping, data: Data) -> nn.Module | None:
    """The network that a notebook's parameter names: {"run_dir": FOLDER, "epoch": "best" or "last"} of a finished run;
    {"network": NAME}, pretrained on these classes; {"network": NAME, "weights": FILE}, trained elsewhere; {}: none.

    Raises:
        ValueError, FileNotFoundError: there is no such run, network or file, or it does not fit the data.
    """
    forms = {"run_dir": {"run_dir", "epoch"}, "network": {"network", "weights"}}
    if teacher and not any(key in teacher and teacher.keys() <= form for key, form in forms.items()):
        raise ValueError(f"teacher must have run_dir (and epoch), or network (and weights) (got {dict(teacher)})")
    if "run_dir" in teacher:
        return Run(teacher["run_dir"]).student(teacher.get("epoch", "best"))
    if "network" in teacher:
        size = {"num_classes": len(data.classes), "img_size": data.config["image_size"]}
        network = models.create(teacher["network"], **size, pretrained="weights" not in teacher)
        return (models.load_weights(network, teacher["weights"]) if "weights" in teacher else network).eval()
    return None


@one_sentence
def build(
    data: Data,
    network: str,
    recipe: Recipe,
    *,
    network_options: Mapping | None = None,
    method: str | type[Method] = "Supervised",
    options: Mapping | None = None,
    teacher: "Experiment | Run | nn.Module | None" = None,
    seed: int = 0,
) -> Experiment:
    """The experiment in which `network` learns the data by a method and a recipe.

    Two experiments with the same network, options and seed start from the same weights, whatever their methods.

    Args:
        network: a name that timm knows (`models.create`); it gets the data's classes and image size.
        network_options: of the network, such as {"stem_stride": 1}.
        method: a name in `hdkd_lib.methods`, "package.module:Class" of another package, or the class.
        options: of the method, such as {"alpha": 0.7}; what is not named has the paper's value.
        teacher: a network; a finished run, whose student at the epoch that validation chose is the teacher; or the experiment
            that trains it.

    Raises:
        ValueError: unknown network, method or option (the nearest name is suggested), a value of another type or out of range,
            or a teacher where the method has none, or none where it needs one.
        FileNotFoundError: the teacher's run has no weights.
    """
    task_class = check(method, options or {}, has_teacher=teacher is not None)
    size = {"num_classes": len(data.classes), "img_size": data.config["image_size"]}
    before = teacher if isinstance(teacher, Experiment) else None
    if before is not None:
        teacher = models.create(**size | models.describe(before.task.student) | {"pretrained": False})
    elif isinstance(teacher, Run):
        teacher = teacher.student()
    torch.manual_seed(seed)  # after the teacher, whose making draws numbers too
    student = models.create(network, **size, **(network_options or {}))
    networks = {"student": student} if teacher is None else {"student": student, "teacher": teacher}
    return Experiment(task_class(**networks, **(options or {})), data, recipe, seed, before)


def check(method: str | type[Method], options: Mapping, *, has_teacher: bool) -> type[Method]:
    """The method of that name, once it is sure that it has these options, of these types.

    Raises:
        ValueError: as `build`.
    """
    task_class = methods.find(method)
    known = task_class.options()
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known))}"
            raise ValueError(f"{task_class.__name__} has no option {name!r}; {hint}")
    check_call(task_class, options)
    if has_teacher != issubclass(task_class, Distillation):
        name = task_class.__name__
        raise ValueError(f"{name} has no teacher; leave it out" if has_teacher else f"{name} needs a teacher; name one")
    return task_class
