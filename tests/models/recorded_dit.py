"""What is recorded of tiny networks of other codes in tests/data/dit, and such networks here."""

import functools
import importlib.util
from pathlib import Path

import jax
import numpy as np

from ant_jax.models.dit import DiT

RECORDED = Path(__file__).parents[1] / "data" / "dit"
_spec = importlib.util.spec_from_file_location("record_dit", RECORDED / "record.py")
record = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(record)

# Of diffusers' network; the networks of SiT and DTR have the same.
SETTINGS = record.SETTINGS
MODEL = DiT(width=16, depth=2, heads=2, patch=2, channels=3, num_classes=5, learned_variance=True)
# The same settings, and what the code of SiT and of DTR has in addition.
SIT = MODEL.clone(learned_variance=False, level_scale=1.0)
DTR = MODEL.clone(routing=0.8)


@functools.cache
def recording(code="dit"):
    with np.load(RECORDED / f"{code}.npz") as stored:
        return dict(stored)


def recorded_state(code):
    """The weights of a network of the code of SiT or of DTR, in the order of its state dict."""
    names, shapes = recording(code)["names"], recording(code)["shapes"]
    state = {
        str(name): record.weight(str(name), tuple(map(int, str(shape).split())))
        for name, shape in zip(names, shapes, strict=True)
    }
    constants = {name: value for name, value in recording(code).items() if "constant" in name}
    return state | {name.removeprefix("constant "): value for name, value in constants.items()}


def diffusers_state():
    """The weights of the recording by diffusers' names."""
    names, shapes = recording()["names"], recording()["shapes"]
    return {
        str(name): record.weight(str(name), tuple(map(int, str(shape).split())))
        for name, shape in zip(names, shapes, strict=True)
    }


@functools.cache
def template(model=MODEL):
    inputs = [np.zeros((1, 8, 8, model.channels)), np.zeros(1)]
    inputs += [np.zeros(1, int)] if model.num_classes else []
    return jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
