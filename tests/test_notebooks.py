"""The notebooks run from top to bottom, open with their installation, and are kept with what they print."""

import itertools
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks():
    assert len(NOTEBOOKS) >= 3


def kinds_of(cell) -> list[str]:
    """What kinds of output a cell has, in order; text and its pieces, and pictures, differ from machine to machine."""
    kinds = ("image" if "image/png" in output.get("data", {}) else output.output_type for output in cell.outputs)
    return [kind for kind, _ in itertools.groupby(kinds)]


@pytest.mark.filterwarnings("default")  # Jupyter's own are no concern of ours
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_draws(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert "%pip install" in code[0].source
    stored = [kinds_of(cell) for cell in code]
    assert any("image" in kinds for kinds in stored), "run it and keep its outputs before a commit"
    # A cell that raises, and a run of more than two minutes, are errors.
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    assert [kinds_of(cell) for cell in code] == stored
    assert not [o for cell in code for o in cell.outputs if o.get("name") == "stderr"]
