"""Aggregators that see the k gradients entry by entry, on one device or on the parts of n."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.experimental import aggregating

from ant_jax.mtl.combine import check_rows, check_vectors, present_rows, where_finite
from ant_jax.mtl.shards import gathered, part_size, scattered_sum
from ant_jax.mtl.weighting import State


def on_parts(
    k: int,
    axis_name: str | None,
    init: optax.TransformInitFn,
    aggregate: Callable[[Any, jax.Array, State], tuple[Any, State]],
) -> aggregating.Aggregator:
    """An `Aggregator` from a rule for this device's part of the entries.

    Args:
      k: number of tasks.
      axis_name: name of a mapped axis, as for `combine`.
      init: ``params -> state``.
      aggregate: ``(parts, present, state) -> (update, state)``. The parts are a pytree like the
        parameters with leaves (k, p), float32, 0 for absent tasks; ``present`` is (k,) bool; the
        leaves of the update are (p,). What is not finite must not become finite.
    """

    def update(updates, state, params=None, *, losses=None, counts=None, **extra_args):
        del params, extra_args
        check_rows(updates, k)
        check_vectors(k, losses=losses, counts=counts)
        present = (jnp.ones(k) if counts is None else counts) > 0

        def rows(leaf):
            return present_rows(scattered_sum(leaf, axis_name).astype(jnp.float32), present)

        found, after = aggregate(jax.tree.map(rows, updates), present, state)
        if losses is not None:
            hidden = jnp.any(present & ~jnp.isfinite(losses))
            found = jax.tree.map(lambda part: jnp.where(hidden, jnp.nan, part), found)
        found = jax.tree.map(
            lambda part, leaf: gathered(part.astype(leaf.dtype), leaf.shape[1:], axis_name),
            found,
            updates,
        )
        return found, where_finite((), found, after, state)

    return aggregating.Aggregator(init, update)


def zero_parts(params: Any, k: int, axis_name: str | None) -> Any:
    """This device's part of k gradients that are 0, float32: leaves (k, p)."""
    zeros = lambda leaf: jnp.zeros((k, part_size(jnp.size(leaf), axis_name)), jnp.float32)
    return jax.tree.map(zeros, params)
