"""Losses, combined gradient and new state of a method, by the cheapest form of backward pass."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ant_jax.mtl.combine import CombineState, combine, weigh, where_finite
from ant_jax.mtl.gramian import gramian
from ant_jax.mtl.weighting import TaskStats, Weighting

FORMS = ("vmap", "scan", "masked")


class Backward(NamedTuple):
    """What a backward pass has found; the same on all devices.

    Attributes:
      gradient: the combined gradient ``J^T w``, a pytree like the parameters.
      losses: (k,) the task losses, 0 where a task is absent.
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
    form: str = "masked",
    microbatches: int = 1,
    axis_name: str | None = None,
) -> Backward:
    """The gradient of k task losses, combined by a method.

    A method that needs no Gram matrix takes one backward pass: the pullback of its weights. A
    method that needs it takes the k gradients, which `combine` combines. If each example belongs to
    one task, these too cost about one backward pass by the forms "vmap" and "scan". If a loss or
    gradient is not finite, the result is not finite and the method's own state does not change.

    Args:
      losses_fn: ``(params, batch)`` to the loss of each example, (B,), or, where ``tasks`` is None,
        to the task losses, (k,), each a mean over the examples.
      params: pytree of parameters.
      batch: pytree with the examples on the leading axis of every leaf.
      weighting: the method.
      state: its state; `init_combine` makes the first one.
      tasks: (B,) int, the task of each example; a task's loss is the mean over its examples. None
        where all tasks share all examples.
      form: how the k gradients are found. "masked" is the general form, k pullbacks of one forward
        pass, one after the other. "vmap" and "scan" take one backward pass for the examples of each
        task, in parallel or one after the other. They need tasks that take turns: on each device
        example j is of task j mod k. Otherwise the losses are NaN.
      microbatches: number of parts into which the batch is split; their gradients are added. A
        method that needs losses but no Gram matrix then runs the forward pass twice, because its
        weights must be known before the first pullback.
      axis_name: name of a mapped axis over which the batch is split.

    Raises:
      ValueError: for an unknown form, or one that does not fit the tasks, or a batch that can't be
        split.
    """
    k, needs_gram = weighting.k, "gram" in weighting.needs
    if not isinstance(state, CombineState):
        raise ValueError(
            f"state must be a CombineState, first init_combine(weighting), got {state!r}"
        )
    _check(k, batch, tasks, form, microbatches, needs_gram)

    def global_sum(tree):
        return tree if axis_name is None else jax.lax.psum(tree, axis_name)

    if tasks is None:
        counts = jnp.ones(k)
        parts_in_all = microbatches * (1 if axis_name is None else jax.lax.axis_size(axis_name))

        def task_losses(params, part):
            losses = losses_fn(params, part[0])
            if losses.shape != (k,):
                raise ValueError(f"losses_fn must return k = {k} losses, got shape {losses.shape}")
            return losses / parts_in_all

    else:
        counts = global_sum(jax.nn.one_hot(tasks, k).sum(0))
        factors = jnp.where(counts > 0, 1 / jnp.maximum(counts, 1), 0)

        def task_losses(params, part):
            examples, tasks = part
            mask = tasks[:, None] == jnp.arange(k)
            # Selected, not multiplied: one NaN shows in its own task alone.
            return jnp.where(mask, losses_fn(params, examples)[:, None], 0).sum(0) * factors

    whole = (batch, tasks)
    if needs_gram:
        if form == "masked":
            gradients = lambda part: _masked_gradients(task_losses, params, part, k)
        else:
            gradients = lambda part: _grouped_gradients(losses_fn, params, part, factors, form)
        losses, stacked = _sum_over(gradients, whole, microbatches)
        losses = global_sum(losses)
        gradient, state = combine(weighting, axis_name).update(
            stacked, state, losses=losses, counts=counts
        )
        return Backward(gradient, losses, counts, state)

    find_weights = lambda losses: weigh(
        weighting, TaskStats(losses, None, counts), state.weighting_state
    )
    losses, gradient, weights, weighting_state = _cotangent_gradient(
        task_losses,
        params,
        whole,
        microbatches,
        find_weights,
        "losses" in weighting.needs,
        global_sum,
    )
    weighting_state = where_finite(
        (losses, weights, gradient), weighting_state, state.weighting_state
    )
    return Backward(gradient, losses, counts, CombineState(weighting_state, weights, None))


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
      heads: ``(params, features, batch) -> (k,)``, the task losses.
      params: pytree of all parameters. One that both functions use gets the sum of both gradients.
      batch: what the functions take.
      weighting: the method.
      state: its state; `init_combine` makes the first one.
      counts: (k,) the examples of each task; None for one each. A task without examples counts as
        a task with loss 0 and gradient 0; both must be finite.
    """
    k = weighting.k
    counts = jnp.ones(k) if counts is None else counts
    features, trunk_pullback = jax.vjp(lambda p: trunk(p, batch), params)
    losses, heads_pullback = jax.vjp(lambda p, z: heads(p, z, batch), params, features)
    losses = jnp.where(counts > 0, losses, 0)
    gram = None
    if "gram" in weighting.needs:
        gram = gramian(jax.lax.map(lambda row: heads_pullback(row)[1], jnp.eye(k)))
    weights, weighting_state = weigh(
        weighting, TaskStats(losses, gram, counts), state.weighting_state
    )
    (of_trunk,) = trunk_pullback(heads_pullback(weights)[1])
    of_heads = heads_pullback(jnp.where(counts > 0, 1.0, 0))[0]
    gradient = jax.tree.map(jnp.add, of_trunk, of_heads)
    weighting_state = where_finite(
        (losses, weights, gram, gradient), weighting_state, state.weighting_state
    )
    return Backward(gradient, losses, counts, CombineState(weighting_state, weights, gram))


def _check(k, batch, tasks, form, microbatches, needs_gram):
    if form not in FORMS:
        raise ValueError(f"form must be one of {FORMS}, got {form!r}")
    if tasks is None and form != "masked":
        raise ValueError(f"form = {form!r} groups the examples by task: give it tasks")
    groups = k if needs_gram and form != "masked" else 1
    if microbatches * groups == 1:
        return
    for leaf in jax.tree.leaves((batch, tasks)):
        if microbatches < 1 or leaf.shape[0] % (microbatches * groups):
            raise ValueError(
                f"a batch of {leaf.shape[0]} can't be split into {microbatches} microbatches"
                + (f" of {groups} tasks" if groups > 1 else "")
            )


def _sum_over(fn, whole, microbatches):
    """Sums fn over the parts of a batch, one part after the other."""
    if microbatches == 1:
        return fn(whole)
    parts = jax.tree.map(lambda leaf: leaf.reshape(microbatches, -1, *leaf.shape[1:]), whole)
    first = jax.tree.map(lambda leaf: leaf[0], parts)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(fn, first))
    add = lambda total, part: (jax.tree.map(jnp.add, total, fn(part)), None)
    return jax.lax.scan(add, zeros, parts)[0]


def _cotangent_gradient(
    task_losses, params, whole, microbatches, find_weights, needs_losses, global_sum
):
    """One backward pass a part: the gradient is the pullback of the weights."""
    losses_of = lambda part: jax.vjp(lambda p: task_losses(p, part), params)
    if microbatches == 1:
        local_losses, pullback = losses_of(whole)
        losses = global_sum(local_losses)
        weights, state = find_weights(losses)
        (gradient,) = pullback(weights)
        return losses, global_sum(gradient), weights, state

    losses = None
    if needs_losses:
        of_part = lambda part: task_losses(params, part)
        losses = global_sum(_sum_over(of_part, whole, microbatches))
    weights, state = find_weights(losses)

    def losses_and_gradient(part):
        losses, pullback = losses_of(part)
        return losses, pullback(weights)[0]

    losses, gradient = global_sum(_sum_over(losses_and_gradient, whole, microbatches))
    return losses, gradient, weights, state


def _masked_gradients(task_losses, params, part, k):
    """The k gradients of one part by k pullbacks, whatever the sizes of its tasks."""
    losses, pullback = jax.vjp(lambda p: task_losses(p, part), params)
    (stacked,) = jax.lax.map(pullback, jnp.eye(k))
    return losses, stacked


def _grouped_gradients(losses_fn, params, part, factors, form):
    """The k gradients of one part, whose example j is of task j mod k."""
    k = factors.size
    # A reshape, where a sort by task would round otherwise and cost a copy.
    by_task = lambda leaf: leaf.reshape(-1, k, *leaf.shape[1:]).swapaxes(0, 1)
    grouped, tasks = jax.tree.map(by_task, part)
    factors = jnp.where((tasks == jnp.arange(k)[:, None]).all(), factors, jnp.nan)

    def loss_and_gradient(group, factor):
        loss = lambda p: jnp.sum(losses_fn(p, group)) * factor
        return jax.value_and_grad(loss)(params)

    if form == "scan":
        return jax.lax.map(lambda args: loss_and_gradient(*args), (grouped, factors))
    return jax.vmap(loss_and_gradient)(grouped, factors)
