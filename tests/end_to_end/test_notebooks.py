"""The notebooks of the docs: each runs from top to bottom, and is kept with its pictures."""

import shutil

import nbformat
import pytest
from helpers import ROOT
from nbclient import NotebookClient

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def pictures(notebook):
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", []))
    return sum(any(kind.startswith("image/") for kind in output.get("data", {})) for output in outputs)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the client and the kernel's protocol
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path):
    shutil.copyfile(ROOT / "docs" / "coffee.jpg", tmp_path / "coffee.jpg")
    (tmp_path / "notebooks").mkdir()
    kept = nbformat.read(path, as_version=4)
    run = nbformat.read(path, as_version=4)
    metadata = {"metadata": {"path": str(tmp_path / "notebooks")}}
    NotebookClient(run, timeout=600, kernel_name="python3", resources=metadata).execute()
    assert pictures(run) == pictures(kept) > 0


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_kept_small_and_without_errors(path):
    assert path.stat().st_size < 500_000
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert {output.output_type for output in outputs} <= {"display_data", "execute_result", "stream"}


def test_there_are_four():
    assert [path.stem for path in NOTEBOOKS] == ["match", "segment", "start", "video"]
