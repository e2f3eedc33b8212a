"""The run folder: atomic, identified by its configuration, and enough to go on from."""

import errno
import hashlib
import json
import shutil

import filelock
import pandas as pd
import pytest
import torch
from safetensors import SafetensorError

from hdkd_lib import evaluation, methods, metrics, packing, runs
from hdkd_lib.methods import Supervised
from hdkd_lib.runs import Run

CONFIG = {"method": {"name": "Supervised"}, "data": {"dataset": "digits"}, "seed": 0}


@pytest.fixture
def copied(finished_run, tmp_path):
    """`copied(name, **changes to config.json)`: a copy of the finished run in a folder of runs."""

    def copied(name: str, **changes):
        shutil.copytree(finished_run.path, tmp_path / "runs" / name)
        config = finished_run.config | changes
        (tmp_path / "runs" / name / "config.json").write_text(json.dumps(config))

    return copied


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left"), RuntimeError("write failed"), SafetensorError("I/O error")]
)
def test_a_write_that_fails_leaves_the_old_content_and_nothing_else(error, tmp_path):
    path = tmp_path / "file"
    runs.write_atomically(path, lambda aside: aside.write_text("old"))

    def write(aside):
        aside.write_text("half of the n")
        raise error

    with pytest.raises(OSError, match=r"cannot write .*file: .*free some space and start again"):
        runs.write_atomically(path, write)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_readers_never_see_a_file_before_it_is_whole(tmp_path):
    path = tmp_path / "file"
    runs.write_atomically(path, lambda aside: (aside.write_text("half"), path.exists() and pytest.fail("seen too early")))
    assert path.read_text() == "half"


def test_the_hash_is_of_the_content_and_not_of_the_order_of_keys():
    assert runs.config_hash({"a": 1, "b": [2]}) == runs.config_hash({"b": [2], "a": 1})
    assert runs.config_hash({"a": 1, "b": [2]}) != runs.config_hash({"a": 1, "b": [3]})


def test_a_run_without_a_folder_is_named_after_its_configuration_under_results():
    run = Run.create(None, CONFIG)
    assert run.path == runs.results_dir() / "runs" / "interactive" / f"digits-Supervised-seed0-{runs.config_hash(CONFIG)}"
    assert Run.create("", CONFIG).path == run.path


def test_changing_a_configuration_back_and_forth_loses_no_run(tmp_path):
    for turn in range(4):
        run = Run.create(tmp_path / "run", CONFIG | {"seed": turn % 2})
        (run.path / "turn").write_text(str(turn))
    assert sorted((path / "turn").read_text() for path in tmp_path.iterdir()) == ["0", "1", "2", "3"]
    assert run.config["seed"] == 1


def test_a_folder_is_written_by_one_process_at_a_time(tmp_path):
    run = Run.create(tmp_path / "run", CONFIG)
    with runs.lock(run.path), pytest.raises(filelock.Timeout), runs.lock(run.path, wait=False):
        pass
    with runs.lock(run.path, wait=False):
        pass


def test_what_is_no_run_or_not_finished_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no run folder: it has no config\.json"):
        Run(tmp_path)
    run = Run.create(tmp_path, CONFIG)
    assert not run.is_finished
    with pytest.raises(FileNotFoundError, match="is not finished: start it again, it goes on"):
        _ = run.metrics
    with pytest.raises(FileNotFoundError, match=r"no finished run in .*; run a plan first"):
        runs.load(tmp_path)


READ = {
    "best.safetensors": lambda run: run.student("best"),
    "predictions_last.csv": lambda run: run.predictions("last"),
    "history.csv": lambda run: run.history,
    "split.csv": lambda run: run.split,
    "config.json": lambda run: run.config,
}


@pytest.mark.parametrize("name", READ)
def test_a_damaged_file_is_not_read_but_said(name, finished_run, tmp_path):
    shutil.copytree(finished_run.path, tmp_path / "run")
    READ[name](Run(tmp_path / "run"))
    file = tmp_path / "run" / name
    content = bytearray(file.read_bytes())
    if name == "config.json":
        content = content[:-9]
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name} is damaged.*; start the run again, which makes it anew"):
        READ[name](Run(tmp_path / "run"))


@pytest.mark.parametrize("content", ["", '{"last": {"epo', "[1]", "\xff"])
def test_a_run_with_broken_metrics_is_not_finished(content, copied, tmp_path):
    copied("hdkd-seed0")
    copied("hdkd-seed1", seed=1)
    (tmp_path / "runs" / "hdkd-seed1" / "metrics.json").write_bytes(content.encode("latin-1"))
    broken = Run(tmp_path / "runs" / "hdkd-seed1")
    assert not broken.is_finished
    with pytest.raises(FileNotFoundError, match="is not finished: start it again"):
        _ = broken.metrics
    assert runs.load(tmp_path / "runs").seed.tolist() == [0]
    assert runs.remeasure(tmp_path / "runs") == 1
    (tmp_path / "runs" / "plan.json").write_bytes(content.encode("latin-1"))
    assert runs.plan(tmp_path / "runs") == {}


def test_metrics_that_were_measured_again_are_whole(finished_run, tmp_path, capsys):
    shutil.copytree(finished_run.path, tmp_path / "runs" / "run")
    runs.remeasure(tmp_path / "runs")
    runs.mend(tmp_path / "runs" / "run")
    assert capsys.readouterr().out == ""
    assert Run(tmp_path / "runs" / "run").is_finished


def test_weights_that_nobody_needs_are_not_looked_at_and_may_be_removed(finished_run, tmp_path, capsys):
    shutil.copytree(finished_run.path, tmp_path / "run")
    (tmp_path / "run" / "best.safetensors").unlink()
    (tmp_path / "run" / "last.safetensors").write_bytes(b"damaged")
    runs.mend(tmp_path / "run", weights=False)
    assert capsys.readouterr().out == ""
    assert Run(tmp_path / "run").is_finished
    runs.mend(tmp_path / "run")
    assert capsys.readouterr().out.endswith("last.safetensors~damaged and will be made anew\n")
    assert not Run(tmp_path / "run").is_finished


@pytest.mark.parametrize("which", ["best", "last"])
def test_the_trained_student_comes_back_from_its_folder(which, finished_run, digits):
    student = Run(finished_run.path).student(which)
    assert not student.training
    probabilities = evaluation.predict(Supervised(student=student), digits.test)
    measured, expected = metrics.classification(probabilities, digits.test.labels), finished_run.metrics[which]["test"]
    assert measured.pop("confusion") == expected.pop("confusion")
    assert measured == pytest.approx(expected, abs=1e-5)
    if which == "best":
        kept = finished_run.predictions("best")
        assert kept.ids.tolist() == digits.test.ids
        assert kept.labels.tolist() == digits.test.labels.tolist()
        assert (torch.tensor(kept.probabilities) - probabilities).abs().max() < 2e-6


def test_a_run_remembers_where_it_ran(finished_run):
    environment = finished_run.environment
    assert environment["torch"] == torch.__version__.split("+")[0] or environment["torch"] == torch.__version__
    assert environment["threads"] == torch.get_num_threads()
    assert "earlier_commits" not in environment
    later = runs.environment(torch.device("cpu"), {"commit": "a", "earlier_commits": ["b"], "uncommitted_changes": True})
    assert (later["earlier_commits"], later["uncommitted_changes"]) == (["a", "b"], True)
    assert "earlier_commits" not in runs.environment(torch.device("cpu"), environment | {"commit": later["commit"]})
    assert environment["device"]


def test_load_gives_a_row_per_finished_run_with_networks_trained_alone_first(finished_run, copied, tmp_path):
    copied("hdkd-seed1", seed=1)
    copied("hdkd-seed0")
    copied("hdkd-seed0~0123456789ab")  # set aside
    copied("hdkd-seed2", seed=2)
    (tmp_path / "runs" / "hdkd-seed2" / "metrics.json").unlink()  # not finished
    copied("student-seed0", method=finished_run.config["method"] | {"name": "Supervised"})
    table = runs.load(tmp_path / "runs")
    assert table[["run", "method", "seed"]].to_numpy().tolist() == [
        ["student", "Supervised", 0],
        ["hdkd", "HDKD", 0],
        ["hdkd", "HDKD", 1],
    ]
    row, measured = table.iloc[1], finished_run.metrics
    for key in ("accuracy", "balanced_accuracy", "macro_f1", "macro_auroc", "ece", "nll"):
        assert row[key] == measured["best"]["test"][key]
        assert row[f"last_{key}"] == measured["last"]["test"][key]
    expected = {
        "student": "hdkd_student_distilled_nano",
        "dataset": "digits",
        "image_size": 16,
        "protocol": "grouped",
        "fold": 0,
    }
    expected |= {"selection": "validation"}
    expected |= {"epochs": 3, "epoch": measured["best"]["epoch"], "parameters": measured["parameters"], "precision": "float32"}
    assert {key: row[key] for key in expected} == expected
    assert Run(row.path).config == finished_run.config


def test_load_says_which_part_chose_the_epoch(finished_run, copied, tmp_path):
    recipe = finished_run.config["recipe"]
    copied("honest-seed0")
    copied("paper-seed0", recipe=recipe | {"protocol": "paper"})
    copied("unsaid-seed0", recipe={key: value for key, value in recipe.items() if key != "protocol"})  # before there was one
    table = runs.load(tmp_path).set_index("run")
    assert table.selection.to_dict() == {"honest": "validation", "paper": "test", "unsaid": "validation"}


def test_a_student_remembers_the_images_it_has_seen(finished_run, digits):
    origin = finished_run.student().trained_on
    assert origin.pop("ids") == {*digits.train.ids, *digits.val.ids}
    assert origin == digits.config | {"protocol_of_training": "honest"}


def test_load_searches_two_levels_deep(finished_run, copied, tmp_path):
    copied("hdkd-seed0")
    for folder in (tmp_path, tmp_path / "runs", tmp_path / "runs" / "hdkd-seed0"):
        assert len(runs.load(folder)) == 1
    pd.testing.assert_frame_equal(runs.load(tmp_path), runs.load(tmp_path / "runs"))


def test_names_of_older_runs_are_read_as_todays(tmp_path):
    method = {"name": "DearKD", "kind": "hard", "stage1_fraction": 0.5, "student": {"name": "kind"}}
    old = {"method": method, "recipe": {"repeats": 3}, "data": {"dataset": "digits"}, "seed": 0}
    (tmp_path / "config.json").write_text(json.dumps(old))
    config = Run(tmp_path).config
    assert config["method"] == {"name": "DearKD", "distill_type": "hard", "distill_until": 0.5, "student": {"name": "kind"}}
    assert config["recipe"] == {"aug_repeats": 3, "layer_decay": 1.0, "ema": 0.0}
    assert Run.create(tmp_path, config).path == tmp_path, "it is the same run: nothing was set aside"
    assert json.loads((tmp_path / "config.json").read_text()) == old


@pytest.mark.parametrize(
    ("gone", "kept"),
    [
        ({"stage_exponent": 1.0, "projection": False}, {}),
        ({"stage_exponent": 1, "projection": False}, {}),
        ({"stage_exponent": 2.0, "projection": True}, {"stage_exponent": 2.0, "projection": True}),
        ({"stage_exponent": 0.0, "projection": False}, {"stage_exponent": 0.0}),
    ],
)
def test_options_that_are_no_more_are_dropped_where_they_had_the_only_value_that_is_left(gone, kept, tmp_path):
    own = {"name": "HDKD", "alpha": 0.5, "student": {"name": "hdkd_student_nano"}, "teacher": {"name": "hdkd_teacher_nano"}}
    old = CONFIG | {"method": own | gone}
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert Run(tmp_path).config == runs.read_config(tmp_path / "config.json") == CONFIG | {"method": own | kept}
    assert Run.create(tmp_path, CONFIG | {"method": own | kept}).path == tmp_path
    assert not tmp_path.with_name(f"{tmp_path.name}~{runs.config_hash(CONFIG | {'method': own | kept})}").exists()
    assert json.loads((tmp_path / "config.json").read_text()) == old, "the same run: nothing was set aside or written anew"


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ({"name": "Supervised", "student": {}}, {"name": "Supervised", "student": {}, "probe": False}),
        ({"name": "Supervised", "probe": True}, {"name": "Supervised", "probe": True}),
        ({"name": "DeiT", "student": {}}, {"name": "DeiT", "student": {}, "standardise_logits": False}),
        ({"name": "HDKD", "student": {}}, {"name": "HDKD", "student": {}}),
    ],
)
def test_an_older_run_has_the_values_of_before_a_later_option(method, expected, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"method": method}))
    assert Run(tmp_path).config == runs.read_config(tmp_path / "config.json") == CONFIG | {"method": expected}


def test_configurations_of_today_are_read_as_they_are_written(finished_run):
    written = json.loads((finished_run.path / "config.json").read_text())
    assert runs.read_config(finished_run.path / "config.json") == written
    assert not runs.GONE.keys() & written["method"].keys()
    for name, added in runs.NEW.items():
        assert added.keys() <= set(methods.find(name).options())


def test_arm_and_replicate_are_those_of_job_json_where_there_is_one(copied, tmp_path):
    copied("hdkd-seed0")
    copied("hdkd-seed0-long-seed1")
    job = {"plan": "p", "arm": "long-seed0", "replicate": {"seed": 1}}
    (tmp_path / "runs" / "hdkd-seed0-long-seed1" / "job.json").write_text(json.dumps(job))
    table = runs.load(tmp_path / "runs")
    assert sorted(table.arm) == ["hdkd", "long-seed0"]
    assert Run(tmp_path / "runs" / "hdkd-seed0-long-seed1").job == job


def test_replicates_are_those_of_the_plan_and_else_seed_fold_and_fraction(finished_run, copied, tmp_path):
    copied("a-seed0", seed=1000)
    job = {"plan": "p", "arm": "a", "replicate": {"draw": 3, "seed": 0}}
    (tmp_path / "runs" / "a-seed0" / "job.json").write_text(json.dumps(job))
    copied("b-seed0")
    copied("c-seed0", data=finished_run.config["data"] | {"fraction": 0.1})
    table = runs.load(tmp_path / "runs").set_index("arm")
    assert table.replicate.to_dict() == {"a": "draw 3, seed 0", "b": "seed 0, fold 0", "c": "seed 0, fold 0, fraction 0.1"}


def test_the_plan_of_runs_is_read_from_beside_them(copied, tmp_path):
    copied("hdkd-seed0")
    assert runs.plan(tmp_path / "runs") == {}
    (tmp_path / "runs" / "plan.json").write_text(json.dumps({"name": "p", "questions_changed_after": 3}))
    assert runs.plan(tmp_path / "runs")["questions_changed_after"] == 3


def test_predictions_that_were_not_kept_are_missed_by_name(copied, tmp_path):
    copied("hdkd-seed0")
    (tmp_path / "runs" / "hdkd-seed0" / "predictions_last.csv").unlink()
    with pytest.raises(FileNotFoundError, match="hdkd-seed0 holds no predictions of its last epoch"):
        Run(tmp_path / "runs" / "hdkd-seed0").predictions("last")


def test_a_published_plan_is_what_its_manifest_says(copied, tmp_path):
    copied("hdkd-seed0")
    folder = tmp_path / "published"
    packing.pack({"hdkd-seed0": tmp_path / "runs" / "hdkd-seed0"}, folder)
    files = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}
    (folder / "manifest.json").write_text(json.dumps({"plan": "published", "files": files}))
    assert len(runs.load(folder)) == len(runs.load(tmp_path / "runs")) == 1
    (folder / "history.csv.xz").write_bytes(b"another")
    with pytest.raises(ValueError, match=r"history.csv.xz is not the file that was published; restore .* make publish PLAN"):
        runs.load(folder)
    (folder / "history.csv.xz").unlink()
    with pytest.raises(ValueError, match=r"history.csv.xz is missing; restore"):
        runs.load(folder)
    (folder / "runs.json.xz").unlink()
    with pytest.raises(ValueError, match=r"published in an older form; publish it anew: make publish PLAN=published"):
        runs.load(folder)


def test_a_published_run_has_no_weights_and_says_so(copied, tmp_path):
    copied("hdkd-seed0")
    packing.pack({"hdkd-seed0": tmp_path / "runs" / "hdkd-seed0"}, tmp_path / "packed")
    with pytest.raises(FileNotFoundError, match="published without weights; train it: make study PLAN=packed"):
        Run(tmp_path / "packed" / "hdkd-seed0").student()


def test_a_run_under_results_is_shown_and_found_by_its_path_from_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HDKD_RESULTS", str(tmp_path / "results"))
    run = Run.create(None, CONFIG)
    assert run.shown_path.startswith("results/runs/interactive/digits-Supervised-seed0-")
    monkeypatch.chdir(tmp_path.parent)
    assert Run(run.shown_path).path.samefile(run.path)
    elsewhere = Run.create(tmp_path / "elsewhere", CONFIG)
    assert elsewhere.shown_path == str(tmp_path / "elsewhere")
