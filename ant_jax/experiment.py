"""What a config describes: the setup of a run, checked before anything is compiled."""

import functools
import itertools
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial, keystr
from ml_collections import ConfigDict

from ant_jax import config as config_lib
from ant_jax import dataset, models, mtl, sampling
from ant_jax.config import ConfigError
from ant_jax.diffusion import Process
from ant_jax.diffusion.samplers import SampleOptions
from ant_jax.runtime import processes
from ant_jax.runtime.devices import compiler_options, parallel_step, replicate, replicated
from ant_jax.tasks.clusterings import Clusters
from ant_jax.train_step import Setup as StepSetup
from ant_jax.train_step import TrainState, check_step, init_state, train_step

# Keeps a method's random draws apart from those of the train step, which use the bare seed.
_METHOD_STREAM = 1 << 30


class Setup(NamedTuple):
    """What a config describes, before anything is compiled.

    Attributes:
      image_shape: (H, W, C) of what the network sees.
      model: the network; see `ant_jax.models`.
      process: the noise process.
      clusters: which noise levels are which task; of a specialist, its own alone.
      weighting: the multi-task method.
      draw: how noise levels are drawn; see `tasks.clusters.draw`.
      given_weighting: the method that was given in place of the one that the config names.
    """

    image_shape: tuple[int, int, int]
    model: nn.Module
    process: Process
    clusters: Clusters
    weighting: mtl.Weighting
    draw: str
    given_weighting: mtl.Weighting | None = None


def build(
    config: ConfigDict,
    channels: int,
    num_classes: int,
    boundaries: Sequence[int] | None = None,
    *,
    model: nn.Module | None = None,
    process: Process | None = None,
    weighting: mtl.Weighting | None = None,
) -> Setup:
    """Builds what a config describes.

    Args:
      config: the run's config.
      channels: of the images, or of their latents.
      num_classes: of the data.
      boundaries: of the tasks where they are known already, as those of a run are once it has
        begun, whatever becomes of the file they came from.
      model: a network in place of the one that the config names.
      process: a noise process in place of the one that the config names.
      weighting: a method in place of the one that the config names.

    Raises:
      ConfigError: naming the setting, if the config is not valid or asks for labels there are not,
        or if the boundaries can't be of its tasks.
    """
    config_lib.validate(config)
    if config.model.conditional and not num_classes and model is None:
        raise ConfigError(
            f"config.model.conditional = True, but {config.data.name} has no labels: set it False"
        )
    if config.sampler.guidance_channels > channels:
        raise ConfigError(
            f"config.sampler.guidance_channels = {config.sampler.guidance_channels} must not "
            f"exceed the {channels} channels of what the network sees"
        )
    if process is None:
        process = build_process(config)
    if boundaries is not None:
        _check_boundaries(config, boundaries, process)
    size = config.data.image_size
    if config.autoencoder.name:
        size, _, _ = dataset.latent_shape(config)
    shape = (size, size, channels)
    for group, name in (("data", "batch_size"), ("sample", "batch_size")):
        _check_memory(config, group, name, shape)
    if model is None:
        model = build_model(config, channels, num_classes if config.model.conditional else 0)
    multiple = models.input_multiple(model)
    if size % multiple:
        raise ConfigError(
            f"config.data.image_size = {config.data.image_size} gives the network sides of {size}, "
            f"which must be divisible by {multiple}, by config.model"
        )
    if config.optimizer.frozen:
        _check_frozen(config.optimizer.frozen, model, shape)
    clusters = build_clusters(config, process, boundaries)
    k = len(clusters.boundaries) - 1
    if weighting is not None and weighting.k != k:
        raise ConfigError(
            f"the weighting that was given is for {weighting.k} tasks, and config.clusters.k = {k}"
        )
    specialist, scale = config.clusters.specialist >= 0, _loss_scale(config, clusters)
    built = _build_weighting(config, k, config.seed, scale, specialist, weighting)
    draw = _draw(config, weighting)
    return Setup(shape, model, process, clusters, built, draw, weighting)


def build_process(config: ConfigDict) -> Process:
    """The noise process with its loss weight; the same object for the same settings."""
    weight = None
    if config.loss_weight.name != "none":
        weight = config_lib.build(config, "loss_weight")
    return config_lib.build(config, "process", loss_weight=weight)


def build_model(config: ConfigDict, channels: int, num_classes: int) -> nn.Module:
    """The network; the same object for the same settings.

    Args:
      config: the run's config.
      channels: of what it sees.
      num_classes: of the data, or 0 for an unconditional network.

    Raises:
      ConfigError: if the settings don't fit each other or the devices.
    """
    network = config_lib.component("model", config.model.name)
    try:
        return models.build_network(
            network,
            config_lib.arguments(config, "model"),
            channels=channels,
            num_classes=num_classes,
            learned_variance=config.process.get("variance") == "learned_range",
            dtype=config.model.dtype,
        )
    except ValueError as error:
        raise ConfigError(f"config.model: {error}") from error


def build_clusters(
    config: ConfigDict, process: Process, boundaries: Sequence[int] | None = None
) -> Clusters:
    """Which noise levels are which task; ``boundaries`` where they are known already."""
    settings = config.clusters
    if boundaries is not None and settings.name != "random":
        return Clusters(np.array(boundaries))
    log_snr = process.log_snr(np.arange(process.span))
    clusters = config_lib.build(config, "clusters", log_snr=log_snr, k=settings.k)
    found = clusters.boundaries
    if settings.specialist >= 0:
        found = found[settings.specialist : settings.specialist + 2]
    return clusters._replace(boundaries=found if boundaries is None else np.array(boundaries))


def _loss_scale(config, clusters):
    if not config.method.weight_by_interval_size:
        return None
    sizes = np.diff(clusters.boundaries)
    return sizes * (len(sizes) / clusters.boundaries[-1])


def _build_weighting(config, k, seed, loss_scale, specialist, given):
    """The weighting of k task losses with its wrappers; the seed and the scale may be traced."""
    if specialist:
        return mtl.vanilla(k)
    settings = config.method
    weighting = given
    if weighting is None:
        weighting = config_lib.build(config, "method", k=k, seed=seed + _METHOD_STREAM)
    if settings.update_every > 1:
        weighting = mtl.every(weighting, settings.update_every)
    if settings.max_norm:
        weighting = mtl.clipped(weighting, settings.max_norm)
    if loss_scale is not None:
        weighting = mtl.scaled(weighting, loss_scale)
    # With the Gram matrix of the gradients at hand their cosines are reported, whoever needs it.
    return weighting._replace(needs=weighting.needs | ({"gram"} if settings.cosines else set()))


def _draw(config, given):
    if config.clusters.specialist >= 0:
        return "stratified"
    if config.method.draw != "auto":
        return config.method.draw
    return "uniform" if config.method.name == "vanilla" and given is None else "stratified"


def _check_memory(config, group, name, image_shape):
    """Refuses a batch whose images alone, as float32, don't fit this machine."""
    need = 4 * config[group][name] * math.prod(image_shape)
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if need > there:
        raise ConfigError(
            f"config.{group}.{name} = {config[group][name]} images of "
            f"{'x'.join(map(str, image_shape))} take {need >> 30} GiB, more than the "
            f"{there >> 30} GiB of this machine"
        )


def _check_frozen(pattern, model, image_shape):
    params = jax.eval_shape(lambda: init_params(model, image_shape, 0))
    names = jax.tree.leaves(frozen(params, pattern))
    if not any(names) or all(names):
        raise ConfigError(
            f"config.optimizer.frozen = {pattern!r} matches {'all' if any(names) else 'none'} of "
            "the parameters; they are named as in the table at the start of a run"
        )


def _check_boundaries(config, boundaries, process):
    k, last = config.clusters.k, process.span
    one = config.clusters.specialist >= 0
    if (
        len(boundaries) != (2 if one else k + 1)
        or any(low >= high for low, high in itertools.pairwise(boundaries))
        or not (boundaries[0] >= 0 and boundaries[-1] <= last)
        or not (one or boundaries[-1] - boundaries[0] == last)
    ):
        raise ConfigError(
            f"the boundaries {list(boundaries)} of facts.json are not those of "
            f"{'one of ' if one else ''}config.clusters.k = {k} tasks of the {last} noise levels "
            "of config.process"
        )


def check_batch(config: ConfigDict, setup: Setup) -> None:
    """Raises a ConfigError if the batch can't be split over devices, microbatches and tasks."""
    batch_size, count = config.data.batch_size, jax.device_count()
    if batch_size % count:
        raise ConfigError(
            f"config.data.batch_size = {batch_size} must be divisible by the number of devices, "
            f"{count}"
        )
    form = config.method.gradient_form
    if "gram" in setup.weighting.needs and form != "masked" and setup.draw == "uniform":
        raise ConfigError(
            f"config.method.draw = {config.method.draw!r} with config.method.name = "
            f"{config.method.name!r}, which takes the Gram matrix, needs "
            "config.method.gradient_form = 'masked'"
        )
    try:
        check_step(
            len(setup.clusters.boundaries) - 1,
            batch_size // count,
            draw=setup.draw,
            form=form,
            microbatches=config.optimizer.microbatches,
            weighting=setup.weighting,
        )
    except ValueError as error:
        raise ConfigError(
            f"config.data.batch_size = {batch_size} over {count} device(s): {error}"
        ) from None


def build_optimizer(
    config: ConfigDict, learning_rate: float | jax.Array | None = None
) -> optax.GradientTransformation:
    """AdamW with warm-up, clipping of the combined gradient in front of it where asked for.

    Args:
      config: the run's config.
      learning_rate: used instead of the config's; may be traced.
    """
    settings = config.optimizer
    if learning_rate is None:
        learning_rate = settings.learning_rate
    schedule = optax.constant_schedule(learning_rate)
    if settings.schedule == "cosine":
        decay_steps = max(config.num_steps - settings.warmup_steps, 1)
        schedule = optax.cosine_decay_schedule(learning_rate, decay_steps)
    if settings.warmup_steps:
        warmup = optax.linear_schedule(0, learning_rate, settings.warmup_steps)
        schedule = optax.join_schedules([warmup, schedule], [settings.warmup_steps])
    optimizer = optax.adamw(schedule, weight_decay=settings.weight_decay)
    if settings.clip_norm:
        optimizer = optax.chain(optax.clip_by_global_norm(settings.clip_norm), optimizer)
    if settings.frozen:
        # Without moments for what does not move.
        optimizer = optax.partition(
            {True: optax.set_to_zero(), False: optimizer},
            lambda params: frozen(params, settings.frozen),
        )
    return optimizer


def frozen(params: Any, pattern: str) -> Any:
    """Whether each parameter's name, such as "block_0/qkv/kernel", has the pattern in it."""
    return jax.tree.map_with_path(
        lambda path, _: bool(re.search(pattern, keystr(path, simple=True, separator="/"))), params
    )


def stop_gradients(params: Any, pattern: str) -> Any:
    """Makes constants of the parameters that are frozen, so that no gradient counts for them."""
    if not pattern:
        return params
    return jax.tree.map(
        lambda leaf, stop: jax.lax.stop_gradient(leaf) if stop else leaf,
        params,
        frozen(params, pattern),
    )


def init_params(model: nn.Module, image_shape: tuple[int, int, int], seed: int) -> dict:
    """The network's parameters before training."""
    return _init_params(jax.random.key(seed), model, image_shape)


@functools.partial(jax.jit, static_argnames=("model", "image_shape"))
def _init_params(key, model, image_shape):
    label = jnp.zeros(1, jnp.int32) if models.num_classes(model) else None
    return model.init(key, jnp.zeros((1, *image_shape)), jnp.zeros(1, jnp.int32), label)["params"]


def abstract_params(setup: Setup) -> dict:
    """The shapes and types of the network's parameters."""
    return jax.eval_shape(lambda: init_params(setup.model, setup.image_shape, 0))


def denoiser(setup: Setup, params: dict) -> Partial:
    """The network as samplers take it, ``(x, t, y) -> output``; the parameters stay arguments."""
    return Partial(setup.model.apply, {"params": params})


def draw_samples(
    config: ConfigDict,
    setup: Setup,
    denoise: Partial,
    num: int,
    start: int = 0,
    stop: int | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Draws samples as the config says; see `sampling.sample_batches`."""
    return sampling.sample_batches(
        config_lib.build(config, "sampler"),
        setup.process,
        denoise,
        setup.image_shape,
        models.num_classes(setup.model),
        SampleOptions(**config_lib.common(config, "sampler")),
        seed=config.sample.seed,
        batch_size=config.sample.batch_size,
        num=num,
        start=start,
        stop=stop,
        decode=dataset.decoder(config),
    )


def training_step(config: ConfigDict, setup: Setup) -> Callable:
    """The train step on this process's devices, compiled at its first call.

    Runs that differ in nothing but the seed, the learning rate, which timesteps the k clusters are,
    and what happens between the steps share one step and its compiled programs.

    Returns:
      ``(state, batch) -> (state, metrics)``; see `train_step`. The state is donated. On CPUs not
      to be called inside another `jax.jit`, because it is compiled with options of its own.

    Several processes begin the first step together, however long each of them has compiled: a
    collective on CPUs waits half a minute and no longer. So there they begin every step together,
    whatever keeps one of them.
    """
    step, own = _step_and_own(config, setup)
    if jax.process_count() > 1:
        return _in_step(step, own)
    return lambda state, batch: step(state, batch, own)


def start_compiling(config: ConfigDict, setup: Setup) -> Callable:
    """The `training_step`, compiled from now on by a thread of its own.

    The first call waits for the thread and raises what went wrong in it. The thread ends with the
    compilation, whether or not anybody waits, and the program not before.

    With several processes it is the `training_step`, compiled at its first call, because JAX then
    asks for arrays.
    """
    if jax.process_count() > 1:
        return training_step(config, setup)
    step, own = _step_and_own(config, setup)
    lowered = step.lower(abstract_state(config, setup), _abstract_batch(config, setup), own)
    compiling = _in_a_thread(lowered.compile)

    def run(state, batch):
        compiling.result()
        return step(state, batch, own)

    return run


def _in_step(step, own):
    on_cpus = jax.default_backend() == "cpu"
    first = True

    def run(state, batch):
        nonlocal first
        if first:
            # In a thread, so that the main one hears of a signal.
            _in_a_thread(step.lower(state, batch, own).compile).result()
        if first or on_cpus:
            processes.barrier()
        first = False
        return step(state, batch, own)

    return run


def _in_a_thread(function):
    executor = ThreadPoolExecutor(1, thread_name_prefix="compiler")
    future = executor.submit(function)
    executor.shutdown(wait=False)
    return future


def _step_and_own(config, setup):
    step = _training_step(*_program(config, setup), tuple(jax.local_devices()))
    scale, order = _loss_scale(config, setup.clusters), setup.clusters.order
    own = _Own(
        np.int32(config.seed),
        np.float32(config.optimizer.learning_rate),
        setup.clusters.boundaries.astype(np.int32),
        None if order is None else order.astype(np.int32),
        None if scale is None else scale.astype(np.float32),
    )
    return step, own


def _program(config, setup):
    """What decides the program of a step; hashable."""
    specialist = config.clusters.specialist >= 0
    given = setup.given_weighting
    return config_lib.program(config), setup.model, setup.process, setup.draw, specialist, given


class _Own(NamedTuple):
    """What of a run its step takes as an argument."""

    seed: np.ndarray
    learning_rate: np.ndarray
    boundaries: np.ndarray
    timestep_order: np.ndarray | None
    loss_scale: np.ndarray | None


@functools.lru_cache(maxsize=8)
def _first_state(program, model, process, draw, specialist, given, image_shape, k, devices):
    """The state before the first step as a function of the seed: one program for all its leaves."""
    del process, draw

    def make(seed):
        params = init_params(model, image_shape, seed)
        weighting = _build_weighting(program, k, seed, None, specialist, given)
        return init_state(params, build_optimizer(program, 0.0), weighting)

    return jax.jit(
        make, out_shardings=replicated(devices), compiler_options=compiler_options(devices)
    )


def _first_state_of(config, setup):
    k = len(setup.clusters.boundaries) - 1
    return _first_state(*_program(config, setup), setup.image_shape, k, tuple(jax.local_devices()))


@functools.lru_cache(maxsize=8)
def _training_step(program, model, process, draw, specialist, given, devices):
    def step(state, batch, own, axis_name=None):
        k = len(own.boundaries) - 1
        setup = StepSetup(
            apply_fn=lambda params, x, t, y: model.apply(
                {"params": stop_gradients(params, program.optimizer.frozen)}, x, t, y
            ),
            process=process,
            boundaries=own.boundaries,
            weighting=_build_weighting(program, k, own.seed, own.loss_scale, specialist, given),
            optimizer=build_optimizer(program, own.learning_rate),
            seed=own.seed,
            draw=draw,
            timestep_order=own.timestep_order,
            form=program.method.gradient_form,
            microbatches=program.optimizer.microbatches,
            num_classes=models.num_classes(model),
            label_dropout=program.label_dropout,
            ema_decay=program.ema_decay,
            skip_nonfinite=program.optimizer.nonfinite == "skip",
        )
        return train_step(state, batch, setup, axis_name)

    return parallel_step(step, devices)


def new_state(config: ConfigDict, setup: Setup, params: dict | None = None) -> TrainState:
    """The state before the first step, on this process's devices.

    Args:
      config: the run's config.
      setup: what it describes.
      params: to begin with instead of fresh ones; see `init_from.initial_params`.
    """
    state = _first_state_of(config, setup)(np.int32(config.seed))
    if params is None:
        return state
    place = lambda: replicate(params, jax.local_devices())
    return state._replace(params=place(), ema_params=place())


def abstract_state(config: ConfigDict, setup: Setup) -> TrainState:
    """The shapes, types and places of a state's arrays."""
    abstract = jax.eval_shape(_first_state_of(config, setup), np.int32(0))
    sharding = replicated(jax.local_devices())
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract
    )


def _abstract_batch(config, setup):
    """The shapes and types of a batch of one process that has all of it."""
    size = config.data.batch_size
    return {
        "image": jax.ShapeDtypeStruct(
            (size, *setup.image_shape), np.float32 if config.autoencoder.name else np.uint8
        ),
        "label": jax.ShapeDtypeStruct((size,), np.int32),
    }
