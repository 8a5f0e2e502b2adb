"""The optax transformation that turns k stacked gradients into one update."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.experimental import aggregating

from ant_jax.mtl.gramian import gramian
from ant_jax.mtl.shards import all_finite, gathered, global_sum, scattered_sum
from ant_jax.mtl.weighting import (
    State,
    TaskStats,
    Weighting,
    check_needs,
    check_result,
    refuse_rules,
)
from ant_jax.platforms import platform


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
    """The `CombineState` before the first update; a ValueError if its ``needs`` are unknown."""
    check_needs(weighting)
    k = weighting.k
    gram = jnp.zeros((k, k), jnp.float32) if "gram" in weighting.needs else None
    return CombineState(weighting.init(), jnp.zeros(k, jnp.float32), gram)


def combine(
    weighting: Weighting, axis_name: str | None = None, shared: Any = None
) -> aggregating.Aggregator:
    """Combines k stacked gradients into one update ``J^T w`` by a weighting.

    Use it in front of any optimizer::

      tx = optax.chain(mtl.combine(mtl.nash(5)), optax.adamw(1e-4))
      updates, state = tx.update(stacked_grads, state, params, losses=losses)

    If a loss or gradient is not finite, the update is not finite, whatever the method, so later
    code can detect it. The method's own state then does not change; ``weights`` and ``gram`` show
    what was computed, NaN for a task whose loss is not finite. For the state, an update whose
    squared norm is too large for float32 counts as not finite.

    Wrappers that keep gradients, such as `optax.MultiSteps` and `optax.apply_if_finite`, go around
    the optimizer inside the chain, not around `combine`, whose input has another shape than its
    output.

    On n devices no device holds all k stacked gradients. Each device gets the summed values of its
    own 1/n of the entries (a reduce-scatter). The Gram matrices of the parts are summed, (k, k),
    each device combines its part, and the one gradient that remains is gathered. That moves
    k + 1 times the bytes of one gradient, where summing all k everywhere moves 2 k times those, and
    training without tasks 2 times. Methods that need no Gram matrix combine first and sum one
    gradient.

    Args:
      weighting: the method.
      axis_name: name of a mapped axis. If given, the updates are this device's contributions and
        are summed over the axis; ``losses`` and ``counts`` must be global already. The update and
        the state are the same on all devices.
      shared: which parameters the tasks share: a pytree of bools with the structure of the
        parameters or the upper part of it, such as ``{"trunk": True, "heads": False}``; None for
        all. The method sees the Gram matrix of these alone. The others, such as task heads, get the
        sum of the gradients of the tasks that are present, without weights.

    Returns:
      An `optax.experimental.aggregating.Aggregator`. Its update takes a pytree with leaves
      (k, *param_shape), and the extra arguments ``losses`` (k,) and ``counts`` (k,), the examples
      of each task (None: one each), and returns a pytree with leaves (*param_shape), of the types
      of the gradients, and a `CombineState`. Losses and counts count as float32.

    Raises:
      ValueError: from update, if the method needs losses and none came, if a leaf's leading axis is
        not k, if losses or counts are not (k,), or if ``shared`` does not fit the updates or shares
        nothing.
    """
    refuse_rules(weighting)
    k = weighting.k

    def init(params) -> Any:
        del params
        return init_combine(weighting)

    def update(
        updates, state, params=None, *, losses=None, counts=None, **extra_args
    ) -> tuple[Any, Any]:
        del params, extra_args
        if "losses" in weighting.needs and losses is None:
            raise ValueError("this weighting needs the task losses: update(..., losses=losses)")
        check_rows(updates, k)
        check_vectors(k, losses=losses, counts=counts)
        counts = jnp.ones(k, jnp.float32) if counts is None else counts
        leaves, treedef = jax.tree.flatten(updates)
        is_shared = _shared_leaves(shared, updates)
        shapes = [leaf.shape[1:] for leaf in leaves]
        gram = None
        if "gram" in weighting.needs:
            if axis_name is not None:
                leaves = [
                    scattered_sum(leaf, axis_name) if mine else leaf
                    for leaf, mine in zip(leaves, is_shared, strict=True)
                ]
            gram = gramian([leaf for leaf, mine in zip(leaves, is_shared, strict=True) if mine])
            gram = global_sum(gram, axis_name)
        stats = TaskStats(losses, gram, counts)
        weights, weighting_state = weigh(weighting, stats, state.weighting_state)

        def combined(leaf, mine, shape):
            if not mine:
                leaf = weighted_sum(jnp.ones(k, jnp.float32), present_rows(leaf, stats.present))
            else:
                leaf = weighted_sum(weights, leaf)
            if mine and gram is not None:
                return gathered(leaf, shape, axis_name)
            return global_sum(leaf, axis_name)

        update = treedef.unflatten(map(combined, leaves, is_shared, shapes))
        weighting_state = where_finite(
            (weights, gram), update, weighting_state, state.weighting_state
        )
        return update, CombineState(weighting_state, weights, gram)

    return aggregating.Aggregator(init, update)


def combine_parts(
    weighting: Weighting,
    parts: Any,
    state: CombineState,
    *,
    losses: jax.Array | None,
    counts: jax.Array,
    axis_name: str | None = None,
) -> tuple[Any, CombineState]:
    """Combines k gradients that are split over devices; the update stays split.

    Args:
      weighting: the method.
      parts: pytree with leaves (k, p), this device's part of the gradients; see `mtl.shards`.
      state: of `combine`.
      losses: (k,), global; None if the method needs none.
      counts: (k,), global.
      axis_name: name of the mapped axis; None for one device, which has leaves (k, *param_shape).

    Returns:
      This device's part of ``J^T w``, and the new state, the same on all devices.
    """
    gram = None
    if "gram" in weighting.needs:
        gram = global_sum(gramian(parts), axis_name)
    weights, weighting_state = weigh(
        weighting, TaskStats(losses, gram, counts), state.weighting_state
    )
    update = jax.tree.map(lambda leaf: weighted_sum(weights, leaf), parts)
    weighting_state = where_finite(
        (weights, gram), update, weighting_state, state.weighting_state, axis_name
    )
    return update, CombineState(weighting_state, weights, gram)


def check_rows(updates: Any, k: int) -> None:
    """Raises a ValueError unless every leaf has a leading axis of k."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(updates):
        if leaf.ndim < 1 or leaf.shape[0] != k:
            name = jax.tree_util.keystr(path) or "updates"
            raise ValueError(f"leaf {name} of shape {leaf.shape} has no leading axis of k = {k}")


def check_vectors(k: int, **vectors: jax.Array | None) -> None:
    """Raises a ValueError unless each vector is (k,) or None."""
    for name, vector in vectors.items():
        if vector is not None and jnp.shape(vector) != (k,):
            raise ValueError(f"{name} must have shape ({k},), got {jnp.shape(vector)}")


def present_rows(leaf: jax.Array, present: jax.Array) -> jax.Array:
    """(k, ...) with 0 for absent tasks. Their gradients are not read: they may be anything."""
    return jnp.where(present.reshape(-1, *[1] * (leaf.ndim - 1)), leaf, 0)


def weighted_sum(weights: jax.Array, leaf: jax.Array) -> jax.Array:
    """``J^T w`` of a leaf (k, ...), summed in float32."""
    rows = leaf.astype(jnp.float32)
    if platform() == "gpu":
        # Term by term: a product is slow there if the leaf is joined from several gradients.
        total = jnp.asarray(sum(weights[i] * rows[i] for i in range(len(rows))))
    else:
        total = jnp.einsum("k,k...->...", weights, rows, precision="highest")
    return total.astype(leaf.dtype)


def weigh(weighting: Weighting, stats: TaskStats, state: State) -> tuple[jax.Array, State]:
    """Calls the method's ``weigh``, in float32, and marks the losses that are not finite.

    Raises:
      WeighError: if it does not return weights (k,) and a state.
    """
    stats = jax.tree.map(lambda each: jnp.asarray(each, jnp.float32), stats)
    weights, state = call_weigh(weighting, stats, state)
    return mark_nonfinite(weights, stats), state


def mark_nonfinite(weights: jax.Array, stats: TaskStats) -> jax.Array:
    """The weights, NaN for a loss that is not finite.

    Otherwise the weight and the gradient could still be finite, and the update would hide the loss.
    """
    if stats.losses is None:
        return weights
    return jnp.where(stats.present & ~jnp.isfinite(stats.losses), jnp.nan, weights)


def call_weigh(weighting: Weighting, stats: TaskStats, state: State) -> tuple[jax.Array, State]:
    """Calls the method's ``weigh`` with what it needs; the weights become float32.

    Raises:
      WeighError: if it does not return weights (k,) and a state.
    """
    seen = {name: getattr(stats, name) for name in weighting.needs}
    try:
        result = weighting.weigh(TaskStats(None, None, stats.counts)._replace(**seen), state)
    except (AttributeError, TypeError) as error:
        hidden = " and ".join(sorted({"losses", "gram"} - weighting.needs))
        if hidden:
            error.add_note(f"the method sees no {hidden}: Weighting.needs lists what it reads")
        raise
    check_result(weighting, result)
    weights, state = result
    return jnp.asarray(weights, jnp.float32), state


def where_finite(
    numbers: Any, gradient: Any, after: State, before: State, axis_name: str | None = None
) -> State:
    """The new state of a method, or the old one if the new one comes from what is not finite.

    Args:
      numbers: pytree of small arrays.
      gradient: pytree. It counts as not finite also if its squared norm is too large for float32.
        A train step takes this norm anyway, and so reads the gradient only once.
      after: the state from these numbers.
      before: the state before them.
      axis_name: name of the mapped axis of devices, if they have different numbers.

    Returns:
      ``after``, or ``before`` unless all numbers and the gradient's norm are finite, on all
      devices.
    """
    squared = optax.tree.norm(optax.tree.cast(gradient, jnp.float32), squared=True)
    finite = all_finite((numbers, squared), axis_name)
    return jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, before)


def _shared_leaves(shared, updates):
    """Whether each leaf of the updates is shared by the tasks."""
    if shared is None:
        return [True] * len(jax.tree.leaves(updates))
    try:
        leaves = jax.tree.leaves(jax.tree.broadcast(shared, updates))
    except ValueError as error:
        raise ValueError(
            "shared must be a pytree of bools with the structure of the parameters or the upper "
            "part of it; the error above says where they differ"
        ) from error
    if not any(leaves):
        raise ValueError("shared = False for all parameters: the method has no gradients to weigh")
    return leaves
