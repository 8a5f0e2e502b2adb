import importlib.machinery
import importlib.util
import json
import logging
import sys
import types

import numpy as np
import pytest

from ant_jax.runtime import boards, extras, logs

PICTURE = np.zeros((4, 4, 3), np.uint8)


def write(folder, names):
    """Writes two lines and a picture as training does."""
    writer = logs.MetricWriter(folder, 0, boards.opened(names, folder, "0123", {"seed": 3}))
    writer.scalars(1, {"loss": 0.5, "cluster_losses": [0.25, None]})
    writer.scalars(2, {"loss": 0.75, "cluster_losses": [0.5, 1.0]})
    writer.image(2, "samples", PICTURE)
    writer.close()
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_without_tensorflow_the_file_is_written_alone(tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "tensorflow" else find_spec(name)
    )
    assert [row["loss"] for row in write(tmp_path, ["tensorboard"])] == [0.5, 0.75]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_tensorboard_gets_scalars_and_images(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    write(tmp_path, ["tensorboard"])
    events = EventAccumulator(str(tmp_path), {"tensors": 0}).Reload()
    found = {
        tag: [
            (event.step, make_ndarray(event.tensor_proto).item()) for event in events.Tensors(tag)
        ]
        for tag in events.Tags()["tensors"]
        if tag != "samples"
    }
    assert found == {
        "loss": [(1, 0.5), (2, 0.75)],
        "cluster_losses/0": [(1, 0.25), (2, 0.5)],
        "cluster_losses/1": [(2, 1.0)],
    }
    assert [event.step for event in events.Tensors("samples")] == [2]


def test_a_failing_tensorboard_is_a_warning(tmp_path, monkeypatch, caplog):
    def fail(workdir):
        raise OSError("no more files")

    monkeypatch.setattr(boards, "_tensorboard", fail)
    with caplog.at_level(logging.WARNING):
        rows = write(tmp_path, ["tensorboard"])
    assert caplog.text.count("TensorBoard is off: no more files") == 1
    assert [row["step"] for row in rows] == [1, 2]


@pytest.fixture
def wandb(monkeypatch):
    """A module that records its calls."""
    calls = []

    class Run:
        def __getattr__(self, name):
            return lambda *args, **named: calls.append((name, *args, named))

    module = types.ModuleType("wandb")
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    module.Image = lambda image: ("picture", image.shape)
    module.init = lambda **named: calls.append(("init", named)) or Run()
    module.calls = calls
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return module


def test_weights_and_biases_gets_settings_scalars_and_images(tmp_path, wandb):
    boards.check(["wandb"])
    write(tmp_path, ["wandb"])
    (first, named), define, *logged, finish = wandb.calls
    assert first == "init" and named["id"] == "0123" and named["resume"] == "allow"
    assert named["project"] == "ant-jax" and named["name"] == tmp_path.name
    assert named["config"] == {"seed": 3} and named["dir"] == str(tmp_path)
    assert define == ("define_metric", "*", {"step_metric": "step"})
    assert logged == [
        ("log", {"step": 1, "loss": 0.5, "cluster_losses/0": 0.25}, {}),
        ("log", {"step": 2, "loss": 0.75, "cluster_losses/0": 0.5, "cluster_losses/1": 1.0}, {}),
        ("log", {"step": 2, "samples": [("picture", (4, 4, 3))]}, {}),
    ]
    assert finish == ("finish", {})


def test_weights_and_biases_that_can_t_be_used_is_named(tmp_path, wandb, monkeypatch):
    def fail(**named):
        raise RuntimeError("no key")

    wandb.init = fail
    with pytest.raises(ConnectionError, match=r"does not start \(no key\): WANDB_MODE=offline"):
        write(tmp_path, ["wandb"])
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(extras.MissingExtraError, match=r"pip install -e '.*\[wandb\]'"):
        boards.check(["tensorboard", "wandb"])
    boards.check(["tensorboard"])
