"""Reads checkpoints of older versions, whose method state had another structure.

`NashState` counted the calls itself, and between renewals its weights followed from alpha too.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ant_jax.mtl.nash import NashState
from ant_jax.mtl.wrappers import EveryState
from ant_jax.train_step import TrainState


class _CountedNash(NamedTuple):
    alpha: Any
    count: Any


def older(template: TrainState) -> TrainState | None:
    """The template of an older checkpoint, from that of a new one; None if they are the same."""
    state = template.method_state.weighting_state
    nash = state.state if isinstance(state, EveryState) else state
    if not isinstance(nash, NashState):
        return None
    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=nash.alpha.sharding)
    return _with(template, _CountedNash(nash.alpha, count))


def newer(state: TrainState, template: TrainState) -> TrainState:
    """Converts a state of the `older` structure to the structure of the template."""
    alpha, count = state.method_state.weighting_state
    nash = NashState(alpha)
    if not isinstance(template.method_state.weighting_state, EveryState):
        return _with(state, nash)
    return _with(state, EveryState(nash, alpha / alpha.size, alpha > 0, count))


def _with(state, weighting_state):
    method_state = state.method_state._replace(weighting_state=weighting_state)
    return state._replace(method_state=method_state)
