"""The optax transformation that turns k stacked gradients into one update."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from optax.experimental import aggregating

from ant_jax.mtl.gramian import gramian
from ant_jax.mtl.weighting import State, Weighting


class CombineState(NamedTuple):
    """State of `combine`, and the one home of a method's state.

    Attributes:
      weighting_state: the method's own state, unchanged by an update that is not finite.
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

    A loss or gradient that is not finite makes the update not finite, whatever the method, so that
    what comes after can notice. The method's own state then is that of before; ``weights`` and
    ``gram`` show what was found, NaN for a cluster whose loss is not finite.

    Wrappers that keep gradients, such as `optax.MultiSteps` and `optax.apply_if_finite`, go around
    the optimizer inside the chain, not around `combine`, whose input has another shape than its
    output.

    On n devices the k stacked gradients are never all on one device: each gets the sum over devices
    of its n-th of them (a reduce-scatter), the Gram matrices of the parts are added up (k, k), the
    parts are combined where they are, and the one gradient that remains is gathered. That moves
    k + 1 times the bytes of one gradient, where summing all k everywhere moves 2 k times those, and
    training without clusters 2 times. Methods that need no Gram matrix combine first and sum one
    gradient.

    Args:
      weighting: the method.
      axis_name: name of a mapped axis. If given, the updates are this device's contributions and
        are summed over the axis; ``losses`` and ``present`` must be global already. The update and
        the state are the same on all devices.

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
        shapes = jax.tree.map(lambda leaf: leaf.shape[1:], updates)
        gram = None
        if weighting.needs_gram:
            if axis_name is not None:
                updates = jax.tree.map(lambda leaf: _scattered_sum(leaf, axis_name), updates)
            gram = gramian(updates)
            if axis_name is not None:
                gram = jax.lax.psum(gram, axis_name)
        weights, weighting_state = weigh(weighting, losses, gram, present, state.weighting_state)
        update = jax.tree.map(lambda leaf: _weighted_sum(weights, leaf), updates)
        if axis_name is not None:
            if weighting.needs_gram:
                gather = lambda part, shape: _gathered(part, shape, axis_name)
                update = jax.tree.map(gather, update, shapes)
            else:
                update = jax.lax.psum(update, axis_name)
        weighting_state = where_finite(
            (weights, gram, update), weighting_state, state.weighting_state
        )
        return update, CombineState(weighting_state, weights, gram)

    return aggregating.Aggregator(init, update)


def weigh(
    weighting: Weighting,
    losses: jax.Array | None,
    gram: jax.Array | None,
    present: jax.Array,
    state: State,
) -> tuple[jax.Array, State]:
    """What the method's ``weigh`` returns, the weights NaN where a loss is not finite.

    A weight may be finite where its loss is not, and so may the gradient: the update would not show
    it.
    """
    weights, state = weighting.weigh(losses, gram, present, state)
    if losses is not None:
        weights = jnp.where(present & ~jnp.isfinite(losses), jnp.nan, weights)
    return weights, state


def where_finite(numbers: Any, after: State, before: State) -> State:
    """The state ``after``, or that of ``before`` unless all numbers of a pytree are finite."""
    finite = jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(numbers)]).all()
    return jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, before)


def _scattered_sum(leaf, axis_name):
    """(k, *shape) on each device to its part, (k, p), of the sum over devices; zeros at the end."""
    flat = leaf.reshape(leaf.shape[0], -1)
    padding = -flat.shape[1] % jax.lax.axis_size(axis_name)
    flat = jnp.pad(flat, ((0, 0), (0, padding)))
    return jax.lax.psum_scatter(flat, axis_name, scatter_dimension=1, tiled=True)


def _gathered(part, shape, axis_name):
    """The parts (p,) of all devices as an array of a shape."""
    whole = jax.lax.all_gather(part, axis_name, tiled=True)
    return whole[: math.prod(shape)].reshape(shape)


def _weighted_sum(weights, leaf):
    total = jnp.einsum("k,k...->...", weights, leaf.astype(jnp.float32), precision="highest")
    return total.astype(leaf.dtype)
