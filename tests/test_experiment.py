"""A run as a configuration: the same through a notebook and through a script, and every wrong name refused before training."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import papermill
import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from hdkd_lib import data, experiment, methods, metrics, models, recipes, runs
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
        ({"options": {"alpha": "0.5"}}, r"^alpha must be a number \(got '0\.5'\)$"),
        ({"options": {"stages": 3}}, r"^stages must be a list \(got 3\)$"),
        ({"options": {"distill_type": True}}, r"^distill_type must be text \(got True\)$"),
        ({"options": {"stage_exponent": 1.0}}, "HDKD has no option 'stage_exponent'; "),
        ({"method": "absent.module:Mine"}, "the method 'absent.module:Mine' cannot be imported"),
        ({"method": "torch.nn:Linear"}, "'torch.nn:Linear' is no method"),
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


@pytest.mark.slow
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


def test_a_method_may_be_named_or_given(digits, recipe, teacher):
    named, given = (experiment.build(digits, NETWORK, recipe, method=m, teacher=teacher).task for m in ("DeiT", methods.DeiT))
    assert type(named) is type(given) is methods.DeiT
    assert named.describe() == given.describe()


# A teacher that is an experiment

FORCED = ON_CPU | {"force": True}  # it learns for three epochs


@pytest.fixture
def first_epoch_is_best(monkeypatch):
    """Of every run, whatever it learns: the best epoch is not the last."""
    measure, calls = metrics.classification, []

    def classification(probabilities, labels):
        calls.append(None)
        return measure(probabilities, labels) | ({"balanced_accuracy": 1.0, "nll": 0.0} if len(calls) == 1 else {})

    monkeypatch.setattr(metrics, "classification", classification)


@pytest.fixture
def untrained(digits, recipe):
    """`untrained(**arguments)`: the experiment that trains a teacher, and a student's whose teacher it is."""

    def untrained(**arguments):
        teaching = experiment.build(digits, "hdkd_teacher_nano", recipe, network_options={"gate": "se"}, seed=7)
        return teaching, experiment.build(
            digits, NETWORK, recipe, **{"method": "DeiT", "seed": 5} | arguments, teacher=teaching
        )

    return untrained


def test_the_teacher_is_untrained_until_it_is_trained_and_then_of_its_best_epoch(
    untrained, digits, tmp_path, first_epoch_is_best
):
    teaching, taught = untrained()
    network = taught.task.teacher.network
    assert taught.teacher is teaching
    assert network is not teaching.task.student
    assert not getattr(network, "is_trained", False)
    assert not hasattr(network, "trained_on")
    run = taught.train_teacher(tmp_path / "teacher", **ON_CPU)
    assert run.metrics["best"]["epoch"] == 0
    assert taught.task.teacher.network is network
    assert_close(network.state_dict(), run.student("best").state_dict(), rtol=0, atol=0)
    assert not torch.equal(network.head.weight, run.student("last").head.weight)
    assert network.is_trained
    assert network.trained_on == run.student().trained_on
    assert network.trained_on["ids"] == {*digits.train.ids, *digits.val.ids}
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert taught.task.is_fresh


def test_a_student_of_an_experiment_is_that_of_its_finished_run(untrained, digits, recipe, tmp_path):
    _, taught = untrained()
    run = taught.train_teacher(tmp_path / "teacher", **ON_CPU)
    again = experiment.build(digits, NETWORK, recipe, method="DeiT", teacher=Run(run.path), seed=5)
    assert again.teacher is None
    assert_close(taught.task.student.state_dict(), again.task.student.state_dict(), rtol=0, atol=0)
    assert_close(taught.task.teacher.state_dict(), again.task.teacher.state_dict(), rtol=0, atol=0)
    own, other = (each.run(tmp_path / name, **FORCED) for name, each in (("own", taught), ("other", again)))
    assert own.config == other.config
    assert own.config["method"]["teacher"] == {"name": "hdkd_teacher_nano", "num_classes": 10, "img_size": 16, "gate": "se"}
    assert own.metrics["config_hash"] == other.metrics["config_hash"] == runs.config_hash(other.config)
    for which in ("best", "last"):
        assert_close(own.student(which).state_dict(), other.student(which).state_dict(), rtol=0, atol=0)


def test_running_trains_the_teacher_first_and_once(untrained, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HDKD_RESULTS", str(tmp_path / "results"))
    _, taught = untrained()
    run = taught.run(tmp_path / "run", **FORCED)
    said = [line.split(" (")[0] for line in capsys.readouterr().out.splitlines() if " trains " in line]
    assert said == ["Supervised trains hdkd_teacher_nano", f"DeiT trains {NETWORK}"]
    [folder] = (tmp_path / "results" / "runs" / "interactive").glob("digits-*")
    teaching = Run(folder)
    assert teaching.is_finished
    assert teaching.config["seed"] == 7
    assert_close(taught.task.teacher.network.cpu().state_dict(), teaching.student().state_dict(), rtol=0, atol=0)
    assert run.config["method"]["teacher_weights"] == models.digest(taught.task.teacher)
    taught.run(tmp_path / "run", **FORCED)
    assert capsys.readouterr().out == f"already trained: {run.path}\n"


def test_a_teacher_of_an_experiment_must_fit_the_students_data(untrained, digits, tmp_path):
    _, taught = untrained()
    other = dataclasses.replace(taught, data=data.load("digits", image_size=16, fold=1))
    other.train_teacher(tmp_path / "teacher", **ON_CPU)
    with pytest.raises(ValueError, match=r"the teacher was trained on \d+ of the \d+ test images"):
        other.run(tmp_path / "run", **FORCED)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"options": {"alhpa": 0.5}}, "DeiT has no option 'alhpa'; did you mean 'alpha'"),
        ({"options": {"alpha": 2}}, "alpha must be in"),
        ({"method": "Supervised"}, "Supervised has no teacher; leave it out"),
        ({"method": "HDKD", "network_options": {"widths": (16, 24, 40)}}, "stage 3 has 40 channels at stride 8 in the student"),
    ],
)
def test_what_is_wrong_is_said_before_the_teacher_trains(changes, message, untrained, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HDKD_RESULTS", str(tmp_path))
    with pytest.raises(ValueError, match=message):
        untrained(**changes)
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out == ""


def test_a_pretrained_teacher_that_trains_first_is_made_without_its_weights(digits, recipe, monkeypatch):
    made, create = [], models.create
    monkeypatch.setattr(models, "create", lambda name, **options: made.append((name, options)) or create(name, **options))
    teaching = experiment.build(digits, "hdkd_teacher_nano", recipe)
    teaching.task.student.creation["pretrained"] = True
    experiment.build(digits, NETWORK, recipe, method="HDKD", teacher=teaching)
    name, options = made[1]
    assert (name, options["pretrained"]) == ("hdkd_teacher_nano", False)


# The teacher that a notebook names


def test_no_teacher_is_named_by_an_empty_dict(digits):
    assert experiment.find_teacher({}, digits) is None


@pytest.mark.parametrize(("named", "which"), [({}, "best"), ({"epoch": "best"}, "best"), ({"epoch": "last"}, "last")])
def test_a_teacher_is_found_by_its_run(named, which, finished_run, digits):
    network = experiment.find_teacher({"run_dir": str(finished_run.path)} | named, digits)
    assert_close(network.state_dict(), finished_run.student(which).state_dict(), rtol=0, atol=0)
    assert network.trained_on == finished_run.student().trained_on
    assert not network.training


def test_a_teacher_is_found_by_its_name_with_pretrained_weights(digits, monkeypatch):
    asked, create = [], models.create
    monkeypatch.setattr(
        models,
        "create",
        lambda name, **options: asked.append((name, options)) or create(name, **options | {"pretrained": False}),
    )
    network = experiment.find_teacher({"network": "hdkd_teacher_nano"}, digits)
    assert asked == [("hdkd_teacher_nano", {"num_classes": 10, "img_size": 16, "pretrained": True})]
    assert not network.training


def test_a_teacher_is_found_by_its_name_with_weights_from_elsewhere(build, digits, tmp_path):
    own = build("hdkd_teacher_nano", seed=3)
    save_file(own.state_dict(), tmp_path / "mine.safetensors")
    network = experiment.find_teacher({"network": "hdkd_teacher_nano", "weights": str(tmp_path / "mine.safetensors")}, digits)
    assert_close(network.state_dict(), own.state_dict(), rtol=0, atol=0)
    assert (network.training, network.is_trained) == (False, True)
    assert models.describe(network) == {"name": "hdkd_teacher_nano", "num_classes": 10, "img_size": 16}
    assert experiment.build(digits, NETWORK, recipes.NANO, method="HDKD", teacher=network).task.teacher.network is network


@pytest.mark.parametrize(
    "named",
    [
        {"epoch": "best"},
        {"weights": "w"},
        {"run_dir": "r", "network": "n"},
        {"run_dir": "r", "weights": "w"},
        {"network": "n", "epoch": "last"},
        {"run_dir": "r", "epochs": "last"},
        {"name": "n"},
    ],
)
def test_a_teacher_that_is_named_by_half_or_twice_is_refused(named, digits):
    message = re.escape(f"teacher must have run_dir (and epoch), or network (and weights) (got {named})")
    with pytest.raises(ValueError, match=f"^{message}$"):
        experiment.find_teacher(named, digits)


def test_what_is_not_there_is_said(finished_run, digits, tmp_path):
    for named, error, message in (
        ({"run_dir": str(tmp_path)}, FileNotFoundError, "is no run folder"),
        ({"run_dir": str(finished_run.path), "epoch": "middle"}, FileNotFoundError, r"no weights at .*middle\.safetensors"),
        ({"network": "hdkd_techer_nano"}, ValueError, "did you mean 'hdkd_teacher_nano'"),
        ({"network": "hdkd_teacher_nano", "weights": str(tmp_path / "w")}, FileNotFoundError, "no weights at"),
    ):
        with pytest.raises(error, match=message):
            experiment.find_teacher(named, digits)
