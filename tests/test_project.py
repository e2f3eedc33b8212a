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
import pandas as pd
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PUBLISHED = sorted(path for path in (ROOT / "results" / "published").glob("*") if path.is_dir())


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


def test_environment_yml_installs_the_project_with_all_extras_under_the_same_pins():
    text = (ROOT / "environment.yml").read_text()
    assert "-c constraints.txt" in text
    assert f"-e .[{','.join(PROJECT['optional-dependencies'])}]" in text
    python = re.search(r"python=([\d.]+)", text)[1]
    assert tuple(map(int, python.split("."))) >= tuple(map(int, PROJECT["requires-python"].removeprefix(">=").split(".")))


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
    own = {"hdkd_lib", "study", "conftest", "timing"}
    distributions = packages_distributions()
    foreign = imported - set(sys.stdlib_module_names) - own
    assert not {m for m in foreign if not {canonicalize_name(d) for d in distributions.get(m, [])} & requirements().keys()}


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda folder: folder.name)
def test_published_tables_regenerate_from_the_published_runs_alone(folder, tmp_path):
    from ruamel.yaml import YAML

    from hdkd_lib import runs, tables

    plan = YAML(typ="safe", pure=True).load(folder / "plan.yaml").get("notebooks", {})
    frame = runs.load(folder)
    tables.write(frame, tmp_path, plan.get("09_tables", {}).get("baseline", "student"))
    for file in ("runs.csv", "summary.csv", "summary.md"):
        assert (tmp_path / file).read_text() == (folder / "tables" / file).read_text()
    if (folder / "ablations").exists():
        reference = plan.get("08_ablations", {}).get("reference", "hdkd")
        tables.write_ablations(tables.ablations(frame, reference=reference), tmp_path, frame)
        for file in ("ablations.csv", "ablations.md"):
            assert (tmp_path / file).read_text() == (folder / "ablations" / file).read_text()


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda folder: folder.name)
def test_the_manifest_names_every_published_file_with_its_hash(folder):
    listed = json.loads((folder / "manifest.json").read_text())["files"]
    present = {f.relative_to(folder).as_posix(): f for f in folder.rglob("*") if f.is_file() and f.name != "manifest.json"}
    assert listed == {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in present.items()}


def test_readme_shows_the_published_table():
    assert (ROOT / "results/published/brain_tumor_nano/tables/summary.md").read_text() in (ROOT / "README.md").read_text()


def readme() -> str:
    return re.sub(r"\s+", " ", (ROOT / "README.md").read_text())


def points(plan: str, run: str, baseline: str, fraction: float = 1.0) -> str:
    """The paired difference of balanced accuracy, as the README writes it."""
    from hdkd_lib.statistics import paired

    frame = pd.read_csv(ROOT / "results" / "published" / plan / "tables" / "runs.csv").query("fraction == @fraction")
    scores = frame.pivot_table(index=["seed", "fold"], columns="kind", values="balanced_accuracy")
    return f"{paired(scores[run], scores[baseline]):+}"


def test_readme_says_what_hdkd_costs_and_what_pixels_reach():
    published, text = ROOT / "results" / "published" / "brain_tumor_nano" / "tables" / "runs.csv", readme()
    seconds = pd.read_csv(published).groupby("run").seconds.mean()
    assert (
        f"for {seconds.hdkd:.0f} s of training in place of {seconds.student:.0f} s, after its teacher's {seconds.teacher:.0f}"
        in text
    )
    audit = pd.read_csv(ROOT / "results" / "audits" / "brain_tumor" / "optimism.csv").query(
        "protocol == 'grouped' and fold < 3"
    )
    pixels = 100 * audit.groupby("classifier").balanced_accuracy.mean()
    logistic, nearest = pixels["logistic regression"], pixels["nearest neighbour"]
    assert f"16x16 grey pixels has {logistic:.1f} and the nearest neighbour {nearest:.1f} " in text


def test_readme_says_what_the_papers_protocol_is_worth():
    from hdkd_lib import runs, tables

    [row] = tables.optimism(runs.load(ROOT / "results" / "published" / "brain_tumor_nano")).to_dict("records")
    paper, honest = (row[column].split()[0] for column in ("chosen on test", "chosen on validation"))
    assert f"reports {paper} where the honest one reports {honest} ({row['Δ']}, " in readme()


def test_readme_says_what_the_ablations_say():
    table = pd.read_csv(ROOT / "results" / "published" / "hdkd_ablations" / "ablations" / "ablations.csv").set_index("run")
    text, own = readme(), table[table.parameters != "method"]
    assert own.difference.abs().idxmax() == "stem4"
    assert f"(stem stride 4), {points('hdkd_ablations', 'stem4', 'hdkd')} points" in text
    assert f"{(table.difference.abs() > table.difference_half_width).sum()} of {len(table)} intervals leave out zero" in text
    assert f"all q >= {table.q.min():.2f}" in text
    assert f"student alone is at {points('hdkd_ablations', 'student', 'hdkd')}:" in text


def test_readme_says_what_cskds_ablations_say():
    folder, text = ROOT / "results" / "published" / "cskd_ablations", readme()
    scores = pd.read_csv(folder / "tables" / "summary.csv").set_index("run")["balanced acc."]
    assert f"CSKD has {scores.cskd}, DeiT's distillation {scores.deit} and the ViT alone {scores.vit};" in text
    runs = pd.read_csv(folder / "tables" / "runs.csv")
    without = 100 * runs[runs.run == "spatial_0"].balanced_accuracy.sort_values()
    assert f"one of three replicates stays at {without.iloc[0]:.1f}." in text
    assert without.iloc[1] > 90
    assert f"a single cell teaches as well ({points('cskd_ablations', 'grid_1x1', 'cskd')})" in text
    table = pd.read_csv(folder / "ablations" / "ablations.csv")
    assert f"(q >= {table[table.parameters != 'method'].q.min():.2f})" in text


def test_readme_says_what_dearkds_ablations_say():
    folder, text = ROOT / "results" / "published" / "dearkd_ablations", readme()
    scores = pd.read_csv(folder / "tables" / "summary.csv").set_index("run")["balanced acc."]
    assert f"DearKD has {scores.dearkd}, DeiT's distillation {scores.deit}, the ViT {scores.vit} alone and" in text
    assert f" {scores.mhca_alone} with convolutional attention." in text
    others = ("taps_none", "mhca_0", "switch_50", "switch_never")
    features, attention, half, never = (points("dearkd_ablations", run, "dearkd") for run in others)
    assert f"the early features DearKD has {features}, without convolutional attention {attention};" in text
    assert f"half of the epochs gives {half}, one that never leaves {never}." in text
    table = pd.read_csv(folder / "ablations" / "ablations.csv")
    assert f"(q >= {table.q.min():.2f})" in text.partition("And DearKD's?")[2]


def test_readme_says_what_few_images_do():
    table = pd.read_csv(ROOT / "results" / "published" / "data_efficiency" / "tables" / "summary.csv").set_index("run")
    text, difference = readme(), "Δ balanced acc. to vit"
    taught = table[table.index.str.fullmatch("(dearkd|cskd|deit)( .*)?")]
    assert len(taught) == 12
    assert taught.index[taught.q < 0.05].tolist() == ["cskd 10%"]
    assert f"false discoveries: CSKD's {table[difference]['cskd 10%']} points with 10 %" in text
    dearkd, mhca, cskd, deit = (table[difference][f"{kind} 25%"] for kind in ("dearkd", "mhca", "cskd", "deit"))
    assert f"With 25 % DearKD has {dearkd} (its convolutional attention without a teacher {mhca}), " in text
    assert f"CSKD {cskd}, DeiT {deit}; from 50 % on" in text
    for value in taught[difference][taught.index.str.contains("50%") | ~taught.index.str.contains("%")]:
        mean, half = map(float, value.split(" ± "))
        assert abs(mean) < half
    alone, taught_by_dearkd = (table["balanced acc."][f"{kind} 25%"].split()[0] for kind in ("student", "dearkd"))
    assert f"student has {alone} with 25 % and no teacher, where DearKD has {taught_by_dearkd}:" in text
    gains = [points("data_efficiency", "hdkd", "student", share) for share in (0.1, 0.25, 0.5, 1.0)]
    low, *_, high = sorted(gains, key=lambda gain: float(gain.split()[0]))
    assert f"HDKD adds between {low} and {high} to its own" in text


def test_readme_says_what_a_student_without_images_reaches():
    table = pd.read_csv(ROOT / "results" / "published" / "data_free_nano" / "tables" / "summary.csv").set_index("run")
    scores, text = table["balanced acc."], readme()
    others = ("real_soft", "quarter", "no_mixing", "colour", "no_divergence")
    difference = {run: points("data_free_nano", run, "data_free") for run in others}
    assert f"reaches {scores['data_free']} on real digits, and {scores['real_soft']} on the teacher's real images" in text
    assert f"the difference is {difference['real_soft']})" in text
    assert f"change this by {difference['quarter']} points, unmixed images by {difference['no_mixing']}, " in text
    assert (
        f"coloured ones by {difference['colour']}. To leave out the intra-divergence loss gives {difference['no_divergence']}:"
        in text
    )


@pytest.mark.parametrize(("dataset", "title"), [("brain_tumor", "brain tumour MRI"), ("ham10000", "HAM10000")])
def test_readme_shows_what_a_leak_is_worth(dataset, title):
    scores = pd.read_csv(ROOT / "results" / "audits" / dataset / "optimism.csv")
    mean = 100 * scores[scores.classifier == "nearest neighbour"].groupby("protocol").balanced_accuracy.mean()
    assert f"| {title} | {mean['random']:.1f} | {mean['grouped']:.1f} |" in (ROOT / "README.md").read_text()


def test_readme_counts_the_leaks_of_the_published_split():
    card = json.loads((ROOT / "results" / "audits" / "brain_tumor" / "card.json").read_text())
    counts = f"{card['test_images_with_exact_duplicate_in_train']} of {card['test_images']} test images"
    assert counts in (ROOT / "README.md").read_text()
