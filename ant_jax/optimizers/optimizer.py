"""What an optimizer is, and what the trainer adds to each."""

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ant_jax.mtl.shards import global_sum
from ant_jax.optimizers.by_name import matching


class Optimizer(NamedTuple):
    """An optimizer, as the trainer needs it.

    Attributes:
      transformation: turns the combined gradient into an update of the parameters. The learning
        rate and the weight decay are part of it.
      entrywise: whether it treats every entry of the parameters alone, as AdamW does. Each of
        several devices then updates its own part of the parameters, which is flat, and holds the
        state of this part only. Otherwise each device updates all parameters.
      eval_params: ``(state, params) -> params``, the parameters to evaluate. The moving average
        follows them.
    """

    transformation: optax.GradientTransformation
    entrywise: bool = False
    eval_params: Callable[[Any, Any], Any] = lambda state, params: params


def clipped(optimizer: Optimizer, max_norm: float, axis_name: str | None = None) -> Optimizer:
    """Bounds the norm of the combined gradient.

    Args:
      optimizer: gets the clipped gradient.
      max_norm: the bound.
      axis_name: name of the mapped axis over which the gradients are split, if they are.
    """
    clip = _clip_by_global_norm(max_norm, axis_name)
    return optimizer._replace(
        transformation=optax.chain(clip, optimizer.transformation),
        eval_params=lambda state, params: optimizer.eval_params(state[1], params),
    )


def _clip_by_global_norm(max_norm, axis_name):
    """`optax.clip_by_global_norm` of gradients that are split over devices."""

    def update(updates, state, params=None):
        del params
        norm = jnp.sqrt(global_sum(optax.tree.norm(updates, squared=True), axis_name))
        clip = lambda leaf: jnp.where(norm < max_norm, leaf, leaf / norm * max_norm)
        return jax.tree.map(clip, updates), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def freezing(optimizer: Optimizer, pattern: str) -> Optimizer:
    """Leaves the parameters whose names match a pattern as they are; they need no state."""
    transforms: dict[Hashable, optax.GradientTransformation]
    transforms = {True: optax.set_to_zero(), False: optimizer.transformation}

    def eval_params(state, params):
        is_frozen = matching(params, pattern)
        inner = state.inner_states[False].inner_state
        # As `optax.partition` gives them to the optimizer.
        free = jax.tree.map(
            lambda leaf, stays: optax.MaskedNode() if stays else leaf, params, is_frozen
        )
        found = optimizer.eval_params(inner, free)
        return jax.tree.map(
            lambda leaf, stays, new: leaf if stays else new, params, is_frozen, found
        )

    return optimizer._replace(
        transformation=optax.partition(transforms, lambda params: matching(params, pattern)),
        eval_params=eval_params,
    )
