"""What must hold of the committed notebooks, and that the check of their outputs can fail."""

import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import torch

from hdkd_lib import experiment, recipes, runs
from hdkd_lib.data import load
from hdkd_lib.device import resolve_device

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
OPENING = r"""# .+

- \*\*Question\*\*: .+\?
- \*\*Needs\*\*: .+\.
- \*\*Time\*\*: [1-9]\d* minutes? on a CPU\.
- \*\*Expect\*\*: .+\.

"""


def code_cells(path):
    return [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestNotebook:
    def test_is_committed_executed_in_order_without_errors(self, path):
        cells = code_cells(path)
        assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))  # nbval skips cells without a count
        assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
        assert not [output for cell in cells for output in cell.outputs if output.get("name") == "stderr"]

    def test_opens_with_its_question_what_it_needs_its_minutes_and_what_to_expect(self, path):
        first = nbformat.read(path, 4).cells[0]
        assert first.cell_type == "markdown"
        assert re.match(OPENING, f"{first.source}\n\n")

    def test_its_marks_for_nbval_are_tags(self, path):
        cells = code_cells(path)
        assert not [cell.source for cell in cells if "NBVAL" in cell.source.upper()]
        tags = {tag for cell in cells for tag in cell.metadata.get("tags", [])}
        assert tags <= {"parameters", "nbval-ignore-output", "raises-exception", "nbval-skip", "remove-cell"}

    def test_its_first_cell_fetches_the_study_where_it_is_absent_and_is_that_of_the_others(self, path):
        first, other = (code_cells(of)[0] for of in (path, NOTEBOOKS[0]))
        assert 'find_spec("hdkd_lib") is None' in first.source
        assert (first.source, first.metadata) == (other.source, other.metadata)

    def test_its_figures_have_alternative_texts(self, path):
        outputs = [output for cell in code_cells(path) for output in cell.outputs if "image/png" in output.get("data", {})]
        assert all(output.metadata.get("image/png", {}).get("alt") for output in outputs)

    def test_is_light_and_its_metadata_are_normalised(self, path):
        assert path.stat().st_size < 300_000
        notebook = nbformat.read(path, 4)
        assert "papermill" not in notebook.metadata
        assert not [cell for cell in notebook.cells if {"papermill", "execution"} & cell.metadata.keys()]

    def test_holds_no_local_path_and_no_definition(self, path):
        text = path.read_text()
        assert str(ROOT) not in text
        assert str(Path.home()) + "/" not in text
        assert not [cell.source for cell in code_cells(path) if re.search(r"^\s*(def|class) ", cell.source, re.M)]

    def test_has_one_parameter_cell_that_papermill_can_read(self, path):
        [cell] = [cell for cell in code_cells(path) if "parameters" in cell.metadata.get("tags", [])]
        lines = cell.source.splitlines()
        own = [line for line in lines if not line.startswith("# ")]
        assert all(re.fullmatch(r"\w+: (str|int|float|bool|list|dict)( \| bool)? = [^#]+  # .+", line) for line in own)
        if "02" <= path.stem[:2] <= "07":
            assert len(own) <= 12, "run.ipynb has every option; a chapter has what it is about"
            assert sum(line.startswith("# ") for line in lines) == 3, "what is studied, the network or method, the machine"


# A chapter is the experiment that run.ipynb makes of the same parameters

SMALL = {"patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
VIT = {"network": "deit_tiny_distilled_patch16_224", "network_options": SMALL}
SMOKE = str(ROOT / "results" / "published" / "smoke")
PAIRS = {
    "02_teacher": ({"probe": True}, {"network": "hdkd_teacher_nano", "options": {"probe": True}}),
    "03_student": ({"network_options": {"stem_stride": 1}}, {"network_options": {"stem_stride": 1}}),
    "04_hdkd": (
        {"alpha": 0.7, "stages": [1, 3]},
        {"method": "HDKD", "options": {"alpha": 0.7, "feature_weight": 10.0, "stages": [1, 3]}},
    ),
    "05_cskd": (
        VIT | {"schedule": "cos"},
        VIT | {"method": "CSKD", "options": {"spatial_weight": 1.0, "schedule": "cos"}, "recipe": {"augment": "none"}},
    ),
    "06_dearkd": (
        VIT | {"taps": {"1": 4}},
        VIT | {"method": "DearKD", "options": {"taps": {"1": 4}, "distill_until": 0.75}, "recipe": {"augment": "none"}},
    ),
}


@pytest.fixture(scope="module")
def teacher_dir(tmp_path_factory):
    data, recipe = load("digits", image_size=16), recipes.get("nano", epochs=1)
    folder = tmp_path_factory.mktemp("runs") / "teacher"
    return str(experiment.build(data, "hdkd_teacher_nano", recipe).run(folder, device="cpu").path)


def built(name: str, **parameters) -> experiment.Experiment:
    """The experiment of a notebook, whose cells are executed until it is there."""
    namespace = {"display": lambda figure: None}
    for cell in code_cells(ROOT / "notebooks" / f"{name}.ipynb"):
        exec(cell.source, namespace)
        if "parameters" in cell.metadata.get("tags", []):
            namespace |= parameters
        if "experiment" in namespace:
            return namespace["experiment"]
    raise AssertionError("no experiment")


@pytest.mark.parametrize("name", PAIRS)
def test_a_chapter_is_the_run_of_the_same_parameters(name, teacher_dir):
    own, of_run = PAIRS[name]
    common = {"image_size": 16, "seed": 3}
    chapter = built(name, epochs=2, **common, **own, **({"teacher_dir": teacher_dir} if name > "04" else {}))
    of_run = of_run | {"recipe": {"name": "nano", "epochs": 2} | of_run.get("recipe", {})}
    run = built("run", **common, **of_run, **({"teacher": {"run_dir": teacher_dir}} if name > "04" else {}))
    assert chapter.task.describe() == run.task.describe()
    assert (chapter.recipe, chapter.seed, chapter.data.config) == (run.recipe, run.seed, run.data.config)
    weights = [one.task.state_dict() for one in (chapter, run)]
    torch.testing.assert_close(*weights, rtol=0, atol=0)  # the teacher's, too


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("04_hdkd", {"epochs": "6"}, r"epochs must be a whole number \(got '6'\)"),
        ("04_hdkd", {"image_size": 50}, r"hdkd_.* sizes divisible by .*got 50"),
        ("04_hdkd", {"alpha": 3.0}, r"alpha must be in \[0, 1\]"),
        ("04_hdkd", {"teacher_dir": "/nowhere"}, "/nowhere is no run folder"),
        ("04_hdkd", {"stages": [1, 4]}, "stages must be ascending numbers from 1 to 3"),
        ("05_cskd", {"schedule": "cosine"}, "schedule must be one of linear"),
        ("05_cskd", {"network": "resnet10t", "network_options": {}}, "CSKD needs a student with patch tokens"),
        ("06_dearkd", {"taps": {"9": 4}}, "taps name block 9"),
        ("03_student", {"network": "hdkd_studnet"}, "unknown model 'hdkd_studnet'; did you mean"),
        ("02_teacher", {"dataset": "digit"}, "digit"),
        ("02_teacher", {"device": "gpu"}, "device must be 'auto'"),
        ("07_data_free", {"preset": "tiny"}, "a preset of inversion is one of"),
        ("07_data_free", {"per_class": 2}, "per_class"),
        ("run", {"recipe": {"name": "nani"}}, "unknown recipe 'nani'; did you mean 'nano'"),
        ("run", {"draws": 3, "draw": 3}, "draw"),
        (
            "08_ablations",
            {"results": SMOKE, "arms": ["hdkt"]},
            "no arm 'hdkt' here; did you mean 'hdkd'",
        ),
        ("10_figures", {"results": SMOKE, "arms": ["hdkt"]}, "no arm 'hdkt' here"),
    ],
)
def test_a_wrong_parameter_is_refused_before_anything_trains_in_one_sentence(name, parameters, message, monkeypatch):
    def fit(*arguments, device="auto", **options):
        resolve_device(device)  # as fit does before all else
        raise AssertionError("it trains")

    monkeypatch.setattr(experiment, "fit", fit)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        built(name, **parameters).run(device=parameters.get("device", "auto"))
    assert caught.value._render_traceback_() == [f"{caught.type.__name__}: {caught.value}"]


def test_a_notebook_saved_by_jupyterlab_is_the_committed_one_byte_by_byte():
    config = SimpleNamespace(LabApp=SimpleNamespace(), ContentsManager=SimpleNamespace())
    runpy.run_path(str(ROOT / "jupyter_lab_config.py"), {"get_config": lambda: config})
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, 4)
        notebook.metadata["language_info"] = {"name": "python", "version": "3.11.7"}  # JupyterLab adds what the kernel says
        config.ContentsManager.pre_save_hook(model={"type": "notebook", "content": notebook}, path=path.name)
        assert nbformat.writes(notebook) + "\n" == path.read_text(), path.name
    assert (ROOT / config.LabApp.default_url.removeprefix("/lab/tree/")).parent == ROOT / "notebooks"


def test_folders_as_the_text_names_them_are_found_from_every_working_directory(tmp_path, monkeypatch):
    monkeypatch.delenv("HDKD_RESULTS")
    monkeypatch.chdir(tmp_path)
    folder = "results/published/smoke"
    frame = runs.load(folder)
    assert len(frame) == len(runs.packed(SMOKE))
    assert runs.plan(folder)["name"] == "smoke"
    packed = runs.Run(f"{folder}/{Path(frame.path[0]).name}")
    assert packed.metrics["best"]["test"]["accuracy"] == frame.accuracy[0]
    assert runs.from_root("results/runs/new") == runs.results_dir() / "runs" / "new"
    (tmp_path / "own").mkdir()
    assert runs.from_root("own/new").resolve() == tmp_path / "own" / "new"
    assert runs.from_root("nowhere/new") == Path("nowhere/new")
    (tmp_path / folder).mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="no finished run in results/published/smoke"):
        runs.load(folder)  # what is in the working directory comes first


def test_a_chapter_finds_its_teacher_and_keeps_its_run_by_their_paths_in_the_clone(teacher_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("HDKD_RESULTS", str(tmp_path / "results"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    shutil.copytree(teacher_dir, tmp_path / "results" / "runs" / "teacher")
    experiment = built("04_hdkd", image_size=16, epochs=1, teacher_dir="results/runs/teacher")
    run = experiment.run("results/runs/mine/hdkd", device="cpu")
    assert run.path == tmp_path / "results" / "runs" / "mine" / "hdkd"


@pytest.mark.slow
def test_a_changed_number_in_a_stored_output_is_noticed(tmp_path):
    copy = shutil.copy(ROOT / "notebooks" / "01_data.ipynb", tmp_path)
    command = [sys.executable, "-m", "pytest", "-q", "-c", "/dev/null", "--nbval", "--nbval-current-env", copy]
    command += ["--nbval-sanitize-with", str(ROOT / "tests" / "nbval.cfg"), "-p", "no:cacheprovider"]
    notebook = nbformat.read(copy, 4)
    output = next(
        o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs if "images: 1797" in o.get("text", "")
    )
    output["text"] = output["text"].replace("images: 1797", "images: 1798")
    nbformat.write(notebook, copy)
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 1
    assert "1 failed" in answer.stdout
