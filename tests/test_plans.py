"""Plans and what is published of them: a plan that was written anew still says what its runs were."""

import inspect
from collections.abc import Mapping
from dataclasses import asdict

import pytest

import study
from hdkd_lib import methods, recipes, runs

# The runs of smoke are chapters: test_experiment compares these with run.ipynb.
PUBLISHED = [file.parent for file in sorted((study.ROOT / "results" / "published").glob("*/runs.json.xz"))]
PUBLISHED = [folder for folder in PUBLISHED if folder.name != "smoke"]
DEFAULTS = study._defaults("run")


def resolved(parameters: Mapping) -> dict:
    """What run.ipynb makes of its parameters, as a run's configuration has it."""
    of = DEFAULTS | parameters
    signature = inspect.signature(methods.find(of["method"])).parameters
    settings = {name: signature[name].default for name in methods.find(of["method"]).options()} | of["options"]
    return {
        "method": {"name": of["method"], **settings, "student": {"name": of["network"], **of["network_options"]}},
        "data": {key: of[key] for key in ("dataset", "image_size", "protocol", "fold", "fraction", "draw")},
        "recipe": asdict(recipes.get(**of["recipe"])),
        "seed": of["seed"],
        "precision": of["precision"],
    }


def plain(value):
    """As JSON has it, without what `build` takes from the data: sizes and classes of networks."""
    if isinstance(value, Mapping):
        return {str(key): plain(of) for key, of in value.items() if key not in ("img_size", "num_classes")}
    return [plain(of) for of in value] if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda folder: folder.name)
def test_a_plan_resolves_to_the_configurations_of_its_published_runs(folder):
    jobs = study.expand(folder.name)["jobs"]
    for name in runs.packed(folder):
        published, job = plain(runs.Run(folder / name).config), jobs[name]
        expected = plain(resolved(job["parameters"]))
        assert published["method"].keys() >= job["parameters"].get("options", {}).keys(), name
        for section in ("method", "recipe", "data"):
            for key, value in expected[section].items():  # what a run did not know yet has its default
                assert published[section].get(key, value) == value, f"{name}: {section} {key}"
        assert (published["seed"], published["precision"]) == (expected["seed"], expected["precision"])
        assert ("training" in published["data"]) == bool(job["parameters"].get("synthesis")), name
        assert bool(published["method"].get("teacher")) == bool(job["needs"]), name
        if job["needs"]:
            taught_by = plain(resolved(jobs[job["needs"][0]]["parameters"]))["method"]["student"]
            assert published["method"]["teacher"] == taught_by, name


def test_all_published_runs_but_those_of_chapters_are_compared():
    assert {folder.name for folder in PUBLISHED} >= {"data_efficiency", "hdkd_ablations", "few_images", "brain_tumor_nano"}
