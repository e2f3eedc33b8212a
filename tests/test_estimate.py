"""Estimated times: the arithmetic, and what is timed."""

from types import SimpleNamespace

import pytest
import torch

import study
from hdkd_lib import estimate
from hdkd_lib.methods import Supervised
from hdkd_lib.methods.base import Teacher

CPU = torch.device("cpu")
PARAMETERS = {
    "dataset": "digits", "root": "", "image_size": 16, "protocol": "grouped", "fold": 0, "fraction": 1.0,
    "network": "hdkd_student_nano", "network_options": {}, "recipe": "nano", "epochs": 3, "batch_size": 0,
    "device": "cpu", "precision": "float32",
}  # fmt: skip


@pytest.fixture
def timed(digits, monkeypatch):
    """A step takes 3 seconds and a batch of validation 1; gives the actions that were timed, each called once."""
    actions = []

    def time(action, device):
        actions.append(action)
        action()
        return 3.0 if len(actions) % 2 else 1.0

    monkeypatch.setattr(estimate.data, "load", lambda name, root, **which: digits)
    monkeypatch.setattr(estimate, "_timed", time)
    return actions


@pytest.mark.parametrize(("epochs", "batch_size", "batch"), [(3, 0, 8), (6, 0, 8), (3, 4, 4), (3, 100, 8)])
def test_seconds_are_those_of_all_steps_of_all_epochs(epochs, batch_size, batch, timed):
    seconds = estimate.seconds(PARAMETERS | {"epochs": epochs, "batch_size": batch_size})
    assert seconds == pytest.approx(epochs * (120 * 3 + 60 * 1) / batch)  # 120 training and 60 validation images


def test_a_run_of_a_plan_names_its_recipe_as_a_dict_and_its_draw(timed, monkeypatch, digits):
    asked = []
    monkeypatch.setattr(estimate.data, "load", lambda name, root, **which: asked.append(which) or digits)
    own = {"recipe": {"name": "nano", "epochs": 5, "batch_size": 4}, "draws": 3, "draw": 1}
    left = {key: value for key, value in PARAMETERS.items() if key not in ("epochs", "batch_size")}
    assert estimate.seconds(left | own) == pytest.approx(5 * (120 * 3 + 60 * 1) / 4)
    assert (asked[0]["draws"], asked[0]["draw"]) == (3, 1)


def test_a_step_trains_the_student_and_asks_the_teacher_once(timed, monkeypatch):
    students, teachers = [], []

    class WatchedStudent(Supervised):
        def forward(self, images, target):
            students.append((self.student, tuple(images.shape), torch.is_grad_enabled()))
            return super().forward(images, target)

    class WatchedTeacher(Teacher):
        def forward(self, images):
            teachers.append((self.network.creation, tuple(images.shape)))
            return super().forward(images)

    monkeypatch.setattr(estimate, "Supervised", WatchedStudent)
    monkeypatch.setattr(estimate, "Teacher", WatchedTeacher)
    expert = PARAMETERS | {"network": "hdkd_teacher_nano", "network_options": {"gate": "se"}}
    estimate.seconds(PARAMETERS, expert)
    assert [seen[1:] for seen in students] == [((8, 3, 16, 16), True), ((8, 3, 16, 16), False)]  # a step, then validation
    assert all(p.grad is not None for p in students[0][0].parameters() if p.requires_grad)
    assert teachers == [({"name": "hdkd_teacher_nano", "num_classes": 10, "img_size": 16, "gate": "se"}, (8, 3, 16, 16))]
    estimate.seconds(PARAMETERS)
    assert len(teachers) == 1


def test_missing_data_are_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        estimate.seconds(PARAMETERS | {"dataset": "brain_tumor", "root": str(tmp_path / "absent")})


@pytest.mark.parametrize(("durations", "best"), [([1, 5, 3], 3), ([1, 2, 4], 2), ([1, 5], 5)])
def test_the_best_time_counts_but_the_first_call_does_not(durations, best, monkeypatch):
    now, left = [0.0], iter(durations)
    monkeypatch.setattr(estimate, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def action():
        now[0] += next(left)

    assert estimate._timed(action, CPU, repeats=len(durations) - 1) == best
    assert next(left, None) is None


@pytest.mark.parametrize(("notebook", "teacher"), [("02_teacher", None), ("03_student", None), ("04_hdkd", "02_teacher")])
def test_the_notebooks_have_every_parameter_that_an_estimate_reads(notebook, teacher):
    student, expert = (name and study._defaults(name) | {"image_size": 16, "device": "cpu"} for name in (notebook, teacher))
    assert estimate.seconds(student, expert) > 0


def test_images_that_a_teacher_makes_count_with_the_time_of_making_them(timed):
    expert = PARAMETERS | {"network": "hdkd_teacher_nano"}
    data_free = PARAMETERS | {"per_class": 8, "preset": "small"}  # stages ((0.5, 100), (1.0, 200)): 225 at full size
    # 80 images: 225 * 80 * 3 s to make them (the first that is timed), then epochs of 80 * 1 s and 60 * 3 s, in batches of 8
    assert estimate.seconds(data_free, expert) == pytest.approx((225 * 80 * 3 + 3 * (80 * 1 + 60 * 3)) / 8)


def test_a_notebooks_own_teacher_is_asked_too(timed, monkeypatch):
    asked = []
    monkeypatch.setattr(estimate, "Teacher", lambda network, student: asked.append(network.creation["name"]) or network)
    own = PARAMETERS | {"teacher_network": "resnet10t"}
    estimate.seconds(own)
    estimate.seconds(own | {"per_class": 8, "preset": "small"})
    assert asked == ["resnet10t", "resnet10t"]
