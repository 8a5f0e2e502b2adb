import os
from pathlib import Path

import nbformat
from nbclient import NotebookClient

PATH = Path(__file__).parents[1] / "experiments" / "colab.ipynb"


def pictures(notebook):
    return [
        cell.id
        for cell in notebook.cells
        if cell.cell_type == "code"
        and any("image/png" in output.get("data", {}) for output in cell.outputs)
    ]


def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    settings = {"NOTEBOOK_STEPS": "4", "XLA_FLAGS": "", "XDG_CACHE_HOME": str(tmp_path)}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(PATH, as_version=4)
    nbformat.validate(notebook)
    shown = pictures(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    folder = {"metadata": {"path": str(PATH.parent)}}
    NotebookClient(notebook, timeout=240, resources=folder).execute()
    # Noise, affinity, clusters, curves and samples, as in the committed outputs.
    assert pictures(notebook) == shown
    assert len(shown) == 5
    last = notebook.cells[-1].outputs[0].text
    assert last.startswith("params [")


def test_the_committed_outputs_are_small():
    assert PATH.stat().st_size < 1_000_000
    assert "/root" not in PATH.read_text() and os.path.expanduser("~") not in PATH.read_text()
