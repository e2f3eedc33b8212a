"""What must hold of the committed notebooks, and that the check of their outputs can fail."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def code_cells(path):
    return [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
class TestNotebook:
    def test_is_committed_executed_in_order_without_errors(self, path):
        cells = code_cells(path)
        assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))  # nbval skips cells without a count
        assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
        assert not [output for cell in cells for output in cell.outputs if output.get("name") == "stderr"]

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
        assert all(
            re.fullmatch(r"\w+: (str|int|float|bool|list|dict) = [^#]+  # .+", line) for line in cell.source.splitlines()
        )


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
