"""Losses, combined gradient and new state of a method, by the cheapest form of backward pass."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ant_jax.mtl.blocks import blocks
from ant_jax.mtl.combine import (
    CombineState,
    call_weigh,
    combine_parts,
    mark_nonfinite,
    weigh,
    where_finite,
)
from ant_jax.mtl.gramian import gramian
from ant_jax.mtl.shards import exchanged, gathered, global_sum, scattered_sum
from ant_jax.mtl.weighting import TaskStats, Weighting, refuse_rules

FORMS = ("vmap", "scan", "masked")


class Backward(NamedTuple):
    """What a backward pass has found; the same on all devices, but for parts of the gradient.

    Attributes:
      gradient: the combined gradient ``J^T w``, a pytree like the parameters, or this device's part
        of it.
      losses: (k,) float32, the task losses, 0 where a task is absent.
      counts: (k,) the examples of each task; 1 each where all tasks share all examples.
      state: the method's new state, with the weights and the Gram matrix that were used.
    """

    gradient: Any
    losses: jax.Array
    counts: jax.Array
    state: CombineState


def backward(
    losses_fn: Callable[[Any, Any], jax.Array],
    params: Any,
    batch: Any,
    weighting: Weighting,
    state: CombineState,
    *,
    tasks: jax.Array | None = None,
    levels: jax.Array | None = None,
    form: str = "masked",
    microbatches: int = 1,
    axis_name: str | None = None,
    parts: bool = False,
) -> Backward:
    """The gradient of k task losses, combined by a method.

    A method that needs no Gram matrix takes one backward pass: the pullback of its weights. A
    method that needs it takes the k gradients, which `combine` combines. If each example belongs to
    one task, these too cost about one backward pass by the forms "vmap" and "scan". If a loss or
    gradient is not finite, the result is not finite and the method's own state does not change.

    On n devices, "vmap" and "scan" compute on each device the gradients of its own tasks only, and
    move as many bytes as training without tasks if k divides n: see `mtl.blocks`.

    Args:
      losses_fn: ``(params, batch)`` to the loss of each example, (B,), or, where ``tasks`` is None,
        to the task losses, (k,), each a mean over the examples. They count as float32, whatever
        their type.
      params: pytree of parameters.
      batch: pytree with the examples on the leading axis of every leaf.
      weighting: the method.
      state: its state; `init_combine` makes the first one.
      tasks: (B,) int, the task of each example; a task's loss is the mean over its examples. None
        where all tasks share all examples.
      levels: (B,), the level of each example, for a method with `Weighting.levels`. The method sees
        the weighted losses; the result has the losses without these weights.
      form: how the k gradients are found. "masked" is the general form, k pullbacks of one forward
        pass, one after the other. "vmap" and "scan" take one backward pass for the examples of each
        task, in parallel or one after the other. They need equally many examples of each task, in
        the order of the tasks: example j of the batch of all devices is of task j k // B, and
        device d has its examples d B / n to (d + 1) B / n - 1. Otherwise the losses are NaN.
      microbatches: number of parts into which the batch is split; their gradients are added. A
        method whose weights depend on these losses, but on no Gram matrix, then runs the forward
        pass twice, because the weights must be known before the first pullback. ``weigh`` is
        called twice with one state. Without `jax.jit` every method that needs losses runs it twice.
      axis_name: name of a mapped axis over which the batch is split.
      parts: whether the gradient stays split over the devices: each gets the `mtl.shards` part of
        every leaf, (p,), for an optimizer that treats every entry alone.

    Raises:
      ValueError: for an unknown form, or one that does not fit the tasks, or a batch that can't be
        split, or if a method weighs examples by their level and there are no levels or no tasks.
    """
    k, needs_gram = weighting.k, "gram" in weighting.needs
    if not isinstance(state, CombineState):
        raise ValueError(
            f"state must be a CombineState, first init_combine(weighting), got {state!r}"
        )
    devices = 1 if axis_name is None else jax.lax.axis_size(axis_name)
    grouped = needs_gram and form != "masked"
    layout = blocks(k, devices)
    _check(batch, tasks, form, microbatches, layout.groups if grouped else 1)

    if weighting.blocks is not None:
        refuse_rules(weighting._replace(levels=None))
    of_level, scale = weighting.levels, None
    if of_level is not None:
        if levels is None or tasks is None:
            raise ValueError("a method that weighs examples by their level needs levels and tasks")
        scale = of_level.weights(state.weighting_state, levels)

    def example_losses(params, part):
        """The losses with the weights of their levels, and those without if they differ."""
        examples, scale = part
        losses = jnp.asarray(losses_fn(params, examples), jnp.float32)
        return (losses, None) if scale is None else (losses * scale, losses)

    if tasks is None:
        counts, factors = jnp.ones(k, jnp.float32), None
        parts_in_all = microbatches * devices

        def means(losses: jax.Array, tasks: Any) -> jax.Array:
            del tasks
            if losses.shape != (k,):
                raise ValueError(f"losses_fn must return k = {k} losses, got shape {losses.shape}")
            return losses / parts_in_all

    else:
        counts = global_sum(jax.nn.one_hot(tasks, k, dtype=jnp.float32).sum(0), axis_name)
        factors = jnp.where(counts > 0, 1 / jnp.maximum(counts, 1), 0)

        def means(losses: jax.Array, tasks: Any) -> jax.Array:
            mask = tasks[:, None] == jnp.arange(k)
            # Selected, not multiplied: one NaN shows in its own task alone.
            return jnp.where(mask, losses[:, None], 0).sum(0) * factors

    def task_losses(params, part):
        examples, tasks = part
        losses, each = example_losses(params, examples)
        return means(losses, tasks), each

    def learn(weighting_state, each):
        """The method's state after it has learned from the losses of the examples."""
        if of_level is None or levels is None:
            return weighting_state
        gradient = global_sum(of_level.gradient(weighting_state, levels, each), axis_name)
        gradient = jax.tree.map(lambda leaf: leaf / counts.sum(), gradient)
        return of_level.update(weighting_state, gradient)

    whole = ((batch, scale), tasks)
    if needs_gram:
        if grouped:
            losses, rows, each = _grouped_gradients(
                example_losses, params, whole, factors, form, microbatches, layout, axis_name
            )
        else:
            gradients = lambda part: _masked_gradients(task_losses, params, part, k)
            (losses, rows), each = _sum_over(gradients, _split(whole, microbatches), microbatches)
            if axis_name is not None:
                rows = jax.tree.map(lambda leaf: scattered_sum(leaf, axis_name), rows)
        losses = global_sum(losses, axis_name)

        def weigh_and_learn(stats, weighting_state):
            weights, weighting_state = weighting.weigh(stats, weighting_state)
            return weights, learn(weighting_state, each)

        gradient, state = combine_parts(
            weighting._replace(weigh=weigh_and_learn),
            rows,
            state,
            losses=losses,
            counts=counts,
            axis_name=axis_name,
        )
        if not parts:
            gradient = jax.tree.map(
                lambda part, leaf: gathered(part, leaf.shape, axis_name), gradient, params
            )
    else:
        losses, gradient, weights, weighting_state, each = _cotangent_gradient(
            task_losses,
            params,
            _split(whole, microbatches),
            microbatches,
            weighting,
            counts,
            state.weighting_state,
            axis_name,
        )
        if parts and axis_name is not None:
            gradient = jax.tree.map(lambda leaf: scattered_sum(leaf[None], axis_name)[0], gradient)
        else:
            gradient = global_sum(gradient, axis_name)
        weighting_state = where_finite(
            (losses, weights),
            gradient,
            learn(weighting_state, each),
            state.weighting_state,
            axis_name if parts else None,
        )
        state = CombineState(weighting_state, weights, None)
    if each is not None:
        losses = global_sum(means(each, tasks), axis_name)
    return Backward(gradient, losses, counts, state)


def backward_at_features(
    trunk: Callable[[Any, Any], Any],
    heads: Callable[[Any, Any, Any], jax.Array],
    params: Any,
    batch: Any,
    weighting: Weighting,
    state: CombineState,
    *,
    counts: jax.Array | None = None,
) -> Backward:
    r"""The combined gradient where tasks share a trunk, the Gram matrix taken at its features.

    Between the trunk and the heads the gradients of the k losses are small. The method sees their
    Gram matrix, :math:`G_{ij} = \langle \partial L_i / \partial z, \partial L_j / \partial z
    \rangle` over all examples and features z, and the trunk takes one pullback, that of
    :math:`\sum_i w_i\, \partial L_i / \partial z` (Sener and Koltun, *Multi-Task Learning as
    Multi-Objective Optimization*, NeurIPS 2018, section 3.3). The heads get the sum of their own
    losses' gradients, without weights, as in LibMTL with ``rep_grad=True``.

    Args:
      trunk: ``(params, batch) -> features``, a pytree.
      heads: ``(params, features, batch) -> (k,)``, the task losses; they count as float32.
      params: pytree of all parameters. One that both functions use gets the sum of both gradients.
      batch: what the functions take.
      weighting: the method.
      state: its state; `init_combine` makes the first one.
      counts: (k,) the examples of each task; None for one each. A task without examples counts as
        a task with loss 0 and gradient 0; both must be finite.
    """
    refuse_rules(weighting)
    k = weighting.k
    counts = jnp.ones(k, jnp.float32) if counts is None else counts
    features, trunk_pullback = jax.vjp(lambda p: trunk(p, batch), params)
    head_losses = lambda p, z: jnp.asarray(heads(p, z, batch), jnp.float32)
    losses, heads_pullback = jax.vjp(head_losses, params, features)
    losses = jnp.where(counts > 0, losses, 0)
    gram = None
    if "gram" in weighting.needs:
        gram = gramian(
            jax.lax.map(lambda row: heads_pullback(row)[1], jnp.eye(k, dtype=jnp.float32))
        )
    weights, weighting_state = weigh(
        weighting, TaskStats(losses, gram, counts), state.weighting_state
    )
    (of_trunk,) = trunk_pullback(heads_pullback(weights)[1])
    of_heads = heads_pullback((counts > 0).astype(jnp.float32))[0]
    gradient = jax.tree.map(jnp.add, of_trunk, of_heads)
    weighting_state = where_finite(
        (losses, weights, gram), gradient, weighting_state, state.weighting_state
    )
    return Backward(gradient, losses, counts, CombineState(weighting_state, weights, gram))


def _check(batch, tasks, form, microbatches, groups):
    if form not in FORMS:
        raise ValueError(f"form must be one of {FORMS}, got {form!r}")
    if tasks is None and form != "masked":
        raise ValueError(f"form = {form!r} groups the examples by task: give it tasks")
    if microbatches * groups == 1:
        return
    for leaf in jax.tree.leaves((batch, tasks)):
        if microbatches < 1 or leaf.shape[0] % (microbatches * groups):
            raise ValueError(
                f"a batch of {leaf.shape[0]} can't be split into {microbatches} microbatches"
                + (f" of {groups} groups of one task each" if groups > 1 else "")
            )


def _split(whole, microbatches):
    if microbatches == 1:
        return whole
    return jax.tree.map(lambda leaf: leaf.reshape(microbatches, -1, *leaf.shape[1:]), whole)


def _sum_over(fn, whole, microbatches):
    """Sums the first result of fn over the parts of a batch, one after the other.

    The leading axis of ``whole`` counts the parts. The second result of fn, an array with the
    examples in order or None, comes back for the whole batch.
    """
    if microbatches == 1:
        return fn(whole)
    first = jax.tree.map(lambda leaf: leaf[0], whole)
    nothing = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(fn, first)[0]
    )

    def add(total, part):
        found, each = fn(part)
        return jax.tree.map(jnp.add, total, found), each

    total, each = jax.lax.scan(add, nothing, whole)
    return total, each if each is None else each.reshape(-1, *each.shape[2:])


def _cotangent_gradient(
    task_losses, params, whole, microbatches, weighting, counts, state, axis_name
):
    """One backward pass a part: the gradient of this device is the pullback of the weights."""
    losses_of = lambda part: jax.vjp(lambda p: task_losses(p, part), params, has_aux=True)
    if microbatches == 1:
        local_losses, pullback, each = losses_of(whole)
        losses = global_sum(local_losses, axis_name)
        weights, state = weigh(weighting, TaskStats(losses, None, counts), state)
        (gradient,) = pullback(weights)
        return losses, gradient, weights, state, each

    losses = None
    if "losses" in weighting.needs:
        of_part = lambda part: task_losses(params, part)
        losses = global_sum(_sum_over(of_part, whole, microbatches)[0], axis_name)
    weights, _ = call_weigh(weighting, TaskStats(losses, None, counts), state)

    def losses_and_gradient(part):
        losses, pullback, each = losses_of(part)
        return (losses, pullback(weights)[0]), each

    (local_losses, gradient), each = _sum_over(losses_and_gradient, whole, microbatches)
    # The new state and the marks come from the losses of this pass, the same but for rounding. So
    # only the weights use the first one, and XLA removes it where they depend on the state alone.
    losses = global_sum(local_losses, axis_name)
    stats = TaskStats(losses, None, counts)
    _, state = call_weigh(weighting, stats, state)
    weights = mark_nonfinite(weights, stats)
    finite = jnp.isfinite(jnp.where(stats.present, weights, 0)).all()
    gradient = jax.tree.map(lambda leaf: jnp.where(finite, leaf, jnp.nan), gradient)
    return losses, gradient, weights, state, each


def _masked_gradients(task_losses, params, part, k):
    """The k gradients of one part by k pullbacks, whatever the sizes of its tasks."""
    losses, pullback, each = jax.vjp(lambda p: task_losses(p, part), params, has_aux=True)
    (stacked,) = jax.lax.map(pullback, jnp.eye(k, dtype=jnp.float32))
    return (losses, stacked), each


def _grouped_gradients(
    example_losses, params, whole, factors, form, microbatches, layout, axis_name
):
    """This device's part of the k gradients; each device computes those of its own tasks.

    Returns:
      The losses (k,) of this device's examples, a pytree with leaves (k, p), and the losses of the
      examples without the weights of their levels, if there are such weights.
    """
    k, (groups, slots, tasks) = factors.size, layout
    device = 0 if axis_name is None else jax.lax.axis_index(axis_name)
    expected = jnp.asarray(tasks)[device]
    rows = layout.first[:, None] + np.arange(slots)

    def by_group(leaf):
        leaf = leaf.reshape(groups, microbatches, -1, *leaf.shape[1:])
        # Where there is one part, grouping is a reshape and costs nothing.
        return leaf[:, 0] if microbatches == 1 else leaf.swapaxes(0, 1)

    def loss_and_gradient(group, factor):
        def loss(params):
            losses, each = example_losses(params, group)
            return jnp.sum(losses) * factor, each

        (value, each), gradient = jax.value_and_grad(loss, has_aux=True)(params)
        return (value, gradient), each

    def of_part(part):
        examples, found = part
        # The factor of a task, unless the examples are in another order.
        factor = jnp.where((found == expected[:, None]).all(), factors[expected], jnp.nan)
        if not layout.one_each:
            return _in_slots(loss_and_gradient, examples, factor, expected - expected[0], slots)
        if form == "scan":
            return jax.lax.map(lambda args: loss_and_gradient(*args), (examples, factor))
        return jax.vmap(loss_and_gradient)(examples, factor)

    (losses, stacked), each = _sum_over(of_part, jax.tree.map(by_group, whole), microbatches)
    if each is not None:
        # The leading axes are those of `by_group`.
        each = each.reshape(microbatches, groups, -1).swapaxes(0, 1).reshape(-1)
    if axis_name is None:
        return losses, stacked, each
    losses = jax.ops.segment_sum(losses, jnp.asarray(rows)[device], k)
    stacked = jax.tree.map(lambda leaf: exchanged(leaf, rows, k, axis_name), stacked)
    return losses, stacked, each


def _in_slots(loss_and_gradient, examples, factors, slot_of, slots):
    """Adds what several groups of one task find, one group after the other."""

    def add(total, group):
        slot, *arguments = group
        found, each = loss_and_gradient(*arguments)
        return jax.tree.map(lambda a, b: a.at[slot].add(b), total, found), each

    first = jax.tree.map(lambda leaf: leaf[0], (examples, factors))
    shapes, _ = jax.eval_shape(loss_and_gradient, *first)
    nothing = jax.tree.map(lambda leaf: jnp.zeros((slots, *leaf.shape), leaf.dtype), shapes)
    return jax.lax.scan(add, nothing, (slot_of, examples, factors))
