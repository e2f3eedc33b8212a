"""The environment files agree and cover every import; README's numbers are those of results/."""

import ast
import hashlib
import json
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import nbformat
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from hdkd_lib import readme, runs, tables
from hdkd_lib.runs import Run

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PUBLISHED = sorted(path.parent for path in (ROOT / "results" / "published").glob("*/manifest.json"))
PACKED = sorted(path.parent for path in (ROOT / "results" / "published").glob("*/runs.json.xz"))


def requirements() -> dict[str, Requirement]:
    lists = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    return {canonicalize_name(Requirement(line).name): Requirement(line) for lines in lists for line in lines}


def pins() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        name, version = line.split(" ;")[0].strip().split("==")
        found.setdefault(name, []).append(version)
    return found


def test_every_requirement_is_pinned_inside_its_range():
    for name, requirement in requirements().items():
        assert name in pins(), f"{name} is not in constraints.txt: make lock"
        assert all(version in requirement.specifier for version in pins()[name])


def test_version_citation_and_changelog_agree():
    version = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1]
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    assert version == newest == PROJECT["version"]


def test_environment_yml_installs_the_project_with_all_extras_under_the_same_pins():
    text = (ROOT / "environment.yml").read_text()
    assert "-c constraints.txt" in text
    assert f"-e .[{','.join(PROJECT['optional-dependencies'])}]" in text
    python = re.search(r"python=([\d.]+)", text)[1]
    assert tuple(map(int, python.split("."))) >= tuple(map(int, PROJECT["requires-python"].removeprefix(">=").split(".")))


def test_the_image_has_the_python_of_environment_yml_and_the_files_that_it_copies_are_there():
    text = (ROOT / "Dockerfile").read_text()
    steps = [line.split() for line in text.replace("\\\n", " ").splitlines() if line and not line.startswith("#")]
    copied = [name for step in steps if step[0] == "COPY" for name in step[1:-1] if not name.startswith("--")]
    assert not [name for name in copied if not (ROOT / name).exists()]
    python = re.search(r"python=([\d.]+)", (ROOT / "environment.yml").read_text())[1]
    assert steps[0][0] == "FROM"
    assert steps[0][1].startswith(f"python:{python}-")

    rules = (ROOT / "Makefile").read_text()
    needed = re.search(r"^\.venv/installed: (.+)", rules, re.MULTILINE)[1].split()
    assert {"Makefile", *needed} <= set(copied[: copied.index(".")])  # what is installed before the library is there
    assert f"touch {PROJECT['readme']} hdkd_lib/__init__.py && make .venv/installed" in text
    volumes = json.loads(" ".join(next(step for step in steps if step[0] == "VOLUME")[1:]))
    variables = dict(pair.split("=") for step in steps if step[0] == "ENV" for pair in step[1:])
    assert [variables["HDKD_DATA"], variables["HDKD_RESULTS"]] == volumes
    make, target = json.loads(" ".join(next(step for step in steps if step[0] == "CMD")[1:]))
    assert make == "make"
    assert re.search(rf"^{target}:", rules, re.MULTILINE)


def test_every_import_is_a_requirement():
    sources = [path.read_text() for path in [*ROOT.glob("*.py"), *ROOT.glob("hdkd_lib/**/*.py"), *ROOT.glob("tests/**/*.py")]]
    for path in ROOT.glob("notebooks/*.ipynb"):
        sources.append("\n".join(cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"))
    imported = set()
    for node in (node for source in sources for node in ast.walk(ast.parse(source))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            imported.add(node.module.split(".")[0])
    own = {"hdkd_lib", "study", "tests", "conftest", "timing", "gpu", "duplicates", "fake_cuda"}
    distributions = packages_distributions()
    foreign = imported - set(sys.stdlib_module_names) - own - {"triton"}  # comes with torch for CUDA, and is of use there only
    assert not {m for m in foreign if not {canonicalize_name(d) for d in distributions.get(m, [])} & requirements().keys()}


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda folder: folder.name)
def test_published_tables_regenerate_from_the_published_runs(folder, tmp_path):
    frame, plan = runs.load(folder), runs.plan(folder)
    tables.write_all(frame, plan, tmp_path)
    if (folder / "ablations").exists():
        tables.write(tables.readable(tables.ablations(frame, plan)), tmp_path / "ablations", tables.provenance(frame, plan))
    for file in tmp_path.iterdir():
        published = folder / ("ablations" if file.stem == "ablations" else "tables") / file.name
        assert file.read_text() == published.read_text()


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda folder: folder.name)
def test_the_manifest_names_every_published_file_with_its_hash(folder):
    listed = json.loads((folder / "manifest.json").read_text())["files"]
    present = {f.relative_to(folder).as_posix(): f for f in folder.rglob("*") if f.is_file() and f.name != "manifest.json"}
    assert listed == {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in present.items()}


@pytest.mark.parametrize("name", readme.TEXTS)
class TestText:
    def test_its_numbers_are_those_of_results(self, name):
        text = (ROOT / name).read_text()
        assert readme.write(name, text, ROOT / "results") == text, "make readme"

    def test_a_changed_number_is_noticed(self, name):
        text = (ROOT / name).read_text()
        for block in readme.TEXTS[name]:
            start = text.index("-->", text.index(f"<!-- {block} -->"))
            digit = re.search(r"\d", text[start:]).start() + start
            changed = text[:digit] + str((int(text[digit]) + 1) % 10) + text[digit + 1 :]
            assert readme.write(name, changed, ROOT / "results") == text

    def test_without_one_of_its_blocks_it_is_refused(self, name):
        block, text = readme.TEXTS[name][-1], (ROOT / name).read_text()
        for broken in (
            text.replace(f"<!-- {block} -->\n", ""),
            text.replace("<!-- end -->\n", "", 1),
            text.replace(f"<!-- {block}", "<!-- x"),
        ):
            with pytest.raises(ValueError, match=r"must hold each of the blocks .* once, with its end"):
                readme.write(name, broken, ROOT / "results")


@pytest.mark.parametrize("folder", PACKED, ids=lambda folder: folder.name)
def test_packed_runs_are_of_one_commit_and_their_scores_follow_from_their_predictions(folder):
    packed, plan = runs.packed(folder), runs.plan(folder)
    if "mixed" not in plan:
        assert len({run["environment"]["commit"] for run in packed.values()}) == 1
        assert not [name for name, run in packed.items() if run["environment"]["uncommitted_changes"]]
    for name, of in packed.items():
        assert of["job"]["plan"] == folder.name
        run = Run(folder / name)
        split, tested = run.split, runs.packed_table(folder, "predictions")
        for which in ("last", "best"):
            if not any(column.startswith(f"{name} {which} ") for column in tested):
                assert which == "last"  # of runs before it was kept
                continue
            predictions = run.predictions(which)
            assert set(predictions.ids) == set(split.id[split.part == "test"])
            accuracy = (predictions.predicted == predictions.labels).mean()
            assert accuracy == pytest.approx(of["metrics"][which]["test"]["accuracy"], abs=1e-6)


def test_results_stay_small():
    files = [
        file for file in (ROOT / "results").rglob("*") if file.is_file() and "runs" not in file.relative_to(ROOT).parts[1:2]
    ]
    assert sum(file.stat().st_size for file in files) < 12e6
