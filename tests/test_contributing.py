"""CONTRIBUTING.md, followed: what its pages add works in runs, plans, estimates, tables and figures."""

import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import study
from hdkd_lib import data, estimate, figures, metrics, runs, tables
from hdkd_lib.experiment import build

PAGE = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
BLOCKS = {
    re.match(r"# (\S+)", block)[1]: block for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
}  # by the path in their first line


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The page's files in a package that is not the library's: "my_package"."""
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "my_package").mkdir()
    (folder / "my_package" / "dkd.py").write_text(BLOCKS["hdkd_lib/methods/dkd.py"])
    (folder / "my_package" / "scans.py").write_text(BLOCKS["my_package/scans.py"])
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


def test_the_test_of_the_page_passes(package):
    namespace = {}
    exec(BLOCKS["tests/methods/test_dkd.py"].replace("hdkd_lib.methods.dkd", "my_package.dkd"), namespace)
    for seed in range(5):
        namespace["torch"].manual_seed(seed)
        namespace["test_the_parts_add_up_to_the_divergence"]()


def test_a_method_from_elsewhere_runs_and_stands_in_tables_and_figures(package, digits, recipe, tmp_path):
    recipe, place = replace(recipe, epochs=1), {"device": "cpu", "precision": "float32", "force": True}
    teacher = build(digits, "hdkd_teacher_nano", recipe).run(tmp_path / "teacher-seed0", **place)
    build(digits, "hdkd_student_nano", recipe).run(tmp_path / "student-seed0", **place)
    options = {"method": "my_package.dkd:DKD", "options": {"beta": 4.0}, "teacher": teacher}
    run = build(digits, "hdkd_student_nano", recipe, **options).run(tmp_path / "dkd-seed0", **place)
    method = run.config["method"]
    assert (method["name"], method["alpha"], method["beta"]) == ("my_package.dkd:DKD", 1.0, 4.0)
    assert {"train_class_loss", "train_target_loss", "train_other_loss"} <= set(run.history)

    frame = runs.load(tmp_path)
    arms = {"student": {}, "teacher": {}, "dkd": {"like": "student"} | options | {"teacher": "teacher"}}
    plan = {"name": "mine", "runs": arms, "replicates": [{"seed": 0}], "parameters": {"recipe": {"name": "nano", "epochs": 1}}}
    assert tables.changes(plan)["dkd"][1] == "taught by teacher, method my_package.dkd:DKD, beta 4"
    tables.write_all(frame, plan, tmp_path / "tables")
    assert "dkd" in (tmp_path / "tables" / "accuracies.md").read_text()
    figures.set_style()
    figures.save(figures.comparison(frame, ["accuracy"]), tmp_path / "comparison.png")
    figures.save(figures.training_time(frame, plan, "accuracy"), tmp_path / "time.png")


def test_a_method_from_elsewhere_is_checked_and_estimated_in_a_plan(package):
    parameters = study._defaults("run") | {"network": "hdkd_student_nano", "image_size": 16, "device": "cpu"}
    taught = parameters | {"method": "my_package.dkd:DKD", "options": {"beta": 4.0}}
    assert estimate.seconds(taught, parameters | {"network": "hdkd_teacher_nano"}) > 0
    wrong = taught | {"options": {"bta": 4.0}, "teacher": {"epoch": "best"}}
    with pytest.raises(ValueError, match="DKD has no option 'bta'; did you mean 'beta'"):
        study._check_arms("mine", [{"arm": "dkd", "parameters": wrong}])


def test_a_new_metric_is_measured_of_finished_runs(finished_run, tmp_path, monkeypatch):
    runs_folder = tmp_path / "plan"
    shutil.copytree(finished_run.path, runs_folder / "hdkd-seed0")
    before = runs.Run(runs_folder / "hdkd-seed0").metrics
    measure = metrics.classification
    more = lambda p, y: measure(p, y) | {"top1": (p.argmax(1) == y).float().mean().item()}  # noqa: E731
    monkeypatch.setattr(metrics, "classification", more)
    assert runs.remeasure(runs_folder) == 1
    after = runs.Run(runs_folder / "hdkd-seed0").metrics
    assert after["last"]["test"]["top1"] == pytest.approx(before["last"]["test"]["accuracy"], abs=1e-6)
    assert after["best"]["test"]["confusion"] == before["best"]["test"]["confusion"]
    assert after["best"]["val"] == before["best"]["val"]
    with pytest.raises(FileNotFoundError, match="no finished run in"):
        runs.remeasure(tmp_path / "nowhere")


def test_a_data_set_from_elsewhere_keeps_its_patients_together(package, tmp_path):
    rng = np.random.default_rng(0)
    for patient in range(30):
        for i, name in enumerate(("mild", "severe", "mild")):
            file = tmp_path / f"patient{patient}" / f"{name}-{i}.png"
            file.parent.mkdir(exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file)
    scans = data.load("my_package.scans:scans", tmp_path, image_size=16)
    patients = [{i.split("/")[0] for i in part.ids} for part in (scans.train, scans.val, scans.test)]
    assert scans.classes == ["mild", "severe"]
    assert len(set.union(*patients)) == sum(map(len, patients)) == 30
    with pytest.raises(ValueError, match=r"'my_package.scnas:scans' cannot be imported .*PYTHONPATH"):
        data.load("my_package.scnas:scans", tmp_path)
