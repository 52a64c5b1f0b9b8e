"""The notebook runs from top to bottom, as a reader would run it, and what is committed of it is small."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = sorted(Path(__file__).parents[2].glob("examples/notebook/*.ipynb"))
MAX_BYTES = 200_000
TIMEOUT_S = 180

# In a process of its own: Jupyter keeps sockets and threads for as long as its process lives.
EXECUTE = """
import sys, nbclient, nbformat
notebook = nbformat.read(sys.argv[1], as_version=4)
nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
nbformat.write(notebook, sys.argv[2])
"""


def outputs(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    """The outputs of the cells, in order."""
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def test_there_is_a_notebook() -> None:
    """The tests below have something to run."""
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path, tmp_path: Path) -> None:
    """Every cell runs without an error in an empty folder; the fixtures see that nothing is left behind."""
    done = tmp_path / "done.ipynb"
    folders = ("JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR", "MPLCONFIGDIR")
    env = os.environ | {name: str(tmp_path / name) for name in folders}
    work = tmp_path / "work"
    work.mkdir()
    command = [sys.executable, "-c", EXECUTE, str(path), str(done)]
    ended = subprocess.run(command, cwd=work, env=env, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert ended.returncode == 0, ended.stderr
    assert not list(work.iterdir()), "the notebook left files where it ran"

    shown = outputs(nbformat.read(done, as_version=4))
    text = "".join(output.get("text", "") for output in shown)
    assert "refused (values)" in text
    assert sum("image/png" in output.get("data", {}) for output in shown) == 1
    # Nothing but what is meant: no warning, no worker's traceback.
    assert not [output.text for output in shown if output.get("name") == "stderr"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_tidy(path: Path) -> None:
    """It is small, holds no error, no path and no trace of who ran it, and was run in order."""
    assert path.stat().st_size < MAX_BYTES
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert not [output for output in outputs(notebook) if output.output_type == "error"]
    text = path.read_text()
    assert not [folder for folder in ("/home/", "/root/", "/tmp/", "/work/") if folder in text]
