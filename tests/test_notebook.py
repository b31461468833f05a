"""The demo notebook: it runs from top to bottom, and what is stored is its source with the outputs of a run."""

import sys
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).parent.parent / "notebooks"
sys.path.append(str(FOLDER))
import make_notebook  # noqa: E402


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def said(cells):
    return "".join(output.text for cell in cells for output in cell.outputs if output.output_type == "stream")


def figures(cells):
    return sum("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs)


@pytest.mark.slow(40)
def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    for name, value in (("STEPS", 2), ("TASKS", 8), ("RUNS", tmp_path)):
        monkeypatch.setenv(f"IMAGENT_DEMO_{name}", str(value))
    cells = code(make_notebook.execute(make_notebook.read(make_notebook.SOURCE.read_text())))
    text = said(cells)
    assert len(cells) == 9
    assert "step    2/2" in text and "of 8 held-out tasks right" in text and "with shuffled crops" in text
    assert figures(cells) >= 5
    assert (tmp_path / "demo" / "report.html").is_file()


def test_the_stored_notebook_is_its_source_with_the_outputs_of_a_real_run():
    stored = nbformat.read(FOLDER / "imagent_demo.ipynb", as_version=4)
    nbformat.validate(stored)
    source = make_notebook.read(make_notebook.SOURCE.read_text())
    assert [cell.source for cell in stored.cells] == [cell.source for cell in source.cells]
    cells = code(stored)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    training = next(cell for cell in cells if "train(cfg" in cell.source)
    assert "held-out tasks right" in said([training]) and "Traceback" not in said(cells)
    assert figures(cells) >= 7
