"""The train step: a pure per-device function, run by `jax.jit` on one device or `jax.pmap` on many.

Where the parameters are sharded, `jax.jit` partitions the same function of the global batch.

A step draws noise levels and noise, gets the combined gradient of the task losses (`mtl.backward`),
updates the parameters and averages them. Reductions over devices stand outside everything that is
differentiated: counts are summed first, each device's losses are its sums divided by the global
counts, and losses and gradients are summed after.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ant_jax import mtl, pixels
from ant_jax.diffusion import Process
from ant_jax.mtl.backward import FORMS
from ant_jax.mtl.shards import gathered, global_sum, part_of
from ant_jax.tasks import clusters


class TrainState(NamedTuple):
    """All that changes during training, and all that a checkpoint stores.

    Attributes:
      step: int32 scalar, the number of steps taken.
      params: parameters of the model, float32.
      ema_params: the exponential moving average of the parameters to evaluate.
      opt_state: state of the optimizer.
      method_state: the method's `mtl.CombineState`.
    """

    step: jax.Array
    params: Any
    ema_params: Any
    opt_state: optax.OptState
    method_state: mtl.CombineState


class Setup(NamedTuple):
    """What a step does.

    Attributes:
      apply_fn: ``(params, x_t, t, label) -> model output``.
      process: the noise process and its loss.
      boundaries: (k + 1,) of the tasks; may be traced. A specialist has one task: two boundaries,
        `mtl.vanilla` and the stratified draw.
      weighting: the multi-task method.
      optimizer: turns the combined gradient into an update.
      seed: seed of the noise levels, noise and dropped labels; may be traced.
      draw: how noise levels are drawn; see `tasks.clusters.draw`.
      timestep_order: (T,) if the tasks are not intervals, else None; see `tasks.clusters.draw`.
      suppress: factor by which levels below ``suppress_log_snr`` are drawn less often than others
        of their task; 1 for the process's density. See `tasks.clusters.suppressed`.
      suppress_log_snr: log-SNR below which levels are suppressed.
      curriculum_steps: steps of each stage of a curriculum from the noisiest task to all; 0 for
        none. See `tasks.clusters.curriculum`.
      form: how the k gradients are computed for the Gram matrix; see `mtl.backward`.
        "vmap" and "scan" need the stratified draw.
      microbatches: number of parts of the batch; see `mtl.backward`.
      num_classes: 0 for unconditional models; otherwise the null class of dropped labels.
      label_dropout: probability that a label becomes the null class.
      ema_decay: the average's decay, ramped up as min(ema_decay, (1 + step) / (10 + step)).
      skip_nonfinite: whether a step changes nothing but ``step`` if its loss or combined gradient
        is not finite. Such a step never changes the state of the method.
      split: whether each of n devices updates its own 1/n of the parameters; see `split_axes`. The
        optimizer must treat every entry alone, as AdamW does. It sees each parameter as one flat
        part: it may select parameters by name, not by shape. No error shows an optimizer that takes
        norms, such as `optax.lamb` and `optax.clip_by_global_norm`: use False with these.
      eval_params: ``(opt_state, params) -> params``, the parameters that the average follows.
    """

    apply_fn: Callable[..., jax.Array]
    process: Process
    boundaries: jax.Array | np.ndarray
    weighting: mtl.Weighting
    optimizer: optax.GradientTransformation
    seed: int | jax.Array
    draw: str = "stratified"
    timestep_order: jax.typing.ArrayLike | None = None
    suppress: float = 1.0
    suppress_log_snr: float = -5.0
    curriculum_steps: int = 0
    form: str = "vmap"
    microbatches: int = 1
    num_classes: int = 0
    label_dropout: float = 0.0
    ema_decay: float = 0.9999
    skip_nonfinite: bool = False
    split: bool = False
    eval_params: Callable[[Any, Any], Any] = lambda opt_state, params: params


class Examples(NamedTuple):
    """One batch of denoising examples; every leaf has the examples on its leading axis."""

    x0: jax.Array
    label: jax.Array | None
    t: jax.Array
    noise: jax.Array


def init_state(
    params: Any, optimizer: optax.GradientTransformation, weighting: mtl.Weighting
) -> TrainState:
    """The state before the first step."""
    step, ema_params = jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, params)
    return TrainState(step, params, ema_params, optimizer.init(params), mtl.init_combine(weighting))


def train_step(
    state: TrainState,
    batch: dict[str, jax.Array],
    setup: Setup,
    axis_name: str | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One training step on the examples of this device.

    Every random draw is a function of the seed, the step and the global example index. So the
    result does not depend on the number of devices, and a resumed run is the same run.

    Args:
      state: the state; the same on all devices, or split as `split_axes` says if ``setup.split``.
      batch: ``image`` (B, H, W, C), uint8 (scaled to [-1, 1] here) or float32, and, where
        ``num_classes`` > 0, ``label`` (B,) int. B is the per-device batch size; device d holds the
        global examples d B .. (d + 1) B - 1.
      setup: what the step does.
      axis_name: name of the mapped axis of devices.

    Returns:
      The new state, and the metrics, the same on all devices: ``loss`` (plain mean of the
      per-example losses of the batch), ``cluster_losses`` (k,), ``weights`` (k,), ``counts`` (k,),
      ``grad_norm`` of the combined gradient and, for methods with a Gram matrix, ``cosines``
      (k (k - 1) / 2,) between task gradients, in the order of `mtl.pairwise_cosines`, the
      ``smallest_cosine`` of them, and ``conflict``, 1 where it is negative and else 0.

    Raises:
      ValueError: if a setting is unknown, or the batch can't be split into tasks and microbatches.
    """
    batch_size = batch["image"].shape[0]
    devices = 1 if axis_name is None else jax.lax.axis_size(axis_name)
    total = devices * batch_size
    k = len(setup.boundaries) - 1
    check_step(
        k,
        total,
        devices,
        draw=setup.draw,
        form=setup.form,
        microbatches=setup.microbatches,
        weighting=setup.weighting,
        curriculum_steps=setup.curriculum_steps,
    )
    first_index = 0 if axis_name is None else jax.lax.axis_index(axis_name) * batch_size
    weighting, blocks = setup.weighting, None
    if weighting.blocks is not None:
        blocks = weighting.blocks.tasks(state.method_state.weighting_state)
    elif setup.curriculum_steps:
        blocks = clusters.curriculum(state.step, k, setup.curriculum_steps)
    examples, tasks = draw_examples(state.step, batch, setup, first_index, total, blocks)
    # Where a task may have several blocks, the backward pass takes the blocks for tasks.
    pools = blocks if setup.draw == "stratified" else None
    if pools is not None:
        weighting = mtl.pooled(weighting, pools)
        tasks = clusters.assign(first_index + jnp.arange(batch_size), total, len(pools))

    def losses_fn(params, part):
        denoise = lambda x, t, y: setup.apply_fn(params, x, t, y)
        return setup.process.losses(denoise, part.x0, part.t, part.noise, part.label)

    levels = None
    if setup.weighting.levels is not None:
        levels = clusters.log_sigma(setup.process, examples.t) / 4
    found = mtl.backward(
        losses_fn,
        state.params,
        examples,
        weighting,
        state.method_state,
        tasks=tasks,
        levels=levels,
        form=setup.form,
        microbatches=setup.microbatches,
        axis_name=axis_name,
        parts=setup.split,
    )
    if pools is not None:
        found = mtl.by_task(found, pools, k)
    # From here to the end a device sees its part of every parameter, if they are split.
    axis_name = axis_name if setup.split else None
    old = state._replace(params=jax.tree.map(lambda leaf: part_of(leaf, axis_name), state.params))
    updates, opt_state = setup.optimizer.update(found.gradient, old.opt_state, old.params)
    params = optax.apply_updates(old.params, updates)
    decay = jnp.minimum(setup.ema_decay, (1 + state.step) / (10 + state.step))
    followed = setup.eval_params(opt_state, params)
    ema_params = optax.incremental_update(followed, old.ema_params, 1 - decay)

    metrics = _metrics(found, axis_name)
    new = TrainState(state.step + 1, params, ema_params, opt_state, found.state)
    if setup.skip_nonfinite:
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        kept = jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, old)
        new = kept._replace(step=new.step)
    return new._replace(params=_gathered(new.params, state.params, axis_name)), metrics


def whole_state(
    state: TrainState, optimizer: optax.GradientTransformation, axis_name: str
) -> TrainState:
    """Gathers a state that is split as `split_axes` says.

    Args:
      state: the parts of this device.
      optimizer: of the state.
      axis_name: name of the mapped axis of devices.
    """
    follows, like = _following(optimizer, state.params)
    whole = lambda leaf, follows, like: gathered(leaf, like.shape, axis_name) if follows else leaf
    return state._replace(
        ema_params=_gathered(state.ema_params, state.params, axis_name),
        opt_state=jax.tree.map(whole, state.opt_state, follows, like),
    )


def split_axes(optimizer: optax.GradientTransformation, params: Any) -> TrainState:
    """The axis of devices of every leaf of a state of which each of n devices has its 1/n.

    The moving average is split, and what follows the parameters in the optimizer's state, such as
    Adam's moments. The rest, such as counts, is on all devices (Rajbhandari et al., *ZeRO*, SC
    2020, stage 1). The parameters stay whole: the network needs them.

    Args:
      optimizer: of the state.
      params: arrays or shapes of the parameters.

    Returns:
      0 where a leaf is split, and None where it is whole, outside the mapped function.

    Raises:
      ValueError: if the optimizer's state depends on the shapes of the parameters, as that of
        `optax.contrib.muon` does.
    """
    follows, _ = _following(optimizer, params)
    axes = jax.tree.map(lambda each: 0 if each else None, follows)
    return TrainState._make([None, None, 0, axes, None])


def _following(optimizer, params):
    """Whether each leaf of the optimizer's state has the shape of a parameter, and the shapes."""
    like = jax.eval_shape(optimizer.init, params)
    # Flat as parts are, and with another number of entries.
    flat = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((leaf.size + 1,), leaf.dtype), params)
    other = jax.eval_shape(optimizer.init, flat)
    alike = jax.tree.structure(like) == jax.tree.structure(other) and all(
        b.shape in (a.shape, (a.size + 1,))
        for a, b in zip(jax.tree.leaves(like), jax.tree.leaves(other), strict=True)
    )
    if not alike:
        raise ValueError(
            "the optimizer's state depends on the shapes of the parameters, so devices can't "
            "update parts of them: use split=False"
        )
    return jax.tree.map(lambda a, b: a.shape != b.shape, like, other), like


def _gathered(parts, like, axis_name):
    return jax.tree.map(lambda part, leaf: gathered(part, leaf.shape, axis_name), parts, like)


def check_step(
    k: int,
    batch_size: int,
    devices: int,
    *,
    draw: str,
    form: str,
    microbatches: int,
    weighting: mtl.Weighting,
    curriculum_steps: int = 0,
) -> None:
    """Raises a ValueError if settings exclude each other or don't fit the global batch size."""
    if draw not in clusters.DRAWS:
        raise ValueError(f"draw must be one of {clusters.DRAWS}, got {draw!r}")
    if form not in FORMS:
        raise ValueError(f"form must be one of {FORMS}, got {form!r}")
    if weighting.k != k:
        raise ValueError(f"the method is for k = {weighting.k}, the boundaries give k = {k}")
    if "gram" in weighting.needs and form != "masked" and draw == "uniform":
        raise ValueError("the uniform draw leaves the tasks uneven: use form='masked' with it")
    blocks = k if weighting.blocks is None else weighting.blocks.n
    if weighting.blocks is not None and (draw == "uniform" or curriculum_steps):
        raise ValueError(
            "a method that chooses the tasks of blocks needs draw='stratified' and no curriculum"
        )
    # So that every group of `mtl.blocks` is divisible by the number of microbatches.
    unit = max(microbatches, 1) * math.lcm(devices, blocks if draw == "stratified" else 1)
    if microbatches < 1 or batch_size % unit:
        name = "tasks" if weighting.blocks is None else "blocks of tasks"
        of_tasks = f" and {blocks} {name}" if draw == "stratified" else ""
        nearest = max(round(batch_size / unit), 1) * unit
        raise ValueError(
            f"the batch of {batch_size} must be divisible by {unit} = {microbatches} "
            f"microbatches x lcm({devices} devices{of_tasks}): for example {nearest}"
        )


def draw_examples(
    step: jax.Array,
    batch: dict[str, jax.Array],
    setup: Setup,
    first_index: int | jax.Array,
    total: int,
    task_of_block: jax.Array | None = None,
) -> tuple[Examples, jax.Array]:
    """Draws the noise level, noise and dropped label of each example from its own key.

    Args:
      step: number of steps taken before.
      batch: see `train_step`.
      setup: what the step does.
      first_index: of the first example, in the global batch.
      total: number of examples in the global batch.
      task_of_block: see `tasks.clusters.draw`.

    Returns:
      The examples and the task of each, (B,) int.
    """
    image = batch["image"]
    x0 = pixels.normalize(image)
    index = first_index + jnp.arange(image.shape[0])
    step_key = jax.random.fold_in(jax.random.key(setup.seed), step)

    def draw(index):
        uniform_key, noise_key = jax.random.split(jax.random.fold_in(step_key, index))
        return jax.random.uniform(uniform_key, (2,)), jax.random.normal(noise_key, x0.shape[1:])

    uniform, noise = jax.vmap(draw)(index)
    process, level = setup.process, setup.process.level
    if setup.suppress != 1:
        level = clusters.suppressed(process, setup.suppress, setup.suppress_log_snr)
    if setup.timestep_order is not None and (setup.suppress != 1 or setup.curriculum_steps):
        raise ValueError(clusters.NEEDS_INTERVALS)
    t, tasks = clusters.draw(
        level,
        uniform[:, 0],
        index,
        total,
        setup.boundaries,
        setup.draw,
        setup.timestep_order,
        task_of_block,
    )
    label = None
    if setup.num_classes:
        dropped = uniform[:, 1] < setup.label_dropout
        label = jnp.where(dropped, setup.num_classes, batch["label"])
    return Examples(x0, label, t, noise), tasks


def _metrics(found, axis_name):
    losses, counts, method_state = found.losses, found.counts, found.state
    metrics = {
        "loss": jnp.sum(losses * counts) / counts.sum(),
        "cluster_losses": losses,
        "weights": method_state.weights,
        "counts": counts,
        "grad_norm": jnp.sqrt(global_sum(optax.tree.norm(found.gradient, squared=True), axis_name)),
    }
    if method_state.gram is not None:
        cosines = mtl.pairwise_cosines(method_state.gram)
        smallest = jnp.nanmin(cosines, initial=jnp.inf)
        metrics |= {
            "cosines": cosines,
            "smallest_cosine": jnp.where(jnp.isinf(smallest), jnp.nan, smallest),
            "conflict": (smallest < 0).astype(jnp.float32),
        }
    return metrics
