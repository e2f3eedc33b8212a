"""What the methods share: the contract of a task, and distillation with a teacher that may stop."""

import inspect
import weakref
from collections.abc import Callable, Mapping

import timm.task
import torch
import torch.nn.functional as F
from timm.models import group_parameters
from timm.utils import unwrap_model
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from hdkd_lib import models
from hdkd_lib.losses import logit_distillation, standardise_logits
from hdkd_lib.methods.teacher import Teacher, check_head

NETWORKS_AND_STEPS = ("student", "teacher", "total_steps")  # arguments of a constructor that are no settings


class Learner(nn.Module):
    """All that learns in a method: the student, and in `auxiliary` what learns beside it and is thrown away at the end.

    Its forward is the method's `student_pass`, so that what wraps it (DistributedDataParallel, torch.compile) sees all of it.
    """

    def __init__(self, student: nn.Module, student_pass: Callable[..., dict]):
        super().__init__()
        self.student, self.auxiliary, self.student_pass = student, nn.ModuleDict(), student_pass
        self.in_eval_mode = False  # whether the student stays in eval mode in training, as for a probe

    def forward(self, images: Tensor, **asked) -> dict:
        return self.student_pass(self.student, self.auxiliary, images, **asked)

    def train(self, mode: bool = True) -> "Learner":
        super().train(mode)
        self.student.train(mode and not self.in_eval_mode)
        return self

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that timm's optimisers do not decay."""
        return {f"student.{name}" for name in getattr(self.student, "no_weight_decay", set)()}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """timm's numbers of layers, by a parameter's name; what learns beside the student is of its last layer."""
        layers = group_parameters(self.student, self.student.group_matcher(coarse=coarse), reverse=True)
        return lambda name: layers.get(name.removeprefix("student."), max(layers.values()))


class Method(timm.task.TrainingTask):
    """`task(images, target)` gives a dict with `loss`, `output` (logits) and each term by name; images (B, C, H, W)
    are in the student's normalisation.

    A subclass says what the student answers (`student_pass`) and what the loss makes of it (`terms`). All else is timm's
    contract: `trainable_module` is what learns, wrapped by `prepare_distributed` and `compile`; `get_eval_model` is the
    student, which alone is saved; what learns beside it, and the step, are the task's state.
    Subclasses are constructed by keyword only, and keep each argument but the networks and `total_steps`, a number, word, list
    or dict, as an attribute of its name: a run's configuration holds them (`settings`).

    Args:
        total_steps: how many times the task will be called in training, for a loop that does not call `set_progress`.
    """

    is_taught = False  # whether a teacher speaks in the next step

    def __init__(self, *, student: nn.Module, total_steps: int | None = None):
        super().__init__(verbose=False)
        self.trainable_module = Learner(student, self.student_pass)
        self.total_steps, self.step, self.progress = total_steps, 0, 0.0
        self.is_fresh = True  # until `fit` trains the student
        self.class_weights: Tensor | None = None  # (C,), of the cross-entropy with labels; `fit` sets both by its recipe
        self.label_smoothing = 0.0
        self._compiled_teach: Callable | None = None
        self._is_told = self._is_watched = False

    @staticmethod
    def student_pass(student: nn.Module, auxiliary: nn.ModuleDict, images: Tensor) -> dict:
        """What the student answers: `class_logits` and `distillation_logits` (B, C), the same where it has one head, and
        `output`, their mean. Whatever is given must reach the loss or be detached: DistributedDataParallel waits for it.
        """
        return answers(student(images))

    def terms(self, outputs: dict, teacher: dict | None, target: Tensor) -> dict[str, Tensor]:
        """`loss` and its terms by name, from what the student answers and what the teacher says (None: nothing)."""
        raise NotImplementedError

    def teach(self, images: Tensor) -> dict:
        """What the teacher says of the images, where `is_taught`."""
        raise NotImplementedError

    def asks(self, teacher: dict | None) -> dict:
        """Further arguments of `student_pass`."""
        return {}

    def forward(self, images: Tensor, target: Tensor) -> dict[str, Tensor]:
        if self.training:
            self._count()
        teacher = (self._compiled_teach or self.teach)(images) if self.is_taught else None
        outputs = self.trainable_module(images, **self.asks(teacher))
        return {"output": outputs["output"], **self.terms(outputs, teacher, target)}

    @property
    def student(self) -> nn.Module:
        return unwrap_model(self.trainable_module).student

    @property
    def auxiliary(self) -> nn.ModuleDict:
        return unwrap_model(self.trainable_module).auxiliary

    # Progress

    @property
    def changes_over_training(self) -> bool:
        """Whether the loss depends on `progress`."""
        return False

    def set_progress(self, progress: float) -> None:
        """How far training has come, in [0, 1); called before each epoch. A task that is never told counts its own steps."""
        self._is_told = True
        self._advance(progress)

    def _advance(self, progress: float) -> None:
        self.progress = progress

    def _count(self) -> None:
        if not self._is_watched:
            self._is_watched = True
            _watch_first_step(self)
        if self.total_steps and not self._is_told:
            self._advance(min(self.step / self.total_steps, 1.0))
        self.step += 1

    def check_first_step(self, held: set[int]) -> None:
        """Before the first step of the optimiser that holds the parameters of these ids.

        Raises:
            ValueError: it does not hold what learns beside the student, or nobody says how far training has come.
        """
        name = type(self).__name__
        if left_out := [key for key, p in self.auxiliary.named_parameters() if p.requires_grad and id(p) not in held]:
            raise ValueError(
                f"the optimiser does not hold what {name} trains beside its student ({left_out[0]}, ...); create it over "
                "task.get_trainable_module()"
            )
        if self.changes_over_training and not (self.total_steps or self._is_told):
            raise ValueError(
                f"{name} changes over training; create it with total_steps=STEPS, or call task.set_progress before each epoch"
            )

    # timm's contract

    def prepare_distributed(self, device_ids: list | None = None, **options) -> "Method":
        """Wraps what learns in DistributedDataParallel; heads and aligners that a stage does not use have no gradient."""
        options = {"find_unused_parameters": True} | options
        if next(self.student.parameters()).device.type == "cpu":
            device_ids = None  # train.py names the CPU, which DistributedDataParallel refuses
        self.trainable_module = nn.parallel.DistributedDataParallel(self.trainable_module, device_ids=device_ids, **options)
        return self

    def compile(self, backend: str = "inductor", mode: str | None = None, **options) -> nn.Module:
        """Compiles what learns, what the teacher does in a step, and the student by itself, which is given."""
        options |= {"backend": backend, "mode": mode}
        self.eval_model = torch.compile(self.student, **options)
        self.trainable_module = torch.compile(self.trainable_module, **options)
        self._compiled_teach = torch.compile(self.teach, **options)
        return self.eval_model

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        found = super().get_eval_model(module=module, ema=ema)
        inner = unwrap_model(found) if found is not None else None
        return inner.student if isinstance(inner, Learner) else found

    def get_clip_parameters(self, exclude_head: bool = False) -> list[nn.Parameter]:
        own = list(self.student.parameters())
        return (own[:-2] if exclude_head else own) + list(self.auxiliary.parameters())

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict:
        """What learns beside the student, and how often the task was called in training."""
        module = self.get_trainable_module(ema=ema) if module is None else module
        return {} if module is None else {"auxiliary": unwrap_model(module).auxiliary.state_dict(), "step": self.step}

    def load_task_state(
        self, state: dict | None, strict: bool = True, module: nn.Module | None = None, ema: bool = False
    ) -> None:
        if state:
            module = self.get_trainable_module(ema=ema) if module is None else module
            unwrap_model(module).auxiliary.load_state_dict(state["auxiliary"], strict=strict)
            self.step = state["step"]

    def cross_entropy(self, logits: Tensor, target: Tensor) -> Tensor:
        """With labels (B,), or with probabilities (B, C) as mixup gives them, which are smoothed already."""
        smoothing = self.label_smoothing if target.ndim == 1 else 0.0
        return F.cross_entropy(logits, target, self.class_weights, label_smoothing=smoothing)

    def follow_paper(self) -> None:
        """What `Recipe.protocol` "paper" changes in the networks; called once, before training."""

    @classmethod
    def options(cls) -> list[str]:
        """The names of what can be set: the constructor's arguments but the networks and `total_steps`."""
        return [name for name in inspect.signature(cls).parameters if name not in NETWORKS_AND_STEPS]

    def settings(self) -> dict:
        """The options of this task by name, as JSON has them."""

        def plain(value):
            return {str(k): v for k, v in value.items()} if isinstance(value, Mapping) else value

        values = {name: plain(getattr(self, name)) for name in self.options()}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def describe(self) -> dict:
        """Everything that makes this task what it is, as plain values: part of a run's configuration.

        A method of another package has its address as `name` ("package.module:Class"), as plans name it.
        """
        own, module = type(self).__name__, type(self).__module__
        name = own if module.startswith("hdkd_lib.") or module == "__main__" else f"{module}:{own}"
        return {"name": name, **self.settings(), "student": models.describe(self.student)}

    def predict(self, images: Tensor) -> Tensor:
        """Logits (B, C) of the method's own prediction; call in eval mode."""
        return self.student(images)


class Distillation(Method):
    """A method with a teacher, whose classes must be the student's.

    Args:
        distill_until: share of training, in [0, 1], after which the teacher stops: from the first epoch that begins there or
            later, both heads learn from the labels (`label_terms`) and the teacher does not run; 1: it teaches to the end.
            DearKD's second stage [paper], offered to every method (OUR CHOICE).

    Raises:
        ValueError: an argument is out of range, the networks differ in classes, or the teacher's head is random.
    """

    def __init__(self, *, student: nn.Module, teacher: nn.Module, distill_until: float = 1.0, total_steps: int | None = None):
        super().__init__(student=student, total_steps=total_steps)
        if not 0 <= distill_until <= 1:
            raise ValueError(f"distill_until must be in [0, 1] (got {distill_until})")
        self.distill_until = distill_until
        check_head(teacher, student)
        self.teacher = Teacher(teacher, student)

    def teach(self, images: Tensor) -> dict:
        """The teacher's `logits` (B, C), of images in the student's normalisation."""
        return {"logits": self.teacher(images)[0]}

    @property
    def in_stage2(self) -> bool:
        """Whether the teacher has stopped."""
        return self.progress > self.distill_until - 1e-9 and self.distill_until < 1

    @property
    def is_taught(self) -> bool:
        return not self.in_stage2

    @property
    def changes_over_training(self) -> bool:
        return self.distill_until < 1

    def _advance(self, progress: float) -> None:
        super()._advance(progress)
        # In stage II it does not run: the device's memory is free for others.
        self.teacher.move(torch.device("cpu") if self.in_stage2 else next(self.student.parameters()).device)

    def label_terms(self, outputs: dict, target: Tensor) -> dict[str, Tensor]:
        """`loss` and `class_loss` of stage II: (1 - alpha) CE(z_c, y) + alpha CE(z_d, y)."""
        class_loss = self.cross_entropy(outputs["class_logits"], target)
        both = (1 - self.alpha) * class_loss + self.alpha * self.cross_entropy(outputs["distillation_logits"], target)
        return {"loss": both, "class_loss": class_loss}

    def set_logit_distillation(
        self, *, distill_type: str, alpha: float, tau: float, reduction: str, standardise_logits: bool = False
    ) -> None:
        """Keeps what `losses.logit_distillation` needs, and alpha, its weight against cross-entropy.

        Raises:
            ValueError: one of them is out of range.
        """
        if distill_type not in ("soft", "hard"):
            raise ValueError(f"distill_type must be 'soft' or 'hard' (got {distill_type!r})")
        if not 0 <= alpha <= 1 or tau <= 0:
            raise ValueError(f"alpha must be in [0, 1] and tau above 0 (got {alpha} and {tau})")
        if reduction not in ("classes", "batchmean"):
            raise ValueError(f"reduction must be 'classes' or 'batchmean' (got {reduction!r})")
        self.distill_type, self.alpha, self.tau, self.reduction = distill_type, alpha, tau, reduction
        self.standardise_logits = standardise_logits

    def logit_loss(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Distillation of logits (B, C) by what was set."""
        if self.standardise_logits:
            student, teacher = standardise_logits(student), standardise_logits(teacher)
        return logit_distillation(student, teacher, distill_type=self.distill_type, tau=self.tau, reduction=self.reduction)

    def set_taps(self, taps: Mapping[int, int]) -> dict[int, tuple[int, int]]:
        """Keeps which of the student's blocks (from 0) learns from the teacher's map of which stride, in order of blocks, and
        the numbers of these maps as `teacher_maps`. Gives the widths of tokens and map by block.

        Raises:
            ValueError: the student is no vision transformer or has no such block, the teacher is no CNN or has no such stride.
        """
        student, teacher, name = self.student, self.teacher.network, type(self).__name__
        if not hasattr(student, "forward_intermediates") or not hasattr(student, "num_prefix_tokens"):
            raise ValueError(f"{name} needs a vision transformer as student (got {type(student).__name__})")
        if hasattr(teacher, "num_prefix_tokens"):
            raise ValueError(f"{name} needs a CNN as teacher, such as resnet18 (got {type(teacher).__name__}: it has tokens)")
        self.taps = {int(block): int(stride) for block, stride in sorted(taps.items(), key=lambda tap: int(tap[0]))}
        strides = [info["reduction"] for info in teacher.feature_info]
        for block, stride in self.taps.items():
            if block not in range(len(student.feature_info)):
                raise ValueError(f"taps name block {block}; the student has blocks 0 to {len(student.feature_info) - 1}")
            if stride not in strides:
                raise ValueError(
                    f"taps ask for the teacher's map of stride {stride}; {type(teacher).__name__} has strides "
                    f"{', '.join(map(str, strides))}"
                )
        self.teacher_maps = [strides.index(stride) for stride in self.taps.values()]
        places = zip(self.taps, self.teacher_maps, strict=True)
        return {block: (student.feature_info[block]["num_chs"], teacher.feature_info[i]["num_chs"]) for block, i in places}

    def taps_of_teacher(self, images: Tensor) -> dict:
        """The teacher's `logits` (B, C) and its `maps`, one for every tap, of images in the student's normalisation."""
        indices = sorted(set(self.teacher_maps))
        logits, found = self.teacher(images, indices)
        return {"logits": logits, "maps": [found[indices.index(i)] for i in self.teacher_maps]}

    def describe(self) -> dict:
        return {**super().describe(), "teacher": models.describe(self.teacher.network)}


def answers(logits: Tensor | tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """`class_logits`, `distillation_logits` and their mean as `output`, of one head or of two; (B, C) each."""
    if not isinstance(logits, tuple):
        return {"class_logits": logits, "distillation_logits": logits, "output": logits}
    class_logits, distillation_logits = logits
    return {
        "class_logits": class_logits,
        "distillation_logits": distillation_logits,
        "output": (class_logits + distillation_logits) / 2,
    }


def _watch_first_step(task: Method) -> None:
    """`Method.check_first_step` before the first step of the optimiser that holds the task's student."""
    reference, is_checked = weakref.ref(task), []

    def look(optimizer: torch.optim.Optimizer, *_) -> None:
        if (task := reference()) is None or is_checked:
            return
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not held.isdisjoint(map(id, task.student.parameters())):
            task.check_first_step(held)
            is_checked.append(True)

    weakref.finalize(task, register_optimizer_step_pre_hook(look).remove)
