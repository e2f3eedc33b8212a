"""Estimated times: the arithmetic, and what is timed."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import study
from hdkd_lib import data, estimate, experiment
from hdkd_lib.data.batches import Part
from hdkd_lib.methods import DeiT, Supervised
from hdkd_lib.methods.base import Distillation, Method
from hdkd_lib.methods.teacher import Teacher
from hdkd_lib.training import fit

CPU = torch.device("cpu")
EIGHT = {"name": "nano", "epochs": 3, "batch_size": 8}
PARAMETERS = study._defaults("run") | {
    "image_size": 16, "network": "hdkd_student_nano", "recipe": EIGHT, "device": "cpu", "precision": "float32",
}  # fmt: skip
TAUGHT = PARAMETERS | {"network": "hdkd_student_distilled_nano", "method": "DeiT"}
TEACHER = {"network": "hdkd_teacher_nano", "network_options": {"gate": "se"}}


@pytest.fixture(autouse=True)
def nothing_is_remembered():
    for function in (estimate._counts, estimate._seconds_per_image):
        function.cache_clear()
    yield
    for function in (estimate._counts, estimate._seconds_per_image):
        function.cache_clear()


@pytest.fixture
def loaded(digits, monkeypatch):
    """`data` is what `data.load` gives, 120 training and 60 validation images; `asked`, what it was asked for."""
    given = SimpleNamespace(data=digits, asked=[])
    monkeypatch.setattr(estimate.data, "load", lambda name, root, **which: given.asked.append(which) or given.data)
    return given


@pytest.fixture
def timed(loaded, monkeypatch):
    """Each action runs once: a step with a teacher or without takes 3 seconds, after its teacher's end 2, a prediction 1.

    Gives what was timed: the tasks that trained, with the shares of training at which they did, and None for predictions.
    """
    actions, steps, train_epoch = [], [], estimate.train_epoch

    def watch(inputs, optimizer, training, *arguments):
        steps.append((training.task, training.task.progress))
        return train_epoch(inputs, optimizer, training, *arguments)

    def time(action, device):
        before = len(steps)
        action()
        assert len(steps) <= before + 1
        actions.append(steps[-1] if len(steps) > before else None)
        if actions[-1] is None:
            return 1.0
        task = actions[-1][0]
        return 2.0 if isinstance(task, Distillation) and task.in_stage2 else 3.0

    monkeypatch.setattr(estimate, "train_epoch", watch)
    monkeypatch.setattr(estimate, "_best", time)
    return actions


@pytest.mark.parametrize(
    ("epochs", "batch_size", "batch"), [(3, 8, 8), (6, 8, 8), (3, 4, 4), (3, 32, 32), (3, 100, estimate.CPU_BATCH)]
)
def test_seconds_are_those_of_all_steps_of_all_epochs(epochs, batch_size, batch, timed):
    seconds = estimate.seconds(PARAMETERS | {"recipe": {"name": "nano", "epochs": epochs, "batch_size": batch_size}})
    assert seconds == pytest.approx(epochs * (120 * 3 + 60 * 1) / batch)  # 120 training and 60 validation images
    [(task, progress), prediction] = timed
    assert (type(task), progress, prediction) == (Supervised, 0.0, None)


def test_a_batch_is_no_larger_than_the_parts(timed, loaded, digits):
    def first(part: Part, count: int) -> Part:
        return Part(part.images[:count], part.labels[:count], part.ids[:count], part.groups[:count])

    loaded.data = replace(digits, train=first(digits.train, 20), val=first(digits.val, 10))
    seconds = estimate.seconds(PARAMETERS | {"recipe": EIGHT | {"batch_size": 32}})
    assert seconds == pytest.approx(3 * (20 * 3 / 20 + 10 * 1 / 10))


def test_the_split_of_the_run_is_asked_for(timed, loaded):
    split = {
        "protocol": "random",
        "fold": 2,
        "fraction": 0.5,
        "draws": 3,
        "val_per_class": 4,
        "groups": "(.)",
        "join_chains": True,
        "download": True,
    }
    estimate.seconds(PARAMETERS | split | {"draw": 1})
    timing, counting = loaded.asked
    assert timing == {"image_size": 16} | {key: split[key] for key in split.keys() - {"fold", "fraction"}}
    assert counting == {"image_size": 16} | split


def test_images_are_counted_for_each_job_and_a_step_is_timed_once_for_all(monkeypatch):
    timed = []
    monkeypatch.setattr(estimate, "_best", lambda action, device: timed.append(action) or (3.0 if len(timed) % 2 else 1.0))
    jobs = [{}, {"fraction": 0.1}, {"fold": 1}, {"seed": 5}, {"draw": 1, "run_dir": "there"}]
    for job in jobs:
        split = {key: value for key, value in job.items() if key in ("fold", "fraction")}
        images = data.load("digits", image_size=16, **split)
        expected = 3 * (len(images.train) * 3 + len(images.val) * 1) / 8
        assert estimate.seconds(PARAMETERS | job) == pytest.approx(expected)
    assert len(timed) == 2
    estimate.seconds(PARAMETERS | {"network": "hdkd_teacher_nano"})
    assert len(timed) == 4


def test_a_step_trains_the_student_and_asks_the_teacher_once(timed, monkeypatch):
    students, predictions, teachers = [], [], []
    forward, predict, teach = DeiT.forward, Method.predict, Teacher.forward

    def learn(task, images, target):
        assert torch.is_grad_enabled()
        weights = {name: value.clone() for name, value in task.student.named_parameters()}
        students.append((task, tuple(images.shape), tuple(target.shape), weights))
        return forward(task, images, target)

    def ask(teacher, images, indices=()):
        teachers.append((teacher.network.creation, tuple(images.shape)))
        return teach(teacher, images, indices)

    def say(task, images):
        assert not task.training
        predictions.append(tuple(images.shape))
        return predict(task, images)

    monkeypatch.setattr(DeiT, "forward", learn)
    monkeypatch.setattr(Method, "predict", say)
    monkeypatch.setattr(Teacher, "forward", ask)
    estimate.seconds(TAUGHT, TEACHER | {"recipe": {"name": "nano"}, "method": "Supervised"})
    [(task, images, target, before)] = students
    assert (images, target) == ((8, 3, 16, 16), (8,))
    learning = {name: value for name, value in task.student.named_parameters() if value.grad is not None}
    assert len(learning) > 10
    assert not any(torch.equal(value, before[name]) for name, value in learning.items())
    assert teachers == [({"name": "hdkd_teacher_nano", "num_classes": 10, "img_size": 16, "gate": "se"}, (8, 3, 16, 16))]
    assert predictions == [(8, 3, 16, 16)]
    estimate.seconds(PARAMETERS)
    assert len(teachers) == 1


def test_a_pretrained_teacher_is_timed_without_its_weights(timed):
    estimate.seconds(TAUGHT, {"network": "resnet10t"})
    assert timed[0][0].teacher.network.creation == {"name": "resnet10t", "num_classes": 10}
    estimate.seconds(TAUGHT, {"network": "resnet10t", "network_options": {"pretrained": True}})
    assert len(timed) == 4


@pytest.mark.parametrize(
    ("until", "at", "step"), [(1.0, [0.0], 3.0), (0.75, [0.0, 1.0], 0.75 * 3 + 0.25 * 2), (0.0, [1.0], 2.0)]
)
def test_the_stage_without_a_teacher_counts_with_its_share(until, at, step, timed):
    seconds = estimate.seconds(TAUGHT | {"options": {"distill_until": until}}, TEACHER)
    assert seconds == pytest.approx(3 * (120 * step + 60 * 1) / 8)
    assert [action[1] for action in timed if action] == at


def test_dearkds_second_stage_is_timed_too(timed):
    student = {"network": "dearkd_tiny_patch16_224", "network_options": {"depth": 4, "patch_size": 4}}
    seconds = estimate.seconds(TAUGHT | student | {"method": "DearKD"}, TEACHER)
    assert seconds == pytest.approx(3 * (120 * (5 / 6 * 3 + 1 / 6 * 2) + 60 * 1) / 8)


def test_images_that_a_teacher_makes_count_with_the_time_of_making_them(timed):
    data_free = TAUGHT | {"synthesis": {"per_class": 8, "preset": "small"}}  # stages ((0.5, 100), (1.0, 200)): 225 at full size
    # 80 images: 225 steps of the teacher to make each, then epochs of 80 steps and 60 predictions, in batches of 8
    assert estimate.seconds(data_free, TEACHER) == pytest.approx((225 * 80 * 3 + 3 * (80 * 3 + 60 * 1)) / 8)
    (taught, _), _, (inverted, _), _ = timed
    assert inverted.student is taught.teacher.network
    assert all(parameter.grad is not None for parameter in inverted.student.parameters())
    longer = TAUGHT | {"synthesis": {"per_class": 8, "stages": [[1.0, 450]]}}
    assert estimate.seconds(longer, TEACHER) == pytest.approx((450 * 80 * 3 + 3 * (80 * 3 + 60 * 1)) / 8)


def test_missing_data_are_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        estimate.seconds(PARAMETERS | {"dataset": "brain_tumor", "root": str(tmp_path / "absent")})


@pytest.mark.parametrize(("durations", "best"), [([1, 5, 3], 3), ([1, 2, 4], 2), ([1, 5], 5)])
def test_the_best_time_counts_but_the_first_call_does_not(durations, best, monkeypatch):
    now, left = [0.0], iter(durations)
    monkeypatch.setattr(estimate, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def action():
        now[0] += next(left)

    assert estimate._best(action, CPU, repeats=len(durations) - 1) == best
    assert next(left, None) is None


def test_an_experiment_that_was_timed_is_not_fresh(digits, recipe, tmp_path, timed):
    built = experiment.build(digits, "hdkd_student_nano", recipe)
    assert estimate.time_of(built, device="cpu", precision="float32") == (3.0 / 16, 1.0 / 16)
    with pytest.raises(ValueError, match="student is trained already"):
        fit(built.task, digits, recipe, tmp_path, device="cpu", precision="float32")


@pytest.mark.parametrize("taught", [False, True])
def test_run_ipynb_has_every_parameter_that_an_estimate_reads(taught):
    own = study._defaults("run") | {"image_size": 16, "device": "cpu"}
    teacher = own | {"network": "hdkd_teacher_nano"}
    assert estimate.seconds(own | {"method": "HDKD"} if taught else own, teacher if taught else None) > 0
