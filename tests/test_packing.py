"""Finished runs in four files, and back."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest

from hdkd_lib import packing, runs
from hdkd_lib.metrics import weighted
from hdkd_lib.runs import Run


@pytest.fixture
def folders(finished_run, tmp_path):
    """`folders(*names)`: copies of a finished run, each with a job.json and metrics of its own."""

    def folders(*names):
        for i, name in enumerate(names):
            path = tmp_path / "runs" / name
            shutil.copytree(finished_run.path, path, dirs_exist_ok=True)
            job = {
                "plan": "p",
                "arm": name.split("-")[0],
                "replicate": {"seed": i},
                "notebook": "run",
                "parameters": {"seed": i},
            }
            (path / "job.json").write_text(json.dumps(job))
        return {name: tmp_path / "runs" / name for name in names}

    return folders


def test_what_was_packed_comes_back_without_weights_and_probabilities(folders, tmp_path):
    paths = folders("teacher-seed0", "hdkd-seed1")
    assert packing.pack(paths, tmp_path / "packed") == ["teacher-seed0", "hdkd-seed1"]
    assert sorted(f.name for f in (tmp_path / "packed").iterdir()) == [
        "history.csv.xz",
        "predictions.csv.xz",
        "runs.json.xz",
        "splits.csv.xz",
    ]
    for name, path in paths.items():
        own = Run(packing.unpack(tmp_path / "packed", name, tmp_path / "back" / name))
        original = Run(path)
        assert own.is_finished
        assert (own.config, own.metrics, own.job, own.environment) == (
            original.config,
            original.metrics,
            original.job,
            original.environment,
        )
        pd.testing.assert_frame_equal(own.history, original.history)
    frames = [runs.load(tmp_path / folder).drop(columns="path") for folder in ("runs", "back", "packed")]
    pd.testing.assert_frame_equal(frames[0], frames[1])
    pd.testing.assert_frame_equal(frames[0], frames[2])


def test_the_metrics_follow_from_the_packed_predictions(folders, tmp_path, digits):
    (path,) = folders("hdkd-seed0").values()
    packing.pack({"hdkd-seed0": path}, tmp_path / "packed")
    predictions = pd.read_csv(tmp_path / "packed" / "predictions.csv.xz", dtype={"id": str}).set_index("id")
    assert (
        predictions.label.map(lambda c: int(digits.classes[c])).to_dict()
        == pd.read_csv(path / "predictions.csv", dtype={"id": str}).set_index("id").label.to_dict()
    )
    for which in ("last", "best"):
        accuracy = (predictions[f"hdkd-seed0 {which} class"] == predictions.label).mean()
        assert accuracy == pytest.approx(Run(path).metrics[which]["test"]["accuracy"], abs=1e-6)
        original, packed = (Run(of).predictions(which) for of in (path, tmp_path / "packed" / "hdkd-seed0"))
        order = [packed.ids.tolist().index(i) for i in original.ids]
        assert (packed.predicted[order] == original.predicted).all()


def test_class_and_percent_are_kept_and_what_the_metric_needs(folders, tmp_path):
    (path,) = folders("hdkd-seed0").values()
    original = Run(path).predictions("last")
    packing.pack({"hdkd-seed0": path}, tmp_path / "accuracy")
    packing.pack({"hdkd-seed0": path}, tmp_path / "auroc", metric="macro_auroc")
    small, whole = (Run(tmp_path / name / "hdkd-seed0").predictions("last") for name in ("accuracy", "auroc"))
    order = [small.ids.tolist().index(i) for i in original.ids]
    for packed in (small, whole):
        assert (packed.labels[order] == original.labels).all()
        assert np.abs(packed.confidence[order] - original.confidence).max() <= 0.005 + 1e-6
        assert (packed.predicted[order] == original.predicted).all()
    assert small.probabilities is None
    odds = [np.log(p / (1 - p)) for p in (whole.probabilities[order], original.probabilities)]
    assert np.abs(odds[0] - odds[1]).max() <= 0.005 + 1e-3  # and what six significant digits leave of 1 - p
    table = pd.read_csv(tmp_path / "accuracy" / "predictions.csv.xz", dtype={"id": str}).drop(columns="id")
    assert all(pd.api.types.is_integer_dtype(kind) for kind in table.dtypes)


def test_macro_auroc_follows_from_what_is_packed_of_a_network_that_is_sure(folders, tmp_path):
    """Nearly all probabilities of a wrong class are below a thousandth; their order decides."""
    (path,) = folders("hdkd-seed0").values()
    table = pd.read_csv(path / "predictions_last.csv", dtype={"label": str})
    random, classes = np.random.default_rng(0), list(table.columns[2:])
    logits = random.normal(0, 4, (len(table), len(classes)))
    logits[np.arange(len(table)), table.label.map(classes.index)] += 3
    table[classes] = np.exp(3 * logits) / np.exp(3 * logits).sum(1, keepdims=True)
    assert (table[classes] < 1e-3).to_numpy().mean() > 0.7
    table.to_csv(path / "predictions_last.csv", index=False, float_format="%.6g")
    (path / "checksums.json").unlink()
    packing.pack({"hdkd-seed0": path}, tmp_path / "packed", metric="macro_auroc")
    own, packed = (weighted("macro_auroc", Run(of).predictions("last")) for of in (path, tmp_path / "packed" / "hdkd-seed0"))
    assert packed == pytest.approx(own, abs=5e-4)


def test_a_class_called_none_is_a_class(folders, tmp_path):
    (path,) = folders("hdkd-seed0").values()
    table, config = (
        pd.read_csv(path / "predictions_last.csv", dtype={"label": str}),
        json.loads((path / "config.json").read_text()),
    )
    config["data"]["classes"][0] = "None"
    (path / "config.json").write_text(json.dumps(config))
    table.rename(columns={"0": "None"}).replace({"label": {"0": "None"}}).to_csv(path / "predictions_last.csv", index=False)
    (path / "checksums.json").unlink()
    assert (Run(path).predictions("last").labels == table.label.astype(int)).all()


def test_the_split_is_one_row_per_image(folders, tmp_path, finished_run):
    packing.pack(folders("a-seed0", "b-seed0"), tmp_path / "packed")
    splits = pd.read_csv(tmp_path / "packed" / "splits.csv.xz", dtype=str)
    own = pd.read_csv(finished_run.path / "split.csv", dtype=str)
    assert splits.split.nunique() == 1
    assert set(zip(splits.id, splits.part, strict=True)) == set(zip(own.id, own.part, strict=True))
    assert len(splits) == len(own)


def test_runs_are_added_and_unpacked_ones_stay_as_they_are(folders, tmp_path):
    packed = tmp_path / "packed"
    packing.pack(folders("a-seed0"), packed)
    before = {f.name: f.read_bytes() for f in packed.iterdir()}
    assert packing.pack(folders("a-seed0"), packed) == []
    assert {f.name: f.read_bytes() for f in packed.iterdir()} == before
    elsewhere = {"a-seed0": packing.unpack(packed, "a-seed0", tmp_path / "elsewhere" / "a-seed0")} | folders("b-seed0")
    assert packing.pack(elsewhere, packed) == ["b-seed0"]
    assert runs.packed(packed).keys() == {"a-seed0", "b-seed0"}
    assert set(pd.read_csv(packed / "history.csv.xz").run) == {"a-seed0", "b-seed0"}
    assert pd.read_csv(packed / "predictions.csv.xz").shape == (60, 2 + 2 * 3)


def test_runs_that_left_the_plan_are_dropped(folders, tmp_path):
    packed = tmp_path / "packed"
    packing.pack(folders("a-seed0", "b-seed0"), packed)
    assert packing.pack({}, packed, keep=["b-seed0"]) == []
    assert runs.packed(packed).keys() == {"b-seed0"}
    assert set(pd.read_csv(packed / "history.csv.xz").run) == {"b-seed0"}
    assert pd.read_csv(packed / "predictions.csv.xz").shape == (60, 2 + 3)


def test_a_run_that_was_repeated_replaces_its_packed_form(folders, tmp_path):
    paths = folders("a-seed0")
    packing.pack(paths, tmp_path / "packed")
    file = paths["a-seed0"] / "metrics.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"seconds": -1.0}))
    assert packing.pack(paths, tmp_path / "packed") == ["a-seed0"]
    assert runs.packed(tmp_path / "packed")["a-seed0"]["metrics"]["seconds"] == -1.0
    assert pd.read_csv(tmp_path / "packed" / "history.csv.xz").shape[0] == len(Run(paths["a-seed0"]).history)
