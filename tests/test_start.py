import numpy as np
import pytest
from PIL import Image
from ruamel.yaml import YAML

from hdkd_lib import data, experiment, recipes, start, statistics
from hdkd_lib.runs import Run

EPOCHS = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return start.make_textures(tmp_path_factory.mktemp("images") / "textures", per_class=24, size=32)


@pytest.fixture(scope="module")
def loaded(folder):
    return data.load("folder", folder, image_size=16)


@pytest.fixture(scope="module")
def runs(loaded, tmp_path_factory) -> dict[str, Run]:
    place, recipe = tmp_path_factory.mktemp("runs"), recipes.get("nano", epochs=EPOCHS)
    student = {"data": loaded, "network": "hdkd_student_distilled_nano", "recipe": recipe}
    hdkd = experiment.build(**student, method="HDKD", teacher=experiment.build(loaded, "hdkd_teacher_nano", recipe))
    made = {"teacher": hdkd.train_teacher(place / "teacher", device="cpu")}
    made["student"] = experiment.build(**student).run(place / "student", device="cpu")
    return made | {"HDKD": hdkd.run(place / "hdkd", device="cpu", force=True)}


def test_textures_are_the_same_every_time_and_hold_two_copies_of_each_class(folder, loaded, tmp_path):
    again = start.make_textures(tmp_path, per_class=24, size=32)
    for file in folder.rglob("*.png"):
        assert np.array_equal(Image.open(file), Image.open(again / file.relative_to(folder)))
    assert loaded.card["classes"] == {"checks": 24, "dots": 24, "stripes": 24}
    assert loaded.card["exact_copies"] == 6
    other = start.make_textures(tmp_path / "other", per_class=24, size=32, seed=1)
    assert not np.array_equal(Image.open(folder / "dots" / "000.png"), Image.open(other / "dots" / "000.png"))


def test_the_plan_is_one_that_study_expands(runs, loaded, folder, tmp_path, monkeypatch):
    import study

    (tmp_path / "plans").mkdir()
    for file in study.NOTEBOOKS.glob("*.ipynb"):
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "plans" / "mine.yaml").write_text(start.plan(runs, loaded, folder, epochs=9, smallest=0.03))
    monkeypatch.setattr(study, "NOTEBOOKS", tmp_path)
    expanded = study.expand("mine")
    jobs, content = expanded["jobs"], expanded["content"]
    assert content["smallest_difference"] == 0.03
    assert len([job for job in jobs.values() if not job["report"]]) == 4 * start.FOLDS
    hdkd = jobs["hdkd-fold3-seed3"]
    assert hdkd["needs"] == ["teacher-fold3-seed3"]
    same = {"dataset": "folder", "root": str(folder), "image_size": 16, "method": "HDKD", "fold": 3, "seed": 3}
    assert {key: hdkd["parameters"][key] for key in same} == same
    teacher, student, distilled = (run.metrics["seconds"] for run in runs.values())
    assert jobs["student_long-fold0-seed0"]["parameters"]["recipe"]["epochs"] == round(9 * (teacher + distilled) / student)
    assert jobs["student-fold0-seed0"]["parameters"]["recipe"]["epochs"] == 9


def test_a_plan_keeps_the_patients_together(runs, folder):
    pattern = r"(\w+/\d+)\.png"
    of_patients = data.load("folder", folder, image_size=16, groups=pattern)
    plan = YAML(typ="safe", pure=True).load(start.plan(runs, of_patients, folder, epochs=9, smallest=0.03))
    assert plan["parameters"]["groups"] == pattern


def test_a_plan_keeps_the_options_of_the_networks(runs, loaded, folder):
    config = runs["student"].config
    changed = type("Run", (), {"config": config | {"method": config["method"] | {"student": {"name": "vit", "depth": 6}}}})()
    changed.metrics = runs["student"].metrics
    plan = YAML(typ="safe", pure=True).load(start.plan(runs | {"student": changed}, loaded, folder, epochs=9, smallest=0.03))
    assert plan["runs"]["student"] == {"network": "vit", "network_options": {"depth": 6}}


def test_a_replicate_takes_the_time_of_its_four_runs(runs):
    teacher, student, distilled = (run.metrics["seconds"] / EPOCHS for run in runs.values())
    long = (teacher + distilled) / student  # epochs of student_long for one of the others
    assert start.hours(runs, 9) * 3600 == pytest.approx(9 * (teacher + student + distilled + long * student))


def test_a_difference_is_zero_of_a_run_and_itself_and_turns_its_sign(runs):
    low, middle, high = start.difference(runs["HDKD"], runs["HDKD"])
    assert middle == 0 < high == -low  # equal answers do not make the difference certain
    low, middle, high = start.difference(runs["HDKD"], runs["student"])
    assert low < middle < high
    scores = [runs[name].metrics["best"]["test"]["accuracy"] for name in ("HDKD", "student")]
    assert middle == pytest.approx(scores[0] - scores[1], abs=1e-5)
    assert start.difference(runs["student"], runs["HDKD"]) == pytest.approx((-high, -middle, -low))


def test_a_difference_on_different_images_is_refused(runs, monkeypatch):
    other = runs["student"].predictions("best")[:-1]
    monkeypatch.setattr(runs["student"], "predictions", lambda epoch: other, raising=False)
    with pytest.raises(ValueError, match="were tested on different images"):
        start.difference(runs["HDKD"], runs["student"])


def test_the_report_says_what_was_measured_and_gives_no_verdict(runs, loaded):
    text = start.report(runs, loaded, epochs=9, smallest=0.03, sd=0.02)
    low, by, high = (100 * value for value in start.difference(runs["HDKD"], runs["student"]))
    assert f"**{by:+.1f} points** of accuracy ({low:+.1f} to {high:+.1f}" in text
    for name, run in runs.items():
        assert f"{100 * run.metrics['best']['test']['accuracy']:.1f} %" in next(
            x for x in text.splitlines() if f"| {name}:" in x
        )
    assert "There is no verdict from one run" in text
    assert "have to be trained for longer first: teacher, student, HDKD." in text
    assert f"needs {statistics.replicates(0.02, 0.03, contrasts=2)} replicates" in text
    share = len(loaded.test) / len(loaded.train)
    found = statistics.detectable(0.02 * (1 + 5 * share) ** 0.5, 5, contrasts=2)
    assert f"a difference of {100 * found:.1f} points or more" in text
    assert "more than 10,000 replicates" in start.report(runs, loaded, epochs=9, smallest=1e-4, sd=0.5)
