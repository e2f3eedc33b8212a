"""A run as a configuration: the same through a notebook and through a script, and every wrong name refused before training."""

import json
import shutil
from pathlib import Path

import papermill
import pytest
import torch
from torch.testing import assert_close

from hdkd_lib import data, experiment, recipes, runs
from hdkd_lib.runs import Run

NETWORK = "hdkd_student_distilled_nano"
ON_CPU = {"device": "cpu", "precision": "float32"}


@pytest.fixture(scope="module")
def teacher(build):
    return build("hdkd_teacher_nano", seed=7)


def test_it_can_be_looked_at_before_it_runs(digits, recipe, teacher):
    options = {"alpha": 0.25, "stages": [3]}
    looked_at = experiment.build(digits, NETWORK, recipe, method="HDKD", options=options, teacher=teacher, seed=3)
    assert (looked_at.data, looked_at.recipe, looked_at.seed) == (digits, recipe, 3)
    description = looked_at.task.describe()
    assert (description["name"], description["alpha"], description["stages"]) == ("HDKD", 0.25, [3])
    assert description["student"] == {"name": NETWORK, "num_classes": 10, "img_size": 16}


@pytest.mark.parametrize(("method", "options"), [("HDKD", {}), ("DeiT", {}), ("CSKD", {}), ("DearKD", {"taps": {1: 4}})])
def test_arms_of_one_network_and_seed_start_from_the_same_weights(method, options, digits, recipe, teacher):
    alone = experiment.build(digits, NETWORK, recipe, seed=5)
    taught = experiment.build(digits, NETWORK, recipe, method=method, options=options, teacher=teacher, seed=5)
    assert_close(taught.task.student.state_dict(), alone.task.student.state_dict(), rtol=0, atol=0)
    other = experiment.build(digits, NETWORK, recipe, seed=6)
    assert not torch.equal(other.task.student.head.weight, alone.task.student.head.weight)


def test_making_the_teacher_does_not_change_the_student(digits, recipe, finished_run):
    alone = experiment.build(digits, NETWORK, recipe, seed=5).task.student
    taught = experiment.build(digits, NETWORK, recipe, method="DeiT", teacher=Run(finished_run.path), seed=5).task
    assert_close(taught.student.state_dict(), alone.state_dict(), rtol=0, atol=0)
    assert_close(taught.teacher.network.state_dict(), finished_run.student("best").state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network": "hdkd_studnet_nano"}, "unknown model 'hdkd_studnet_nano'; did you mean 'hdkd_student_nano'"),
        ({"network_options": {"stem_strid": 1}}, "hdkd_student_distilled_nano has no such option"),
        ({"method": "HDKT"}, "unknown method 'HDKT'; did you mean 'HDKD'"),
        ({"options": {"alhpa": 0.5}}, "HDKD has no option 'alhpa'; did you mean 'alpha'"),
        ({"options": {"teacher": 1}}, "HDKD has no option 'teacher'"),
        ({"options": {"alpha": 2.0}}, "alpha must be in"),
        ({"teacher": None}, "HDKD needs a teacher"),
        ({"method": "Supervised", "options": {}}, "Supervised has no teacher"),
    ],
)
def test_a_wrong_name_is_refused_before_anything_trains(changes, message, digits, recipe, teacher):
    arguments = {"network": NETWORK, "method": "HDKD", "options": {}, "teacher": teacher} | changes
    with pytest.raises(ValueError, match=message):
        experiment.build(digits, arguments.pop("network"), recipe, **arguments)


@pytest.fixture(scope="module")
def by_notebook(tmp_path_factory):
    """A teacher and its student, each by run.ipynb as a plan's job."""
    folder = tmp_path_factory.mktemp("notebook")
    shared = {"image_size": 16, "fraction": 0.3, "recipe": {"name": "nano", "epochs": 5, "augment": "none"}, **ON_CPU}
    arms = {
        "teacher": {"network": "hdkd_teacher_nano"},
        "student": {
            "method": "HDKD",
            "options": {"alpha": 0.3},
            "teacher": {"run_dir": str(folder / "teacher"), "epoch": "last"},
        },
    }
    for name, own in arms.items():
        parameters = shared | own | {"seed": 4, "run_dir": str(folder / name)}
        notebook = str(Path(runs.ROOT, "notebooks", "run.ipynb"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))  # the last bits depend on it
            papermill.execute_notebook(
                notebook, str(folder / f"{name}.ipynb"), parameters, kernel_name="python3", progress_bar=False
            )
    return folder


def test_a_notebook_and_a_script_give_the_same_run(by_notebook, tmp_path):
    digits = data.load("digits", image_size=16, fraction=0.3)
    recipe = recipes.get("nano", epochs=5, augment="none")
    untrained = experiment.build(digits, "hdkd_teacher_nano", recipe, seed=4)
    taught = untrained.run(tmp_path / "teacher", **ON_CPU).student("last")
    run = experiment.build(digits, NETWORK, recipe, method="HDKD", options={"alpha": 0.3}, teacher=taught, seed=4).run(
        tmp_path / "student", **ON_CPU
    )
    other = Run(by_notebook / "student")
    assert other.config == run.config
    assert other.metrics["config_hash"] == run.metrics["config_hash"] == runs.config_hash(json.loads(json.dumps(run.config)))
    for which in ("best", "last"):
        assert_close(other.student(which).state_dict(), run.student(which).state_dict(), rtol=0, atol=0)


def test_a_run_without_its_weights_cannot_teach(digits, recipe, finished_run, tmp_path):
    shutil.copytree(finished_run.path, tmp_path / "run", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(FileNotFoundError, match="no weights at"):
        experiment.build(digits, NETWORK, recipe, method="DeiT", teacher=Run(tmp_path / "run"))
