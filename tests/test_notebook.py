import os
from pathlib import Path

import nbformat
from nbclient import NotebookClient

PATH = Path(__file__).parents[1] / "experiments" / "colab.ipynb"
# Goes in behind the first cell, which makes the packages importable; all else runs as it stands.
SMALLEST = """
from ant_jax.config import update
from configs import digits
from experiments.presets import PRESETS

def smaller(argument, get_config=digits.get_config):
    config = get_config(argument)
    update(config, PRESETS["smoke"].settings | {"clusters.k": 5, "data.batch_size": 40})
    return config

digits.get_config = smaller
"""


def pictures(notebook):
    return [
        cell.id
        for cell in notebook.cells
        if cell.cell_type == "code"
        and any("image/png" in output.get("data", {}) for output in cell.outputs)
    ]


def test_the_notebook_runs_from_top_to_bottom(monkeypatch):
    monkeypatch.setenv("NOTEBOOK_STEPS", "2")
    # The last of equal flags counts.
    one_device = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=1"
    monkeypatch.setenv("XLA_FLAGS", one_device)
    notebook = nbformat.read(PATH, as_version=4)
    nbformat.validate(notebook)
    shown = pictures(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    (first,) = [i for i, cell in enumerate(notebook.cells) if cell.id == "cell-01"]
    notebook.cells.insert(first + 1, nbformat.v4.new_code_cell(SMALLEST))
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
