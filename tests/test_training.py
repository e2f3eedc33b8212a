"""The loop: what it chooses, what survives an interruption, and what it says when it fails."""

import errno
import json
import math
import os
import random
import shutil
import signal
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close

import study
from hdkd_lib import data as hdkd_data
from hdkd_lib import distributed, experiment, metrics, recipes, runs, training
from hdkd_lib.data.augment import Augmentation
from hdkd_lib.data.batches import Files, Part
from hdkd_lib.data.imbalance import IMBALANCE, class_weights
from hdkd_lib.evaluation import evaluate, predict
from hdkd_lib.methods import CSKD, DeiT, Supervised
from hdkd_lib.recipes import DEIT, HDKD_STUDENT, HDKD_TEACHER, Recipe
from hdkd_lib.training import Inputs, Training, fit

ON_CPU = {"device": "cpu", "precision": "float32", "force": True}  # the teachers here are not trained
SHORT = Recipe(epochs=2, batch_size=60, optimizer="adam", lr=1e-3, augment="none")
MIXED = replace(DEIT, epochs=3, batch_size=16, warmup_epochs=1)


@pytest.fixture
def alone(build):
    """`alone(**arguments)`: the nano student, trained alone."""
    return lambda **arguments: Supervised(student=build("hdkd_student_nano", **arguments))


def failing_after(task, steps: int, error: BaseException):
    """The task, raising in its step number `steps` + 1."""
    forward, done = task.forward, []

    def fail(images, target):
        if len(done) == steps:
            raise error
        done.append(None)
        return forward(images, target)

    task.forward = fail
    return task


# Interruption


@pytest.mark.parametrize("steps", [10, 16])  # within the second epoch; before the third
def test_an_interrupted_and_resumed_run_is_bitwise_the_uninterrupted_one(
    steps, finished_run, make_task, digits, recipe, tmp_path
):
    with pytest.raises(KeyboardInterrupt):
        fit(failing_after(make_task(), steps, KeyboardInterrupt()), digits, recipe, tmp_path / "run", **ON_CPU)
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert len(state["history"]) == steps // 8
    torch.manual_seed(12345)
    run = fit(make_task(seed=99), digits, recipe, tmp_path / "run", **ON_CPU)  # the checkpoint holds the student's weights
    for which in ("last", "best"):
        resumed, whole = (load_file(r.path / f"{which}.safetensors") for r in (run, finished_run))
        assert resumed.keys() == whole.keys()
        assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    resumed, whole = (r.history.drop(columns="seconds") for r in (run, finished_run))
    pd.testing.assert_frame_equal(resumed, whole, check_exact=True)
    assert run.metrics["best"] == finished_run.metrics["best"]
    assert not list(run.path.glob("*checkpoint*"))


@pytest.mark.parametrize("checkpoint_seconds", [60.0, 0.0])  # at epochs' ends; after each step, too
def test_a_resumed_run_of_deits_recipe_is_bitwise_too(checkpoint_seconds, alone, digits, tmp_path):
    runs, within = [], {"checkpoint_seconds": checkpoint_seconds}
    for interrupted in (False, True):
        random.seed(12345 + interrupted)  # erasing
        np.random.seed(12345 + interrupted)  # noqa: NPY002, mixup
        path = tmp_path / str(interrupted)
        if interrupted:
            with pytest.raises(KeyboardInterrupt):
                fit(failing_after(alone(), 10, KeyboardInterrupt()), digits, MIXED, path, **ON_CPU, **within)
            random.random()
            state = torch.load(path / "checkpoint.pt", weights_only=True)
            assert (len(state["history"]), state["epoch"]["steps"]) == ((1, 2) if checkpoint_seconds == 0 else (1, 0))
        runs.append(fit(alone(), digits, MIXED, path, **ON_CPU))
    whole, resumed = (load_file(run.path / "last.safetensors") for run in runs)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    whole, resumed = (run.history.drop(columns="seconds") for run in runs)
    pd.testing.assert_frame_equal(resumed, whole, check_exact=True)


def test_a_run_that_is_asked_to_end_keeps_its_state_first_and_goes_on_bitwise(alone, digits, tmp_path):
    recipe, asked = replace(SHORT, augment="hdkd", ema=0.8), []
    whole = fit(alone(), digits, recipe, tmp_path / "whole", **ON_CPU)
    before = signal.signal(signal.SIGTERM, lambda *_: asked.append("ended"))
    try:
        task = alone()
        forward, task.forward = task.forward, lambda *batch: os.kill(os.getpid(), signal.SIGTERM) or forward(*batch)
        with pytest.raises(SystemExit):
            fit(task, digits, recipe, tmp_path / "run", **ON_CPU)
        assert asked == ["ended"], "whoever listened before is told"
    finally:
        signal.signal(signal.SIGTERM, before)
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert (len(state["history"]), state["epoch"]["steps"], state["epoch"]["images"]) == (0, 1, 60)
    seen = watched(task := alone())
    run = fit(task, digits, recipe, tmp_path / "run", **ON_CPU)
    assert len([images for images, _ in seen]) == 3, "the first of four steps is not repeated"
    for which in ("last", "best", "ema"):
        resumed, expected = (load_file(of.path / f"{which}.safetensors") for of in (run, whole))
        assert_close(resumed, expected, rtol=0, atol=0)
    resumed, expected = (of.history.drop(columns="seconds") for of in (run, whole))
    pd.testing.assert_frame_equal(resumed, expected, check_exact=True)


def test_without_resume_training_starts_anew(alone, digits, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fit(failing_after(alone(), 3, KeyboardInterrupt()), digits, SHORT, tmp_path, **ON_CPU)
    seen = []
    task = alone()
    task.set_progress = seen.append
    fit(task, digits, SHORT, tmp_path, resume=False, **ON_CPU)
    assert seen == [0.0, 0.5]


def test_a_finished_run_is_returned_and_not_trained_again(finished_run, make_task, digits, recipe, capsys):
    files = {f: f.stat().st_mtime_ns for f in finished_run.path.iterdir() if f.name != ".lock"}
    task = failing_after(make_task(), 0, AssertionError("trained again"))
    run = fit(task, digits, recipe, finished_run.path, **ON_CPU)
    assert capsys.readouterr().out == f"already trained: {run.path}\n"
    assert run.metrics == finished_run.metrics
    assert {f: f.stat().st_mtime_ns for f in run.path.iterdir() if f.name != ".lock"} == files


def test_a_trained_student_does_not_start_another_run_but_may_ask_for_its_own_again(alone, digits, tmp_path):
    task = alone()
    run = fit(task, digits, SHORT, tmp_path / "run", **ON_CPU)
    written = (run.path / "metrics.json").stat().st_mtime_ns
    assert fit(task, digits, SHORT, tmp_path / "run", **ON_CPU).path == run.path
    assert (run.path / "metrics.json").stat().st_mtime_ns == written
    with pytest.raises(ValueError, match="student is trained already"):
        fit(task, digits, replace(SHORT, lr=2e-3), tmp_path / "other", **ON_CPU)


def test_an_interrupted_task_goes_on_in_its_own_run(alone, digits, tmp_path):
    task = alone()
    forward = task.forward
    with pytest.raises(KeyboardInterrupt):
        fit(failing_after(task, 3, KeyboardInterrupt()), digits, SHORT, tmp_path / "run", **ON_CPU)
    task.forward = forward
    assert len(fit(task, digits, SHORT, tmp_path / "run", **ON_CPU).history) == SHORT.epochs


def test_another_configuration_sets_the_folder_aside_whole(alone, digits, tmp_path, capsys):
    first = fit(alone(), digits, replace(SHORT, epochs=1), tmp_path / "run", **ON_CPU)
    before = {f.name: f.read_bytes() for f in first.path.iterdir()}
    capsys.readouterr()
    second = fit(alone(), digits, replace(SHORT, epochs=1), tmp_path / "run", seed=1, **ON_CPU)
    assert "run holds a run of another configuration: it was renamed to run~" in capsys.readouterr().out
    aside = tmp_path / f"run~{runs.config_hash(first.config)}"
    assert {f.name: f.read_bytes() for f in aside.iterdir()} == before
    assert second.path == tmp_path / "run"
    assert second.config["seed"] == 1


def test_another_teacher_is_another_configuration(build, make_task, digits, recipe, finished_run, tmp_path):
    task = make_task()
    task.teacher.network.load_state_dict(build("hdkd_teacher_nano", seed=8).state_dict())
    with pytest.raises(KeyboardInterrupt):
        fit(failing_after(task, 0, KeyboardInterrupt()), digits, recipe, tmp_path, **ON_CPU)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["method"].pop("teacher_weights") != finished_run.config["method"].pop("teacher_weights")
    assert config == finished_run.config


# Damage


@pytest.fixture(scope="module")
def interrupted(make_task, digits, recipe, tmp_path_factory):
    """A run that was interrupted in its third epoch, with checkpoints after the second and within the third."""
    path = tmp_path_factory.mktemp("interrupted") / "run"
    with pytest.raises(KeyboardInterrupt):
        fit(failing_after(make_task(), 18, KeyboardInterrupt()), digits, recipe, path, **ON_CPU, checkpoint_seconds=0.0)
    return path


def flip(file: Path) -> None:
    """Changes one bit in the middle of a file."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def assert_same_end(run: runs.Run, whole: runs.Run) -> None:
    for name in ("last.safetensors", "best.safetensors", "predictions.csv", "predictions_last.csv", "split.csv", "config.json"):
        assert (run.path / name).read_bytes() == (whole.path / name).read_bytes(), name
    pd.testing.assert_frame_equal(run.history.drop(columns="seconds"), whole.history.drop(columns="seconds"), check_exact=True)
    assert all(run.metrics[key] == whole.metrics[key] for key in ("best", "last", "images", "config_hash"))
    assert not [file for file in run.path.iterdir() if file.name.startswith(("checkpoint.pt", ".")) and "~" not in file.name]


@pytest.mark.parametrize("how", [flip, cut, empty])
@pytest.mark.parametrize(
    ("damaged", "steps"),
    [
        (["checkpoint.pt"], 7),
        (["checkpoint_before.pt"], 6),
        (["checkpoint.pt", "checkpoint_before.pt"], 24),
        (["config.json"], 6),
    ],
)
def test_an_interrupted_run_goes_on_from_the_last_checkpoint_that_is_whole(
    damaged, steps, how, interrupted, finished_run, make_task, digits, recipe, tmp_path, capsys
):
    shutil.copytree(interrupted, tmp_path / "run")
    for name in damaged:
        how(tmp_path / "run" / name)
    seen = watched(task := make_task())
    run = fit(task, digits, recipe, tmp_path / "run", **ON_CPU)
    said = capsys.readouterr().out
    for name in damaged:
        assert f"{run.path / name} is damaged: it was renamed to {name}~damaged and will be made anew" in said
        assert (run.path / f"{name}~damaged").exists()
    assert len(seen) == steps
    assert_same_end(run, finished_run)


def test_a_checkpoint_of_another_configuration_is_not_continued(interrupted, make_task, digits, recipe, tmp_path):
    shutil.copytree(interrupted, tmp_path / "run")
    cut(tmp_path / "run" / "config.json")
    seen = watched(task := make_task())
    run = fit(task, digits, replace(recipe, epochs=1), tmp_path / "run", **ON_CPU)
    assert len(seen) == 8
    assert len(run.history) == 1
    [aside] = tmp_path.glob("run~*")
    assert (aside / "checkpoint.pt").exists()


def test_a_changed_letter_does_not_make_it_another_configuration(
    interrupted, finished_run, make_task, digits, recipe, tmp_path, capsys
):
    shutil.copytree(interrupted, tmp_path / "run")
    config = tmp_path / "run" / "config.json"
    config.write_text(config.read_text().replace('"name": "', '"name": "x', 1))
    run = fit(make_task(), digits, recipe, tmp_path / "run", **ON_CPU)
    assert f"{config} is damaged: it was renamed to config.json~damaged" in capsys.readouterr().out
    assert not list(tmp_path.glob("run~*"))
    assert_same_end(run, finished_run)


TABLES = ["metrics.json", "predictions.csv", "predictions_last.csv", "split.csv", "config.json", "environment.json"]


@pytest.mark.parametrize("how", [flip, cut, empty, Path.unlink])
@pytest.mark.parametrize("name", TABLES)
def test_a_finished_run_that_lost_a_table_is_measured_again_and_not_trained(
    name, how, finished_run, make_task, digits, recipe, tmp_path, capsys
):
    shutil.copytree(finished_run.path, tmp_path / "run")
    how(tmp_path / "run" / name)
    run = fit(failing_after(make_task(), 0, AssertionError("trained")), digits, recipe, tmp_path / "run", **ON_CPU)
    assert_same_end(run, finished_run)
    said = capsys.readouterr().out
    assert how is Path.unlink or f"{name} is damaged: it was renamed to {name}~damaged" in said
    fit(failing_after(make_task(), 0, AssertionError("trained")), digits, recipe, tmp_path / "run", **ON_CPU)
    assert capsys.readouterr().out == f"already trained: {run.path}\n"


@pytest.mark.parametrize("name", ["last.safetensors", "best.safetensors", "history.csv"])
def test_a_finished_run_whose_weights_are_damaged_is_trained_again(
    name, finished_run, make_task, digits, recipe, tmp_path, capsys
):
    shutil.copytree(finished_run.path, tmp_path / "run")
    flip(tmp_path / "run" / name)
    with pytest.raises(KeyboardInterrupt):  # what is left of its first training confuses nobody
        fit(failing_after(make_task(), 10, KeyboardInterrupt()), digits, recipe, tmp_path / "run", **ON_CPU)
    assert f"{name} is damaged: it was renamed to {name}~damaged" in capsys.readouterr().out
    run = fit(make_task(), digits, recipe, tmp_path / "run", **ON_CPU)
    assert "damaged" not in capsys.readouterr().out
    assert_same_end(run, finished_run)


def test_the_moving_average_comes_back_too(alone, digits, tmp_path):
    recipe = replace(SHORT, ema=0.8)
    whole = fit(alone(), digits, recipe, tmp_path / "run", **ON_CPU)
    expected = {name: (whole.path / name).read_bytes() for name in ("ema.safetensors", "predictions_ema.csv")}
    empty(whole.path / "predictions_ema.csv")
    run = fit(failing_after(alone(), 0, AssertionError("trained")), digits, recipe, tmp_path / "run", **ON_CPU)
    assert {name: (run.path / name).read_bytes() for name in expected} == expected


def test_a_kill_between_the_last_checkpoint_and_the_table_loses_no_row(
    make_task, digits, recipe, finished_run, tmp_path, monkeypatch
):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "_finish", killed)
        with pytest.raises(KeyboardInterrupt):
            fit(make_task(), digits, recipe, tmp_path / "run", **ON_CPU)
    table = tmp_path / "run" / "history.csv"
    table.write_text("".join(table.read_text().splitlines(keepends=True)[:-1]))
    run = fit(failing_after(make_task(), 0, AssertionError("trained")), digits, recipe, tmp_path / "run", **ON_CPU)
    assert_same_end(run, finished_run)


def test_what_killed_processes_had_begun_to_write_goes(alone, digits, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fit(failing_after(alone(), 3, KeyboardInterrupt()), digits, SHORT, tmp_path / "run", **ON_CPU)
    for name in (".checkpoint.pt.4711", ".history.csv.4712"):
        (tmp_path / "run" / name).write_text("half")
    run = fit(alone(), digits, SHORT, tmp_path / "run", **ON_CPU)
    assert not list(run.path.glob(".*"))


def test_a_finished_run_of_before_there_were_checksums_stays_finished(finished_run, make_task, digits, recipe, tmp_path):
    shutil.copytree(finished_run.path, tmp_path / "run")
    (tmp_path / "run" / "checksums.json").unlink()
    run = fit(failing_after(make_task(), 0, AssertionError("trained")), digits, recipe, tmp_path / "run", **ON_CPU)
    assert run.student("last").is_trained
    assert len(run.predictions().ids) == 60


def test_a_finished_run_whose_checksums_are_damaged_is_trained_again(finished_run, make_task, digits, recipe, tmp_path):
    shutil.copytree(finished_run.path, tmp_path / "run")
    (tmp_path / "run" / "checksums.json").write_text("{")
    with pytest.raises(AssertionError, match="trained"):
        fit(failing_after(make_task(), 0, AssertionError("trained")), digits, recipe, tmp_path / "run", **ON_CPU)
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_a_folder_in_which_another_process_trains_is_not_set_aside(alone, digits, tmp_path, capsys):
    short = replace(SHORT, epochs=1)
    first = fit(alone(), digits, short, tmp_path / "run", **ON_CPU)
    with ThreadPoolExecutor(1) as pool:
        with runs.lock(first.path):  # as a process that trains there
            second = pool.submit(fit, alone(), digits, replace(short, lr=1e-2), tmp_path / "run", **ON_CPU)
            with pytest.raises(TimeoutError):
                second.result(timeout=3)
            assert [path.name for path in tmp_path.iterdir() if path.name[0] != "."] == ["run"]
            assert "waiting for another process that trains in this folder: run" in capsys.readouterr().out
        assert second.result(timeout=60).config["recipe"]["lr"] == 1e-2
    assert len(list(tmp_path.glob("run~*"))) == 1


# What is said


def test_it_says_what_it_trains_how_far_it_was_and_what_came_out(alone, digits, tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt):
        fit(failing_after(alone(), 3, KeyboardInterrupt()), digits, SHORT, tmp_path, **ON_CPU)
    count = sum(p.numel() for p in alone().student.parameters())
    what = f"Supervised trains hdkd_student_nano ({count:,} parameters) on 120 images for 2 epochs, on cpu in float32"
    assert capsys.readouterr().out == f"{what}\n"
    run = fit(alone(), digits, SHORT, tmp_path, **ON_CPU)
    first, last = capsys.readouterr().out.splitlines()
    assert first == f"{what}, resumed from epoch 1"
    seconds, best = run.history.seconds.sum(), run.metrics["best"]["epoch"]
    assert last == f"trained 2 epochs in {seconds:.1f} s; validation chose epoch {best}: {run.path}"


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.04, "0.0 s"), (59, "59.0 s"), (60, "1.0 min"), (3599, "60.0 min"), (5400, "1.5 h")]
)
def test_a_duration_is_said_in_a_unit_that_fits(seconds, said):
    assert training._duration(seconds) == said


class Bar:
    """What would be drawn."""

    made: list["Bar"]

    def __init__(self, **options):
        self.options, self.count, self.says = options, options["initial"], []
        self.made.append(self)

    def update(self, count: int) -> None:
        self.count += count

    def set_postfix(self, **says) -> None:
        self.says.append(says)

    def close(self) -> None:
        self.options["closed"] = True


def test_the_bar_counts_images_from_where_the_run_goes_on(alone, digits, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(training, "tqdm", type("Made", (Bar,), {"made": made}))
    with pytest.raises(KeyboardInterrupt):
        fit(failing_after(alone(), 3, KeyboardInterrupt()), digits, SHORT, tmp_path, **ON_CPU)
    run = fit(alone(), digits, SHORT, tmp_path, **ON_CPU)
    cut, whole = made
    assert (cut.options["initial"], cut.options["total"], cut.count) == (0, 240, 180)
    assert (whole.options["initial"], whole.options["total"], whole.count) == (120, 240, 240)
    assert (whole.options["desc"], whole.options["unit"], whole.options["closed"]) == ("Supervised", "image", True)
    last = run.history.iloc[1]
    assert whole.says == [{"epoch": "2/2", "loss": f"{last.train_loss:.3f}", "val": f"{last.val_balanced_accuracy:.3f}"}]


def test_the_bar_counts_the_images_of_all_processes(alone, digits, monkeypatch):
    monkeypatch.setattr(distributed, "rank_and_count", lambda: (0, 2))
    monkeypatch.setattr(distributed, "sum_over_processes", lambda total: 2 * total)
    task, bar = alone(), type("Made", (Bar,), {"made": []})(initial=0)
    job = Training(task, digits, SHORT, None, 0, torch.device("cpu"), "float32")
    seen = watched(task)
    training.train_epoch(Inputs(job).epoch(0), training.make_optimizer(task, SHORT)[0], job, bar, training.Epoch())
    assert len(labels_in(seen)) == 60
    assert bar.count == 120


# What a batch is drawn from


@pytest.mark.parametrize("recipe", [MIXED, replace(SHORT, augment="hdkd")])
def test_an_epochs_batches_depend_on_seed_and_epoch_alone(recipe, alone, digits):
    def drawn(epoch: int, seed: int = 0) -> list[torch.Tensor]:
        inputs = Inputs(Training(alone(), digits, recipe, None, seed, torch.device("cpu"), "float32"))
        assert len(inputs) == 120
        torch.manual_seed(epoch + 10 * len(results))
        return [part for batch in inputs.epoch(epoch) for part in batch]

    results = {}
    for epoch, seed in ((1, 0), (2, 0), (1, 1)):
        results[epoch, seed] = drawn(epoch, seed)
        assert all(torch.equal(a, b) for a, b in zip(results[epoch, seed], drawn(epoch, seed), strict=True))
    first, *others = results.values()
    for other in others:
        assert not torch.equal(first[0], other[0])


# What is measured, and when


@pytest.fixture
def script(monkeypatch):
    """`script(task, scores)`: the first validations score these (by `names`); gives the weights at each."""

    def script(task, scores, names=("balanced_accuracy", "nll")):
        scripted, weights, measure = iter(scores), [], metrics.classification

        def classification(probabilities, labels):
            weights.append({name: value.clone() for name, value in task.student.state_dict().items()})
            score = next(scripted, None)
            return measure(probabilities, labels) | (dict(zip(names, score, strict=True)) if score else {})

        monkeypatch.setattr(metrics, "classification", classification)
        return weights

    return script


def test_the_best_epoch_has_the_highest_validation_score_then_the_lowest_cross_entropy(alone, digits, tmp_path, script):
    task = alone()
    weights = script(task, [(0.5, 1.0), (0.7, 0.9), (0.7, 0.8), (0.7, 0.8), (0.6, 0.1)])
    run = fit(task, digits, replace(SHORT, epochs=5), tmp_path, **ON_CPU)
    assert run.metrics["best"]["epoch"] == 2
    assert run.metrics["last"]["epoch"] == 4
    assert_close(load_file(run.path / "best.safetensors"), weights[2], rtol=0, atol=0)
    assert_close(load_file(run.path / "last.safetensors"), weights[4], rtol=0, atol=0)
    assert not torch.equal(weights[2]["head.weight"], weights[3]["head.weight"])
    kept = torch.tensor(run.predictions().probabilities, dtype=torch.float32)
    best, last = (predict(Supervised(student=run.student(which)), digits.test) for which in ("best", "last"))
    assert_close(kept, best, rtol=0, atol=2e-6)
    assert (kept - last).abs().max() > 1e-4
    kept = torch.tensor(pd.read_csv(run.path / "predictions_last.csv")[digits.classes].to_numpy(), dtype=torch.float32)
    assert_close(kept, last, rtol=0, atol=2e-6)
    fitted = evaluate(run.student("last"), digits, "train", device="cpu", precision="float32")["accuracy"]
    assert run.metrics["last"]["train"] == {"accuracy": pytest.approx(fitted, abs=1e-6)}


def test_a_resumed_run_remembers_a_better_epoch_before_the_interruption(alone, digits, tmp_path, script):
    task = failing_after(alone(), 2, KeyboardInterrupt())
    weights = script(task, [(0.9, 0.5), (0.4, 1.0)])
    with pytest.raises(KeyboardInterrupt):
        fit(task, digits, SHORT, tmp_path, **ON_CPU)
    run = fit(alone(), digits, SHORT, tmp_path, **ON_CPU)
    assert run.metrics["best"]["epoch"] == 0
    assert_close(load_file(run.path / "best.safetensors"), weights[0], rtol=0, atol=0)


def test_metrics_repeat_the_histories_validation_scores_of_the_epochs_they_name(finished_run):
    history = finished_run.history
    assert history.epoch.tolist() == [0, 1, 2]
    order = history.sort_values(["val_balanced_accuracy", "val_nll"], ascending=[False, True])
    for which, epoch in (("best", order.epoch.iloc[0]), ("last", 2)):
        measured = finished_run.metrics[which]
        assert measured["epoch"] == epoch
        row = history.iloc[epoch]
        assert {k: measured["val"][k] for k in ("accuracy", "balanced_accuracy", "nll")} == {
            k: row[f"val_{k}"] for k in ("accuracy", "balanced_accuracy", "nll")
        }
    assert (history.train_loss - history.train_logit_loss - 10 * history.train_feature_loss).abs().max() < 1e-3
    assert history.train_loss.iloc[-1] < history.train_loss.iloc[0]
    assert finished_run.metrics["images"] == {"train": 120, "val": 60, "test": 60}


class Sealed:
    """A part whose images and labels may be read only once `path` exists."""

    def __init__(self, part, path: Path):
        self.part, self.path = part, path

    def __len__(self) -> int:
        return len(self.part)

    def __getattr__(self, name: str):
        if name in ("images", "labels", "groups"):
            assert self.path.exists(), f"test {name} were read before training ended"
        return getattr(self.part, name)


def test_the_test_part_is_not_read_before_training_ends(alone, digits, tmp_path):
    sealed = replace(digits, test=Sealed(digits.test, tmp_path / "last.safetensors"))
    with pytest.raises(AssertionError, match="were read before training ended"):
        predict(alone(), sealed.test)
    assert fit(alone(), sealed, SHORT, tmp_path, **ON_CPU).metrics["best"]["test"]["accuracy"] >= 0


def test_metrics_are_written_last_and_the_checkpoint_is_gone(alone, digits, tmp_path, monkeypatch):
    written = []

    def spy(path, write):
        written.append(path.name)
        write_atomically(path, write)

    write_atomically = runs.write_atomically
    for module in (runs, training):
        monkeypatch.setattr(module, "write_atomically", spy)
    run = fit(alone(), digits, SHORT, tmp_path, **ON_CPU)
    assert written[-1] == "metrics.json"
    assert set(written) - {"checkpoint.pt"} == {f.name for f in run.path.iterdir()} - {".lock"}


def test_split_csv_lists_each_image_once_with_its_part(finished_run, digits):
    split = pd.read_csv(finished_run.path / "split.csv", dtype=str)
    assert split.id.is_unique
    for part in ("train", "val", "test"):
        own = split[split.part == part]
        assert own.id.tolist() == getattr(digits, part).ids
        assert own.group.astype(int).tolist() == getattr(digits, part).groups.tolist()


# The paper's protocol

PAPER = replace(SHORT, protocol="paper")


def test_the_papers_protocol_chooses_the_epoch_by_accuracy_on_the_test_part(alone, digits, tmp_path, script):
    task = alone()
    scores = [(0.5, 0.9, 1.0), (0.7, 0.1, 0.9), (0.7, 0.1, 0.8), (0.6, 0.2, 0.1)]
    weights = script(task, scores, names=("accuracy", "balanced_accuracy", "nll"))
    run = fit(task, digits, replace(PAPER, epochs=4), tmp_path, **ON_CPU)
    assert run.metrics["best"]["epoch"] == 2
    assert_close(load_file(run.path / "best.safetensors"), weights[2], rtol=0, atol=0)


def test_the_papers_protocol_validates_on_the_test_part_and_trains_on_the_validation_part(alone, digits, tmp_path):
    task = alone()
    seen = watched(task)
    run = fit(task, digits, PAPER, tmp_path, **ON_CPU)
    history, measured = run.history, run.metrics
    for which in ("best", "last"):
        assert measured[which]["val"] == measured[which]["test"]
        assert measured[which]["test"]["nll"] == history.val_nll[measured[which]["epoch"]]
    correct = predict(Supervised(student=run.student("last")), digits.test).argmax(1) == digits.test.labels
    assert measured["last"]["test"]["accuracy"] == pytest.approx(correct.float().mean().item(), abs=1e-6)
    assert measured["images"] == {"train": 180, "val": 60, "test": 60}
    both = torch.cat([digits.train.labels, digits.val.labels])
    assert labels_in(seen).bincount().tolist() == (2 * both.bincount()).tolist()
    split = pd.read_csv(run.path / "split.csv", dtype=str)
    assert split[split.part == "train"].id.tolist() == digits.train.ids + digits.val.ids
    assert split[split.part == "test"].id.tolist() == digits.test.ids
    assert len(split) == 240
    assert run.student().trained_on["ids"] == {*digits.train.ids, *digits.val.ids}
    assert runs.load(tmp_path).selection.tolist() == ["test"]
    assert run.config["data"] == digits.config


def test_in_the_papers_protocol_the_rate_of_an_epoch_is_that_of_the_epoch_before(alone, digits, tmp_path):
    recipe = replace(HDKD_STUDENT, epochs=6, warmup_epochs=3, batch_size=180, augment="none")
    honest, paper = (rates(alone(), digits, replace(recipe, protocol=p), tmp_path / p) for p in ("honest", "paper"))
    assert len(set(honest)) == 6
    assert paper == [honest[0], *honest[:-1]]


@pytest.mark.parametrize(("protocol", "momenta"), [("honest", [0.1, 0.1, 0.1]), ("paper", [0.3439, 0.271, 0.19])])
def test_statistics_move_as_the_papers_in_its_protocol_alone(protocol, momenta, make_task, digits, tmp_path):
    task = make_task()
    fit(task, digits, replace(SHORT, epochs=1, protocol=protocol), tmp_path, **ON_CPU)
    norms = ([m for m in stage.modules() if isinstance(m, torch.nn.BatchNorm2d)] for stage in task.student.stages)
    assert [norm[0].momentum for norm in norms] == pytest.approx(momenta)


# Teachers


def test_a_teacher_at_chance_is_refused_with_its_numbers_unless_forced(make_task, digits, tmp_path, capsys):
    task = make_task()
    message = r"no better than chance \(balanced accuracy 0\.100, chance 0\.100 \+ 0\.077\): train it first, or pass force"
    with pytest.raises(ValueError, match=message):
        fit(failing_after(task, 0, AssertionError("trained")), digits, SHORT, tmp_path, **ON_CPU | {"force": False})
    assert "teacher on validation: balanced accuracy 0.100, chance 0.100" in capsys.readouterr().out
    assert fit(make_task(), digits, SHORT, tmp_path, **ON_CPU).is_finished


def test_a_task_whose_teacher_was_refused_can_be_forced(make_task, digits, tmp_path):
    task = make_task()
    with pytest.raises(ValueError, match="no better than chance"):
        fit(task, digits, SHORT, tmp_path, **ON_CPU | {"force": False})
    assert fit(task, digits, SHORT, tmp_path, **ON_CPU).is_finished


# chance .1 + 2 sqrt(.1 * .9 / 60) = .17746
@pytest.mark.parametrize(("score", "passes"), [(0.177, False), (0.178, True)])
def test_a_teacher_may_teach_from_two_standard_errors_above_chance(score, passes, make_task, digits, tmp_path, script):
    task = failing_after(make_task(), 0, ValueError("taught"))
    script(task, [(score, 1.0)])
    with pytest.raises(ValueError, match="taught" if passes else "no better than chance"):
        fit(task, digits, SHORT, tmp_path, **ON_CPU | {"force": False})


def test_a_teacher_is_measured_on_the_validation_part(make_task, digits, tmp_path, monkeypatch):
    measured = []
    monkeypatch.setattr(metrics, "classification", lambda p, labels: measured.append(labels) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fit(make_task(), digits, PAPER, tmp_path, **ON_CPU)
    assert measured == [digits.val.labels]


@pytest.fixture
def taught(finished_run, alone):
    """A student whose teacher is the network of the finished run."""
    return DeiT(student=alone().student, teacher=finished_run.student())


def test_a_teacher_from_a_run_of_the_same_fold_is_accepted(taught, digits, tmp_path):
    assert fit(taught, digits, SHORT, tmp_path, **ON_CPU).is_finished


def test_a_teacher_that_has_seen_test_images_is_refused_whatever_is_forced(taught, finished_run, digits, tmp_path):
    other = hdkd_data.load("digits", image_size=16, fold=1)
    seen = len({*digits.train.ids, *digits.val.ids} & {*other.test.ids})
    message = rf"trained on {seen} of the {len(other.test)} test images \(grouped split, fold 0; here grouped, 1\)"
    assert 0 < seen < len(other.test)
    with pytest.raises(ValueError, match=message):
        fit(taught, other, SHORT, tmp_path / "run", **ON_CPU)
    assert not (tmp_path / "run").exists()
    joined = digits.chosen_on_test()
    one = replace(digits, test=Part(joined.train.images[-1:], *(p[-1:] for p in (joined.train.labels, joined.train.ids)), [0]))
    with pytest.raises(ValueError, match="trained on 1 of the 1 test images"):  # one that it was chosen on
        fit(taught, one, SHORT, tmp_path / "run", **ON_CPU)


def test_images_of_the_same_names_in_another_data_set_are_others(taught, digits, tmp_path):
    other = hdkd_data.load("digits", image_size=16, fold=1)
    other = replace(other, train=digits.train, val=digits.val, config=other.config | {"content": "another"})
    with pytest.raises(ValueError, match="taught"):
        fit(failing_after(taught, 0, ValueError("taught")), other, SHORT, tmp_path, **ON_CPU)


def test_what_is_said_of_groups_afterwards_hides_no_test_image_that_the_teacher_has_seen(taught, digits, tmp_path):
    images = digits.config["content"]
    other = replace(digits, test=digits.train, config=digits.config | {"groups": "(.)", "content": "grouped", "images": images})
    with pytest.raises(ValueError, match="the teacher was trained on 120 of the 120 test images"):
        fit(taught, other, SHORT, tmp_path, **ON_CPU)


def test_a_run_that_begins_anew_has_no_earlier_commit(alone, digits, tmp_path):
    (tmp_path / "run").mkdir()
    of_another = {"commit": "0" * 40, "uncommitted_changes": True}
    (tmp_path / "run" / "environment.json").write_text(json.dumps(of_another))
    environment = fit(alone(), digits, SHORT, tmp_path / "run", **ON_CPU).environment
    assert "earlier_commits" not in environment
    assert environment["commit"] != "0" * 40


def test_a_teacher_chosen_on_its_test_part_teaches_under_the_papers_protocol_alone(taught, digits, tmp_path):
    taught.teacher.network.trained_on["protocol_of_training"] = "paper"
    with pytest.raises(ValueError, match="epoch was chosen on its test part"):
        fit(taught, digits, SHORT, tmp_path, **ON_CPU)
    assert fit(taught, digits, PAPER, tmp_path, **ON_CPU).is_finished


def test_a_teacher_of_other_classes_is_refused(taught, digits, tmp_path):
    renamed = replace(digits, classes=[f"digit {c}" for c in range(10)])
    with pytest.raises(ValueError, match=r"trained on the classes 0, 1, .*, 9 and the data have digit 0, digit 1, .*train the"):
        fit(taught, renamed, SHORT, tmp_path, **ON_CPU)


# The recipe


def rates(task, data, recipe, path) -> list[float]:
    return fit(task, data, recipe, path, **ON_CPU).history.lr.tolist()


def test_a_constant_recipe_keeps_its_learning_rate(alone, digits, tmp_path):
    recipe = replace(HDKD_TEACHER, epochs=4, batch_size=120, augment="none")
    assert rates(alone(), digits, recipe, tmp_path) == [1e-3] * 4


def test_the_students_recipe_warms_up_from_its_warm_up_rate_and_falls_as_a_cosine(alone, digits, tmp_path):
    epochs, warmup = 8, 3
    recipe = replace(HDKD_STUDENT, epochs=epochs, warmup_epochs=warmup, batch_size=120, augment="none")
    low, high = 2e-5, 5e-5
    expected = [low + (high - low) * e / warmup for e in range(warmup)]
    expected += [low + (high - low) * (1 + math.cos(math.pi * e / epochs)) / 2 for e in range(warmup, epochs)]
    measured = rates(alone(), digits, recipe, tmp_path)
    assert measured[0] == low
    assert measured == pytest.approx(expected, rel=1e-9)


def test_weight_decay_spares_biases_and_one_dimensional_weights_but_not_tokens(alone, digits, tmp_path, monkeypatch):
    made = []
    create = training.create_optimizer_v2
    monkeypatch.setattr(training, "create_optimizer_v2", lambda *a, **k: made.append(create(*a, **k)) or made[0])
    task = alone()
    fit(task, digits, replace(SHORT, epochs=1, optimizer="adamw", weight_decay=0.05), tmp_path, **ON_CPU)
    decay = {id(p): group["weight_decay"] for group in made[0].param_groups for p in group["params"]}
    for name, parameter in task.student.named_parameters():
        if parameter.requires_grad:
            assert decay[id(parameter)] == (0.05 if parameter.ndim > 1 else 0), name
        else:
            assert id(parameter) not in decay
    assert decay[id(task.student.cls_token)] == decay[id(task.student.pos_embed)] == 0.05


@pytest.fixture
def uneven(digits):
    """The first 40 training images of class 0, and three of each other class."""
    labels = digits.train.labels
    kept = [i for c in range(10) for i in (labels == c).nonzero().flatten().tolist()[: 40 if c == 0 else 3]]
    train = Part(digits.train.images[kept], labels[kept], [digits.train.ids[i] for i in kept], digits.train.groups[kept])
    return replace(digits, train=train)


def watched(task) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What the task is called on while it trains: (images, target), filled as it goes on."""
    forward, seen = task.forward, []

    def watch(images, target):
        seen.append((images.clone(), target.clone()))
        return forward(images, target)

    task.forward = watch
    return seen


def labels_in(seen) -> torch.Tensor:
    return torch.cat([target for _, target in seen])


@pytest.mark.parametrize("imbalance", IMBALANCE)
def test_each_treatment_of_imbalance_trains_as_it_says(imbalance, alone, uneven, tmp_path):
    task, labels = alone(), uneven.train.labels
    seen = watched(task)
    run = fit(task, uneven, replace(SHORT, epochs=1, batch_size=16, imbalance=imbalance), tmp_path, **ON_CPU)
    assert run.config["recipe"]["imbalance"] == imbalance
    assert run.history[["train_loss", "train_accuracy"]].notna().all(axis=None)
    counts = labels_in(seen).bincount(minlength=10)
    if imbalance == "smote":
        assert counts.tolist() == [labels.bincount().max()] * 10
    elif imbalance == "balanced_sampler":
        assert counts.sum() == len(labels)
        assert counts[0] < 0.5 * labels.bincount()[0]
    else:
        assert counts.tolist() == labels.bincount().tolist()
    expected = class_weights(labels, 10) if imbalance == "class_weights" else None
    assert (task.class_weights is None) == (expected is None)
    assert expected is None or torch.equal(task.class_weights, expected)
    assert run.metrics["images"]["train"] == len(labels)
    assert len(pd.read_csv(run.path / "split.csv")) == len(labels) + 120, "images, not synthetic ones"


def test_class_weights_change_the_loss_that_is_trained_and_not_the_validations(alone, uneven, tmp_path):
    recipe = replace(SHORT, epochs=1, batch_size=len(uneven.train), lr=1e-12)
    plain, weighted = (
        fit(alone(), uneven, replace(recipe, imbalance=imbalance), tmp_path / imbalance, **ON_CPU).history.iloc[0]
        for imbalance in ("none", "class_weights")
    )
    assert weighted.val_nll == pytest.approx(plain.val_nll, abs=1e-6)
    assert abs(weighted.train_loss - plain.train_loss) > 1e-3
    assert weighted.train_accuracy == plain.train_accuracy


def test_deits_recipe_mixes_smooths_and_repeats(alone, digits, tmp_path):
    task = alone()
    seen = watched(task)
    run = fit(task, digits, replace(MIXED, epochs=2), tmp_path, **ON_CPU)
    history = run.history
    assert history.filter(regex="loss|accuracy|nll").notna().all(axis=None)
    assert history.train_accuracy.between(0, 1).all()
    targets = torch.cat([target for _, target in seen])
    assert targets.shape == (240, 10)
    assert_close(targets.sum(1), torch.ones(240))
    assert_close(targets.amin(1), torch.full((240,), 0.01))  # 0.1 over ten classes
    mixed = (targets > 0.0101).sum(1)
    assert set(mixed.tolist()) == {1, 2}
    assert task.label_smoothing == 0.1
    assert [len(images) for images, _ in seen] == ([16] * 7 + [8]) * 2


@pytest.mark.parametrize(("name", "repeats"), [("mixup", 1), ("cutmix", 1), ("mixup", 3)])
def test_mixup_and_cutmix_mix_an_images_labels_as_they_mix_its_pixels(name, repeats, alone, digits, tmp_path):
    colours = (torch.arange(10, dtype=torch.uint8) * 25)[digits.train.labels].view(-1, 1, 1, 1).expand(-1, 3, 16, 16)
    data, task = replace(digits, train=replace(digits.train, images=colours.contiguous())), alone()
    seen = watched(task)
    fit(task, data, replace(SHORT, epochs=1, batch_size=16, aug_repeats=repeats, **{name: 1.0}), tmp_path, **ON_CPU)
    assert {len(images) for images, _ in seen} == {16, 8}
    cfg = task.student.pretrained_cfg
    mean, std = (torch.tensor(cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    for images, target in seen:
        levels = (images * std + mean).mean((1, 2, 3)) * 255
        assert_close(levels, (target * torch.arange(10) * 25).sum(1), atol=0.01, rtol=0)
    of_two = torch.cat([(target > 0).sum(1) for _, target in seen])
    assert (of_two == 2).any()


def test_a_third_of_the_images_comes_three_times_in_an_epoch(alone, digits, tmp_path):
    task = alone()
    seen = watched(task)
    fit(task, digits, replace(SHORT, epochs=1, aug_repeats=3), tmp_path, **ON_CPU)
    counts = Counter(image.numpy().tobytes() for images, _ in seen for image in images)
    assert sorted(counts.values()) == [3] * 40


def test_training_accuracy_counts_each_images_own_label(alone, digits, tmp_path):
    class Knowing(Supervised):
        def forward(self, images, target):
            loss = super().forward(images, target)["loss"]
            return {"loss": loss, "output": torch.eye(10)[target]}

    run = fit(Knowing(student=alone().student), digits, replace(SHORT, epochs=1), tmp_path, **ON_CPU)
    assert run.history.train_accuracy[0] == 1


def test_training_accuracy_counts_the_label_from_before_mixup(alone, digits, tmp_path):
    class Zero(Supervised):
        def forward(self, images, target):
            loss = super().forward(images, target)["loss"]
            return {"loss": loss, "output": torch.eye(10)[[0] * len(images)]}

    run = fit(Zero(student=alone().student), digits, replace(SHORT, epochs=1, mixup=0.8), tmp_path, **ON_CPU)
    assert run.history.train_accuracy[0] == pytest.approx((digits.train.labels == 0).float().mean().item())


def test_an_odd_batch_loses_an_image_to_mixup_and_its_losses_are_averaged_over_the_rest(alone, digits, tmp_path):
    task = alone()
    seen = watched(task)
    fit(task, digits, replace(SHORT, epochs=1, batch_size=7, mixup=0.8), tmp_path, **ON_CPU)
    assert [len(images) for images, _ in seen] == [6] * 17


def test_image_files_are_cropped_once_and_decoded_images_by_the_augmentation(alone, digits, tmp_path, monkeypatch):
    for i, image in enumerate(digits.train.images[:].permute(0, 2, 3, 1).numpy()):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    files = replace(digits.train, images=Files([tmp_path / f"{i}.png" for i in range(120)], 16))
    made, asked = [], []

    class Cropping(Augmentation):
        crop = True

        def __init__(self):
            made.append(self)

    take = training.batches
    monkeypatch.setitem(training.AUGMENTATIONS, "none", Cropping)

    def spy(part, size, **given):
        asked.append(given.get("crop"))
        return take(part, size, workers=0, **given)

    monkeypatch.setattr(training, "batches", spy)
    for name, data in (("files", replace(digits, train=files)), ("decoded", digits)):
        run = fit(alone(), data, replace(SHORT, epochs=1), tmp_path / name, **ON_CPU)
        assert run.history.train_loss.notna().all()
    assert asked[0] is True
    assert [augment.crop for augment in made] == [False, True]
    assert Cropping.crop, "the class is not changed"


def test_bf16_trains(make_task, digits, recipe, tmp_path):
    run = fit(make_task(), digits, replace(recipe, epochs=1), tmp_path, device="cpu", precision="bf16", force=True)
    assert run.config["precision"] == "bf16"
    assert run.history.filter(like="loss").notna().all(axis=None)
    assert run.metrics["best"]["test"]["nll"] > 0
    assert {value.dtype for value in load_file(run.path / "last.safetensors").values()} == {torch.float32, torch.int64}


# Failures are sentences


def test_a_loss_that_is_no_number_names_epoch_and_remedy_and_keeps_the_checkpoint(alone, digits, tmp_path):
    task = alone()
    forward = task.forward
    task.forward = lambda *batch: {k: v * (math.nan if task.progress else 1) for k, v in forward(*batch).items()}
    with pytest.raises(
        FloatingPointError, match=r"Supervised became nan in epoch 1; lower lr \(now 0\.001\).*1 epochs are kept"
    ):
        fit(task, digits, SHORT, tmp_path, **ON_CPU)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert len(state["history"]) == 1
    assert all(value.isfinite().all() for value in state["state_dict"].values())
    assert len(fit(alone(), digits, SHORT, tmp_path, **ON_CPU).history) == 2


def test_a_full_disk_is_said_and_the_checkpoint_before_stays_readable(alone, digits, tmp_path, monkeypatch):
    save, calls = torch.save, []

    def full(state, path):
        calls.append(path)
        save(state, path)
        if len(calls) == 2:
            path.write_bytes(path.read_bytes()[:1000])
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(training.torch, "save", full)
    with pytest.raises(OSError, match=r"cannot write .*checkpoint\.pt: .*No space left on device; free some space"):
        fit(alone(), digits, SHORT, tmp_path, **ON_CPU)
    assert len(torch.load(tmp_path / "checkpoint.pt", weights_only=True)["history"]) == 1
    assert not list(tmp_path.glob(".checkpoint*"))
    assert len(fit(alone(), digits, SHORT, tmp_path, **ON_CPU).history) == 2


def test_a_student_for_other_classes_is_refused_before_anything_is_written(alone, digits, tmp_path):
    with pytest.raises(ValueError, match="the network has 7 classes and digits has 10; create it with num_classes=10"):
        fit(alone(num_classes=7), digits, SHORT, tmp_path / "run", **ON_CPU)
    assert not (tmp_path / "run").exists()


def test_an_unknown_precision_is_refused(alone, digits, tmp_path):
    with pytest.raises(ValueError, match=r"precision must be 'auto', 'float32' or 'bf16' \(got 'fp16'\)"):
        fit(alone(), digits, SHORT, tmp_path / "run", device="cpu", precision="fp16")
    assert not (tmp_path / "run").exists()


def test_a_device_that_is_not_here_is_refused_before_anything_is_written(alone, digits, tmp_path):
    with pytest.raises(ValueError, match=r"device must be 'auto', 'cpu', 'cuda', 'cuda:N' or 'mps' \(got 'gpu'\)"):
        fit(alone(), digits, SHORT, tmp_path / "run", device="gpu")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("cache", ["yes", None])
def test_an_unknown_cache_on_the_device_is_refused(cache, alone, digits, tmp_path):
    with pytest.raises(ValueError, match="cache_on_device must be 'auto', True or False"):
        fit(alone(), digits, SHORT, tmp_path, **ON_CPU, cache_on_device=cache)


@pytest.mark.slow
def test_two_processes_train_as_one(digits, build, tmp_path):
    """Without batch norm and augmentation; 120 images are four batches of 30, 15 in each process."""
    vit = {
        "name": "deit_tiny_distilled_patch16_224",
        "img_size": 16,
        "patch_size": 4,
        "embed_dim": 32,
        "depth": 1,
        "num_heads": 2,
    }
    plan = replace(SHORT, batch_size=30, augment="none")

    def trained(processes: int):
        task = CSKD(student=build(**vit, num_classes=10), teacher=build("hdkd_teacher_nano", seed=7))
        run = fit(task, digits, plan, tmp_path / str(processes), **ON_CPU, num_processes=processes)
        assert_close(task.student.state_dict(), run.student().state_dict())
        return run

    one, two = trained(1), trained(2)
    assert two.environment["processes"] == 2
    terms = [column for column in one.history if column.startswith("train_")]
    assert_close(torch.tensor(one.history[terms].values), torch.tensor(two.history[terms].values), rtol=1e-4, atol=1e-5)
    for name, value in one.student("last").state_dict().items():
        if "qkv.bias" not in name:  # the keys' bias has no gradient but rounding noise
            assert_close(value, two.student("last").state_dict()[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arm", "own_term"), [("deit", "distillation_loss"), ("cskd", "spatial_loss"), ("dearkd", "hidden_loss")]
)
def test_the_imagenet_plan_starts_on_files_in_several_processes(arm, own_term, build, tmp_path):
    """Two steps of its methods, recipe and students, of four blocks, on generated images, with a smaller teacher."""
    random = np.random.default_rng(0)
    for part, count in (("train", 10), ("test", 1)):
        for name in "abc":
            (tmp_path / "images" / part / name).mkdir(parents=True)
            for i in range(count):
                image = Image.fromarray(random.integers(0, 256, (80, 60, 3), np.uint8))
                image.save(tmp_path / "images" / part / name / f"{part}{i}.jpg")
    [job] = [job for job in study.expand("imagenet")["jobs"].values() if job.get("arm") == arm]
    chosen = study._defaults(job["notebook"]) | job["parameters"]
    where = {"image_size": chosen["image_size"], "protocol": chosen["protocol"], "from_files": True}
    images = hdkd_data.load("folder", tmp_path / "images", **where)
    recipe = recipes.get(**chosen["recipe"] | {"epochs": 1, "batch_size": len(images.train) // 2 // 4 * 4})
    own = {key: chosen[key] for key in ("method", "options")} | {"network_options": chosen["network_options"] | {"depth": 4}}
    built = experiment.build(images, chosen["network"], recipe, teacher=build("resnet10t", num_classes=3), **own)
    run = built.run(tmp_path / "run", **ON_CPU, num_processes=2)
    assert (run.config["recipe"]["aug_repeats"], run.config["recipe"]["mixup"]) == (3, 0.8)
    assert {"train_class_loss", "train_distillation_loss", f"train_{own_term}"} <= set(run.history)
    assert run.environment["processes"] == 2


@pytest.mark.slow
def test_an_error_in_a_process_is_said_in_one_sentence(digits, alone, tmp_path):
    with pytest.raises(RuntimeError, match=r"FloatingPointError: the loss of Supervised became nan in epoch 0; lower lr"):
        fit(alone(), digits, replace(SHORT, lr=1e30), tmp_path, **ON_CPU, num_processes=2)


def test_no_processes_are_refused_before_anything_is_written(alone, digits, tmp_path):
    with pytest.raises(ValueError, match=r"num_processes must be at least 1.*got 0"):
        fit(alone(), digits, SHORT, tmp_path / "run", **ON_CPU, num_processes=0)
    assert not (tmp_path / "run").exists()


def test_more_processes_than_gpus_are_refused(alone, digits, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(ValueError, match=r"on GPUs at most their number \(got 2, 1 of mps\)"):
        fit(alone(), digits, SHORT, tmp_path / "run", device="mps", precision="float32", num_processes=2)


@pytest.mark.parametrize("name", ["adamw", "sgd", "lamb", "lion", "radam"])
def test_optimisers_of_timm_train_whether_torch_can_fuse_them_or_not(name, alone, recipe):
    optimizer, _ = training.make_optimizer(task := alone(), replace(recipe, optimizer=name))
    before = [p.clone() for p in task.student.parameters()]
    task(torch.zeros(2, 3, 16, 16), torch.tensor([0, 1]))["loss"].backward()
    optimizer.step()
    assert any((p != old).any() for p, old in zip(task.student.parameters(), before, strict=True))


def test_with_layer_decay_the_body_learns_more_slowly_than_the_head(build, digits, recipe, tmp_path):
    """In timm's groups of layers the rate falls by the factor from each to the one before it."""
    recipe = replace(recipe, epochs=1, layer_decay=0.5, schedule="constant", weight_decay=0.0, optimizer="sgd")
    moved = {}
    for decay in (0.5, 1.0):
        task = Supervised(student=build("resnet10t"))
        before = {name: value.clone() for name, value in task.student.named_parameters()}
        run = fit(task, digits, replace(recipe, layer_decay=decay), tmp_path / str(decay), device="cpu", precision="float32")
        trained = run.student("last")
        moved[decay] = {n: (p - before[n]).norm().item() for n, p in trained.named_parameters()}
        assert run.history.lr.tolist() == [recipe.lr], "of the head"
    optimizer, _ = training.make_optimizer(Supervised(student=build("resnet10t")), recipe)
    scales = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    assert sorted(set(scales.values()), reverse=True)[:3] == [1.0, 0.5, 0.25]
    assert moved[0.5]["conv1.0.weight"] < 0.5 * moved[1.0]["conv1.0.weight"]


# A moving average of the weights


def test_the_moving_average_is_kept_and_measured_as_a_third_set_of_weights(alone, digits, tmp_path):
    recipe, task = replace(SHORT, ema=0.75), alone()
    expected = {name: value.clone() for name, value in task.student.state_dict().items() if value.is_floating_point()}
    update = task.update_ema

    def watch() -> None:
        for name, value in expected.items():
            value.lerp_(task.student.state_dict()[name], 0.25)
        update()

    task.update_ema = watch
    run = fit(task, digits, recipe, tmp_path, **ON_CPU)
    averaged = load_file(run.path / "ema.safetensors")
    assert_close({name: averaged[name] for name in expected}, expected)
    assert run.metrics["ema"]["epoch"] == recipe.epochs - 1
    assert run.metrics["ema"]["test"]["nll"] != run.metrics["last"]["test"]["nll"]
    labels = metrics.classification(torch.from_numpy(run.predictions("ema").probabilities), digits.test.labels)
    assert labels["accuracy"] == pytest.approx(run.metrics["ema"]["test"]["accuracy"])
    assert_close(run.student("ema").state_dict(), averaged)


def test_without_a_moving_average_there_is_none(finished_run):
    assert not (finished_run.path / "ema.safetensors").exists()
    assert finished_run.metrics.keys() >= {"last", "best"}
    assert "ema" not in finished_run.metrics


# Memory


@pytest.mark.parametrize(("most", "said"), [(16, "batch_size=15 fits"), (1, "not even two do: take smaller images or")])
def test_a_batch_that_does_not_fit_is_said_with_one_that_does(most, said, alone, digits, tmp_path):
    task = alone()
    forward = task.forward

    def limited(images, target):
        if len(images) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(images, target)

    task.forward = limited
    with pytest.raises(MemoryError, match=f"^60 images at a time do not fit the memory of cpu; {said}"):
        fit(task, digits, SHORT, tmp_path, **ON_CPU)
