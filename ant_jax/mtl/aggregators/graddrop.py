"""GradDrop: each entry keeps the gradients of one sign (Chen et al., 2020)."""

from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from optax.experimental import aggregating

from ant_jax.mtl.aggregators.parts import on_parts
from ant_jax.mtl.shards import part_start
from ant_jax.mtl.weighting import check_arguments
from ant_jax.settings import Number


class GradDropState(NamedTuple):
    """Number of calls, int32."""

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]


def entry_draws(key: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """Uniform draws in [0, 1) of the entries start, start + 1, ..., each a function of its index.

    Devices that draw for parts of a leaf so get the numbers of one device that draws for all of it.
    """
    # The key of an index is a hash of both already: its bits are random.
    word = lambda index: jax.random.key_data(jax.random.fold_in(key, index))[0]
    words = jax.vmap(word)(start + jnp.arange(size, dtype=jnp.uint32))
    return (words >> 9).astype(jnp.float32) / 2**23


def graddrop(
    k: int,
    seed: int | jax.Array = 0,
    leak: Annotated[float, Number(0, 1)] = 0.0,
    axis_name: str | None = None,
) -> aggregating.Aggregator:
    r"""Gradient sign dropout.

    :math:`\frac1k \sum_i (\ell + (1 - \ell) m_{ip}) g_{ip}` is entry p of the update. For each
    entry, :math:`m_{ip}` keeps either the gradients that are positive, with probability
    :math:`P_p = \frac12 (1 + \sum_i g_{ip} / \sum_i |g_{ip}|)`, or those that are negative (Chen et
    al., *Just Pick a Sign: Optimizing Deep Multitask Models with Gradient Sign Dropout*, NeurIPS
    2020, algorithm 1). The expectation of the update is the mean gradient. k counts the tasks that
    are present.

    Use it where tasks conflict entry by entry and noise in the update does no harm.

    The paper adds the gradients, and drops them at the activations that the tasks share. Here they
    are averaged, and dropped at the parameters, as in TorchJD.

    The draws depend on the seed, the call, the leaf and the index of the entry in it, so they are
    the same on any number of devices. Microbatches must be added before.

    Example::

      tx = optax.chain(mtl.graddrop(5), optax.adam(1e-3))

    Args:
      k: number of tasks.
      seed: seed of the draws; may be traced.
      leak: share of every gradient that is never dropped, :math:`\ell`.
      axis_name: name of a mapped axis, as for `combine`.

    Returns:
      An `Aggregator` of gradients with leaves (k, *param_shape); its state counts the calls.

    Raises:
      ValueError: if k < 1, or a setting is out of its range; from update, if a leaf's leading
        axis is not k.
    """
    check_arguments(graddrop, k, leak=leak)

    def aggregate(parts, present, state):
        call = jax.random.fold_in(jax.random.key(seed), state.count)
        leaves, treedef = jax.tree.flatten(parts)

        def picked(number, g):
            size = g.shape[1]
            draws = entry_draws(jax.random.fold_in(call, number), part_start(size, axis_name), size)
            # Scaled, so that no sum of finite numbers overflows.
            largest = jnp.abs(g).max(0)
            unit = g / jnp.where(largest > 0, largest, 1)
            absolute = jnp.abs(unit).sum(0)
            # draws < P without a division by 0, and never so where no gradient is positive.
            positive = draws * 2 * absolute < absolute + unit.sum(0)
            kept = (g > 0) == positive
            total = jnp.where(kept, g, leak * g).sum(0)
            # What is not finite would be dropped.
            finite = jnp.isfinite(g).all(0)
            return jnp.where(finite, total / jnp.maximum(present.sum(), 1), jnp.nan)

        update = treedef.unflatten([picked(*leaf) for leaf in enumerate(leaves)])
        return update, GradDropState(state.count + 1)

    init = lambda params: GradDropState(jnp.zeros((), jnp.int32))
    return on_parts(k, axis_name, init, aggregate)
