"""The examples, as they are, and in as few lines as they promise."""

import importlib.util
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from ant_jax.config import update
from configs import digits

EXAMPLES = Path(__file__).parents[1] / "examples"


def smaller(argument):
    """A small network and small batches: the real ones take a minute where nothing is optimized."""
    config = digits.get_config(argument)
    update(config, {"model.width": 8, "model.depth": 1, "model.heads": 1, "data.batch_size": 40})
    update(config, {"optimizer.warmup_steps": 5, "log_every": 10})
    update(config, {"tensorboard": False, "sample.every": 0})
    return config


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_an_example_trains(name, tmp_path, monkeypatch):
    path = EXAMPLES / f"{name}.py"
    assert len(path.read_text().splitlines()) <= 40
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "get_config", smaller)
    # Eight devices of one machine would spend most of the time on the sums of a wide network.
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    module.main(tmp_path, 40)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 40
    losses = [line["loss"] for line in lines]
    assert np.isfinite(losses).all() and losses[-1] < losses[0]
