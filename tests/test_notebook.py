import os
import runpy
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
PATH = ROOT / "experiments" / "colab.ipynb"
COLAB = runpy.run_path(str(ROOT / "experiments" / "colab.py"))
# Goes in behind the first cell, which makes the packages importable; all else runs as it stands.
SMALLEST = """
sys.path.append("tests")
import pytest
import tiny_runs
from ant_jax.config import update
from configs import digits
from experiments.presets import PRESETS

def smaller(argument, get_config=digits.get_config):
    config = get_config(argument)
    update(config, PRESETS["smoke"].settings | {"clusters.k": 5, "data.batch_size": 40})
    return config

digits.get_config = smaller
tiny_runs.use_small_model(pytest.MonkeyPatch())
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


def plugins(version, *names):
    return dict.fromkeys(["jax", "jaxlib", *names], version)


@pytest.mark.parametrize(
    ("accelerator", "installed", "extras", "pins"),
    [
        ("", {}, "experiments", []),
        ("", plugins("0.7.2"), "experiments", []),
        ("", plugins("0.11.0"), "experiments", ["jax==0.11.0"]),
        ("cuda12", plugins("0.10.2", "jax-cuda12-plugin"), "experiments", ["jax==0.10.2"]),
        ("cuda13", plugins("0.10.2", "jax-cuda12-plugin"), "experiments", ["jax==0.10.2"]),
        ("cuda12", plugins("0.10.1", "jax-cuda12-plugin"), "experiments,cuda12", []),
        ("cuda13", plugins("0.7.2", "jax-cuda12-plugin"), "experiments,cuda13", []),
        ("cuda12", plugins("0.10.2"), "experiments,cuda12", ["jax==0.10.2"]),
        (
            "cuda12",
            plugins("0.10.2") | {"jax-cuda12-plugin": "0.10.1"},
            "experiments,cuda12",
            ["jax==0.10.2"],
        ),
        ("tpu", plugins("1.0.0") | {"libtpu": "0.0.30"}, "experiments", ["jax==1.0.0"]),
        ("tpu", plugins("0.7.2") | {"libtpu": "0.0.17"}, "experiments,tpu", []),
    ],
)
def test_a_new_enough_jax_stays_and_another_comes_with_its_plugin(
    accelerator, installed, extras, pins
):
    runtime = COLAB["Runtime"](accelerator, installed)
    assert COLAB["requirements"](runtime, ROOT) == [f"{ROOT}[{extras}]", *pins]


@pytest.mark.parametrize(
    ("said", "extra"), [("CUDA Version: 12.4", "cuda12"), ("CUDA Version: 13.0", "cuda13")]
)
def test_the_driver_says_which_cuda_it_runs(said, extra, tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho '| Driver Version: 580.1   {said}  |'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert COLAB["this_runtime"]().accelerator == extra
    monkeypatch.setenv("PATH", "")
    assert COLAB["this_runtime"]().accelerator == ""


def test_only_packages_that_were_loaded_and_have_changed_need_a_restart():
    before = {"numpy": "1.0", "jax": "1.0", "scipy": "1.0"}
    after = before | {"numpy": "2.0", "scipy": "2.0", "flax": "1.0"}
    loaded = ["numpy.linalg", "numpy", "jax", "flax", "os"]
    assert COLAB["outdated"](before, after, loaded) == ["numpy"]
    assert not COLAB["outdated"](before, after, ["jax", "os"])


def test_the_first_cells_fetch_and_install_the_code(tmp_path, monkeypatch):
    """In an empty folder, as in Colab, from what its first line names."""
    cells = [each.source for each in nbformat.read(PATH, 4).cells if each.cell_type == "code"]
    nowhere, fetch = cells[:2]
    assert nowhere.startswith('SOURCE = ""') and "\n" not in nowhere
    commands = []

    def run(command, **_):
        commands.append(command)
        if command[0] == "git":
            Path(command[-1]).symlink_to(ROOT)
        return subprocess.CompletedProcess(command, 0, "")

    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("PATH", "")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError, match="write into SOURCE where the code"):
        exec(f"{nowhere}\n{fetch}", {})
    for source, folder in (("https://host/ant-jax", "ant-jax"), (str(ROOT), str(ROOT))):
        monkeypatch.chdir(tmp_path)
        commands.clear()
        exec(fetch, {"SOURCE": source})
        assert Path.cwd() == ROOT
        git = [["git", "clone", "-q", "--depth", "1", source, folder]] * (folder == "ant-jax")
        *fetched, (*_, wanted, pin) = [each for each in commands if each[0] != "nvidia-smi"]
        assert fetched == git
        assert wanted.startswith(f"{tmp_path / folder}[experiments") and pin.startswith("jax==")
    # In a clone, and in its folder experiments, nothing is fetched or installed.
    for folder in (ROOT, ROOT / "experiments"):
        monkeypatch.chdir(folder)
        commands.clear()
        exec(f"{nowhere}\n{fetch}", {})
        assert Path.cwd() == ROOT and not commands
