"""The train step: a pure per-device function, run by `jax.jit` on one device or `jax.pmap` on many.

The cluster losses are the vectorised mask ``one_hot(cluster, k).T @ per_example / counts``. A step
draws timesteps and noise, finds the weights w of the cluster losses by the method, and follows
``J^T w``. Reductions over devices stand outside everything that is differentiated: counts are
summed first, each device's losses are its sums divided by the global counts, and losses and
gradients are summed after.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ant_jax import mtl, pixels
from ant_jax.diffusion import Process
from ant_jax.tasks.clustering import assign_clusters

GRADIENT_FORMS = ("vmap", "scan", "masked")
TIMESTEP_DRAWS = ("stratified", "uniform")


class TrainState(NamedTuple):
    """All that changes during training; a checkpoint is this and nothing else.

    Attributes:
      step: int32 scalar, the number of steps taken.
      params: parameters of the model, float32.
      ema_params: their exponential moving average.
      opt_state: state of the optimizer.
      method_state: the method's `mtl.CombineState`.
    """

    step: jax.Array
    params: Any
    ema_params: Any
    opt_state: optax.OptState
    method_state: mtl.CombineState


class Examples(NamedTuple):
    """One batch of denoising tasks; every leaf has the examples on its leading axis."""

    x0: jax.Array
    label: jax.Array | None
    t: jax.Array
    noise: jax.Array
    cluster: jax.Array


def init_state(
    params: Any,
    optimizer: optax.GradientTransformation,
    weighting: mtl.Weighting | None,
    k: int,
) -> TrainState:
    """The state before the first step. ``weighting=None`` is vanilla with k clusters to report."""
    if weighting is None:
        method_state = mtl.CombineState((), jnp.zeros(k, jnp.float32), None)
    else:
        method_state = mtl.init_combine(weighting)
    ema_params = jax.tree.map(jnp.copy, params)
    return TrainState(
        jnp.zeros((), jnp.int32), params, ema_params, optimizer.init(params), method_state
    )


def train_step(
    state: TrainState,
    batch: dict[str, jax.Array],
    *,
    apply_fn: Callable[..., jax.Array],
    diffusion: Process,
    boundaries: jax.typing.ArrayLike,
    weighting: mtl.Weighting | None,
    optimizer: optax.GradientTransformation,
    seed: int | jax.Array,
    timesteps: str = "stratified",
    gradient_form: str = "vmap",
    microbatches: int = 1,
    num_classes: int = 0,
    label_dropout: float = 0.0,
    ema_decay: float = 0.9999,
    skip_nonfinite: bool = False,
    timestep_order: jax.typing.ArrayLike | None = None,
    loss_scale: jax.typing.ArrayLike | None = None,
    axis_name: str | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One training step on this device's part of the batch.

    Every random draw is a function of the seed, the step and the global example index, so the run
    does not depend on the number of devices and a resumed run is the same run.

    Args:
      state: the state; the same on all devices.
      batch: ``image`` (B, H, W, C), uint8 (scaled to [-1, 1] here) or float32, and, where
        ``num_classes`` > 0, ``label`` (B,) int. B is the per-device batch size; device d holds the
        global examples d B .. (d + 1) B - 1.
      apply_fn: ``(params, x_t, t, label) -> model output``.
      diffusion: the noise process and its loss.
      boundaries: (k + 1,) cluster boundaries; may be traced. A specialist, trained on one interval
        alone, has two, and draws stratified.
      weighting: the MTL method; None is vanilla: the plain mean of the per-example losses.
      optimizer: turns the combined gradient into an update.
      seed: seed of the timesteps, noise and dropped labels; may be traced.
      timesteps: "stratified": the global example j belongs to cluster j mod k, t uniform inside it;
        "uniform": t uniform over all timesteps.
      gradient_form: how the k gradients are found for methods that need the Gram matrix. "vmap" and
        "scan" group the batch by cluster (stratified only) and cost about one backward pass, in
        parallel or one cluster after the other; "masked" is the general form, k pullbacks.
      microbatches: the batch is split into so many parts whose gradients are added up. A method
        that needs losses but no Gram matrix runs the forward pass twice then, because its weights
        must be known before the first pullback.
      num_classes: 0 for unconditional models; otherwise the null class of dropped labels.
      label_dropout: probability that a label becomes the null class.
      ema_decay: the average's decay, ramped up as min(ema_decay, (1 + step) / (10 + step)).
      skip_nonfinite: whether a step whose loss or combined gradient is not finite leaves everything
        but ``step`` as it was. The method's own state it leaves in any case.
      timestep_order: (T,) a permutation of the timesteps: cluster i then is the timesteps at the
        places b[i] .. b[i+1] - 1 of this order, an interval no longer. None for intervals.
      loss_scale: (k,) factors of the cluster losses before the method sees them, such as k times
        each cluster's share of the timesteps. None for ones. Metrics are without them.
      axis_name: name of the mapped axis of devices.

    Returns:
      The new state and the metrics, both the same on all devices: ``loss`` (plain mean of the
      per-example losses of the batch), ``cluster_losses`` (k,), ``weights`` (k,), ``counts`` (k,),
      ``grad_norm`` of the combined gradient and, for methods with a Gram matrix, ``cosines``
      (k (k - 1) / 2,) between cluster gradients, in the order of `mtl.pairwise_cosines`, the
      ``smallest_cosine`` of them, and ``conflict``, 1 where it is negative and else 0.

    Raises:
      ValueError: for unknown settings, or a batch that can't be split as they ask.
    """
    k = len(boundaries) - 1
    batch_size = batch["image"].shape[0]
    check_step(
        k,
        batch_size,
        timesteps=timesteps,
        microbatches=microbatches,
        gradient_form=gradient_form,
        weighting=weighting,
    )
    examples = draw_examples(
        state.step,
        batch,
        first_index=0 if axis_name is None else jax.lax.axis_index(axis_name) * batch_size,
        boundaries=boundaries,
        seed=seed,
        timesteps=timesteps,
        num_classes=num_classes,
        label_dropout=label_dropout,
        timestep_order=timestep_order,
    )

    def global_sum(tree):
        return tree if axis_name is None else jax.lax.psum(tree, axis_name)

    counts = global_sum(jax.nn.one_hot(examples.cluster, k).sum(0))
    present = counts > 0
    inverse_counts = jnp.where(present, 1 / jnp.maximum(counts, 1), 0)
    scale = jnp.ones(k) if loss_scale is None else jnp.asarray(loss_scale, jnp.float32)
    factors = inverse_counts * scale

    def per_example_losses(params, part):
        return diffusion.losses(
            lambda x, t, y: apply_fn(params, x, t, y), part.x0, part.t, part.noise, part.label
        )

    def cluster_losses(params, part):
        mask = part.cluster[:, None] == jnp.arange(k)
        # Selected, not multiplied: one NaN shows in its own cluster alone.
        sums = jnp.where(mask, per_example_losses(params, part)[:, None], 0).sum(0)
        return sums * factors

    parts = jax.tree.map(lambda leaf: leaf.reshape(microbatches, -1, *leaf.shape[1:]), examples)
    if weighting is not None and weighting.needs_gram:
        if gradient_form == "masked":
            grads_fn = lambda part: _masked_gradients(cluster_losses, state.params, part, k)
        else:
            grads_fn = lambda part: _grouped_gradients(
                per_example_losses, state.params, part, factors, gradient_form
            )
        losses, stacked = _sum_over(grads_fn, parts)
        losses = global_sum(losses)
        grads, method_state = mtl.combine(weighting, axis_name).update(
            stacked, state.method_state, losses=losses, present=present
        )
    else:

        def weigh(losses):
            if weighting is None:
                return mtl.CombineState((), counts / counts.sum(), None)
            weights, weighting_state = mtl.weigh(
                weighting, losses, None, present, state.method_state.weighting_state
            )
            return mtl.CombineState(weighting_state, weights, None)

        losses, grads, method_state = _cotangent_gradient(
            cluster_losses,
            state.params,
            parts,
            weigh,
            weighting is not None and weighting.needs_losses,
            global_sum,
        )
        weighting_state = mtl.where_finite(
            (losses, method_state.weights, grads),
            method_state.weighting_state,
            state.method_state.weighting_state,
        )
        method_state = method_state._replace(weighting_state=weighting_state)

    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
    ema_params = optax.incremental_update(params, state.ema_params, 1 - decay)

    losses = losses / scale
    loss, grad_norm = jnp.sum(losses * counts) / counts.sum(), optax.tree.norm(grads)
    new = TrainState(state.step + 1, params, ema_params, opt_state, method_state)
    if skip_nonfinite:
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        kept = jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, state)
        new = kept._replace(step=new.step)
    metrics = {
        "loss": loss,
        "cluster_losses": losses,
        "weights": method_state.weights,
        "counts": counts,
        "grad_norm": grad_norm,
    }
    if method_state.gram is not None:
        cosines = mtl.pairwise_cosines(method_state.gram)
        smallest = jnp.nanmin(cosines, initial=jnp.inf)
        metrics |= {
            "cosines": cosines,
            "smallest_cosine": jnp.where(jnp.isinf(smallest), jnp.nan, smallest),
            "conflict": (smallest < 0).astype(jnp.float32),
        }
    return new, metrics


def check_step(
    k: int,
    batch_size: int,
    *,
    timesteps: str,
    microbatches: int,
    gradient_form: str,
    weighting: mtl.Weighting | None,
) -> None:
    """Raises a ValueError if a per-device batch of ``batch_size`` can't be trained on like this."""
    if timesteps not in TIMESTEP_DRAWS:
        raise ValueError(f"timesteps must be one of {TIMESTEP_DRAWS}, got {timesteps!r}")
    if gradient_form not in GRADIENT_FORMS:
        raise ValueError(f"gradient_form must be one of {GRADIENT_FORMS}, got {gradient_form!r}")
    if weighting is not None and weighting.k != k:
        raise ValueError(f"the method is for k = {weighting.k}, the boundaries give k = {k}")
    grouped = weighting is not None and weighting.needs_gram and gradient_form != "masked"
    if grouped and timesteps == "uniform":
        raise ValueError(
            "uniform timesteps leave the clusters uneven: use gradient_form='masked' with them"
        )
    parts = microbatches * (k if timesteps == "stratified" else 1)
    if microbatches < 1 or batch_size % parts:
        raise ValueError(
            f"the per-device batch of {batch_size} must be divisible by {parts} = {microbatches} "
            f"microbatches" + (f" x {k} clusters" if timesteps == "stratified" else "")
        )


def draw_examples(
    step: jax.Array,
    batch: dict[str, jax.Array],
    *,
    first_index: int | jax.Array,
    boundaries: jax.typing.ArrayLike,
    seed: int | jax.Array,
    timesteps: str,
    num_classes: int,
    label_dropout: float,
    timestep_order: jax.typing.ArrayLike | None = None,
) -> Examples:
    """Draws the timestep, noise and dropped label of each example from its own key."""
    image = batch["image"]
    x0 = pixels.normalize(image)
    index = first_index + jnp.arange(image.shape[0])
    bounds = jnp.asarray(boundaries)
    k = len(boundaries) - 1
    stratified = timesteps == "stratified"
    low = bounds[index % k] if stratified else jnp.zeros_like(index)
    high = bounds[index % k + 1] if stratified else jnp.full_like(index, bounds[-1])
    step_key = jax.random.fold_in(jax.random.key(seed), step)

    def draw(index):
        uniform_key, noise_key = jax.random.split(jax.random.fold_in(step_key, index))
        return jax.random.uniform(uniform_key, (2,)), jax.random.normal(noise_key, x0.shape[1:])

    uniform, noise = jax.vmap(draw)(index)
    t = low + jnp.floor(uniform[:, 0] * (high - low)).astype(low.dtype)
    dropped = uniform[:, 1] < label_dropout
    label = jnp.where(dropped, num_classes, batch["label"]) if num_classes else None
    cluster = index % k if stratified else assign_clusters(t, bounds)
    if timestep_order is not None:
        t = jnp.asarray(timestep_order)[t]
    return Examples(x0, label, t, noise, cluster)


def _sum_over(fn, parts):
    """Sums fn over the leading axis of parts, one part after the other."""
    first = jax.tree.map(lambda leaf: leaf[0], parts)
    if jax.tree.leaves(parts)[0].shape[0] == 1:
        return fn(first)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(fn, first))
    add = lambda total, part: (jax.tree.map(jnp.add, total, fn(part)), None)
    return jax.lax.scan(add, zeros, parts)[0]


def _cotangent_gradient(cluster_losses, params, parts, weigh, needs_losses, global_sum):
    """One backward pass a part: the gradient is the pullback of the weights."""
    losses_of = lambda part: jax.vjp(lambda p: cluster_losses(p, part), params)
    if jax.tree.leaves(parts)[0].shape[0] == 1:
        local_losses, pullback = losses_of(jax.tree.map(lambda leaf: leaf[0], parts))
        losses = global_sum(local_losses)
        method_state = weigh(losses)
        (grads,) = pullback(method_state.weights)
        return losses, global_sum(grads), method_state

    losses = None
    if needs_losses:
        losses = global_sum(_sum_over(lambda part: cluster_losses(params, part), parts))
    method_state = weigh(losses)

    def losses_and_gradient(part):
        losses, pullback = losses_of(part)
        return losses, pullback(method_state.weights)[0]

    losses, grads = global_sum(_sum_over(losses_and_gradient, parts))
    return losses, grads, method_state


def _masked_gradients(cluster_losses, params, part, k):
    """The k gradients of one part by k pullbacks, whatever the sizes of its clusters."""
    losses, pullback = jax.vjp(lambda p: cluster_losses(p, part), params)
    (stacked,) = jax.lax.map(pullback, jnp.eye(k))
    return losses, stacked


def _grouped_gradients(per_example_losses, params, part, factors, form):
    """The k gradients of one stratified part, each from its own cluster's examples."""
    k = factors.size
    grouped = jax.tree.map(lambda leaf: leaf.reshape(-1, k, *leaf.shape[1:]).swapaxes(0, 1), part)

    def loss_and_gradient(group, factor):
        loss = lambda p: jnp.sum(per_example_losses(p, group)) * factor
        return jax.value_and_grad(loss)(params)

    if form == "scan":
        return jax.lax.map(lambda args: loss_and_gradient(*args), (grouped, factors))
    return jax.vmap(loss_and_gradient)(grouped, factors)
