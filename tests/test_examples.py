"""The examples, as they are, and in as few lines as they promise."""

import importlib.util
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny_runs import use_small_model

from ant_jax.config import update
from configs import digits

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
TRAINING = "own_data", "own_method", "own_network"


def smaller(file):
    """A small network and small batches: the real ones take a minute where nothing is optimized."""
    config = digits.get_config(file.removeprefix("configs/digits.py:"))
    update(config, {"model.width": 8, "model.depth": 1, "model.heads": 1, "data.batch_size": 40})
    update(config, {"optimizer.warmup_steps": 5, "log_every": 10})
    update(config, {"log_to": (), "sample.every": 0})
    return config


def test_the_examples_are_short():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*TRAINING, "load_in_diffusers"}
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 40


def test_without_diffusers_its_example_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(SystemExit, match=r"^diffusers is not installed: pip install torch"):
        runpy.run_path(str(EXAMPLES / "load_in_diffusers.py"), run_name="__main__")


@pytest.mark.parametrize("name", TRAINING)
def test_an_example_trains(name, tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "read", smaller)
    # Eight devices of one machine would spend most of the time on the sums of a wide network.
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    if name != "own_network":
        use_small_model(monkeypatch)
    module.main(tmp_path, 40)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 40
    losses = [line["loss"] for line in lines]
    assert np.isfinite(losses).all() and losses[-1] < losses[0]


def test_examples_run_where_only_ant_jax_can_be_imported(tmp_path):
    """As scripts, from any folder, up to the first step: `python FILE` finds no other package."""
    (tmp_path / "ant_jax").symlink_to(ROOT / "ant_jax")
    (tmp_path / "here").mkdir()
    paths = [str(EXAMPLES / f"{name}.py") for name in TRAINING]
    code = (
        "import runpy\nfrom ant_jax import experiment, train\n"
        "def build(config, *_, **given):\n"
        "    raise SystemExit(f'{config.num_steps} {sorted(given)}')\n"
        "experiment.build = build\n"
        f"for path in {paths}:\n"
        "    try: runpy.run_path(path, run_name='__main__')\n"
        "    except SystemExit as reached: print(reached)\n"
    )
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=1"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "here",
        env=os.environ | {"PYTHONPATH": str(tmp_path), "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ["200 []", "200 ['weighting']", "200 ['model']"]
