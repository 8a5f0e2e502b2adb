"""The optax transformation that turns k stacked gradients into one update."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from optax.experimental import aggregating

from ant_jax.mtl.gramian import gramian
from ant_jax.mtl.weighting import State, Weighting


class CombineState(NamedTuple):
    """State of `combine`, and the one home of a method's state.

    Attributes:
      weighting_state: the method's own state.
      weights: (k,) float32, the weights used last; zeros before the first update.
      gram: (k, k) float32, the Gram matrix used last; None for methods that need none.
    """

    weighting_state: State
    weights: jax.Array
    gram: jax.Array | None


def init_combine(weighting: Weighting) -> CombineState:
    """The `CombineState` before the first update."""
    k = weighting.k
    gram = jnp.zeros((k, k), jnp.float32) if weighting.needs_gram else None
    return CombineState(weighting.init(), jnp.zeros(k, jnp.float32), gram)


def combine(weighting: Weighting, axis_name: str | None = None) -> aggregating.Aggregator:
    """Combines k stacked gradients into one update ``J^T w`` by a weighting.

    Use it in front of any optimizer::

      tx = optax.chain(mtl.combine(mtl.nash(5)), optax.adamw(1e-4))
      updates, state = tx.update(stacked_grads, state, params, losses=losses)

    Wrappers that keep gradients, such as `optax.MultiSteps` and `optax.apply_if_finite`, go around
    the optimizer inside the chain, not around `combine`, whose input has another shape than its
    output.

    Args:
      weighting: the method.
      axis_name: name of a mapped axis. If given, the updates are this device's contributions and
        are summed over the axis first; ``losses`` and ``present`` must be global already. The
        update and the state are the same on all devices.

    Returns:
      An `optax.experimental.aggregating.Aggregator`. Its update takes a pytree with leaves
      (k, *param_shape), and the extra arguments ``losses`` (k,) and ``present`` (k,) bool (None:
      all are present), and returns a pytree with leaves (*param_shape) and a `CombineState`.

    Raises:
      ValueError: from update, if the method needs losses and none came, or if a leaf's leading axis
        is not k.
    """
    k = weighting.k

    def init(params):
        del params
        return init_combine(weighting)

    def update(updates, state, params=None, *, losses=None, present=None, **extra_args):
        del params, extra_args
        if weighting.needs_losses and losses is None:
            raise ValueError("this weighting needs the cluster losses: update(..., losses=losses)")
        for path, leaf in jax.tree_util.tree_leaves_with_path(updates):
            if leaf.ndim < 1 or leaf.shape[0] != k:
                name = jax.tree_util.keystr(path)
                raise ValueError(
                    f"leaf {name} of shape {leaf.shape} has no leading axis of k = {k}"
                )
        if present is None:
            present = jnp.ones(k, bool)
        if axis_name is not None:
            updates = jax.lax.psum(updates, axis_name)
        gram = gramian(updates) if weighting.needs_gram else None
        weights, weighting_state = weighting.weigh(losses, gram, present, state.weighting_state)
        update = jax.tree.map(lambda leaf: _weighted_sum(weights, leaf), updates)
        return update, CombineState(weighting_state, weights, gram)

    return aggregating.Aggregator(init, update)


def _weighted_sum(weights, leaf):
    total = jnp.einsum("k,k...->...", weights, leaf.astype(jnp.float32), precision="highest")
    return total.astype(leaf.dtype)
