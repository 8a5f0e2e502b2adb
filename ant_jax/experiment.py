"""What a config describes: the pieces of a run, checked before anything is compiled."""

import functools
import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jax.tree_util import Partial
from ml_collections import ConfigDict, FrozenConfigDict

from ant_jax import builders, models, sampling
from ant_jax import config as config_lib
from ant_jax.config import ConfigError
from ant_jax.diffusion import Process, samplers
from ant_jax.latents import dataset
from ant_jax.runtime import processes
from ant_jax.runtime.devices import compiler_options, parallel_step, replicate, replicated
from ant_jax.train_step import Setup, TrainState, check_step, init_state, train_step


class Experiment(NamedTuple):
    """What a config describes, before anything is compiled.

    Attributes:
      image_shape: (H, W, C) of what the model sees.
      model: the network, called as `ant_jax.models.dit.DiT` is.
      process: the noise process.
      method: clusters and weighting.
    """

    image_shape: tuple[int, int, int]
    model: nn.Module
    process: Process
    method: builders.Method


def build(
    config: ConfigDict,
    channels: int,
    num_classes: int,
    boundaries: Sequence[int] | None = None,
) -> Experiment:
    """Builds what a config describes.

    Args:
      config: the run's config.
      channels: of the images, or of their latents.
      num_classes: of the data.
      boundaries: of the clusters where they are known already, as those of a run are once it has
        begun, whatever becomes of the file they came from.

    Raises:
      ConfigError: naming the setting, if the config is not valid or asks for labels there are not,
        or if the boundaries can't be of its clusters.
    """
    config_lib.validate(config)
    if config.model.conditional and not num_classes:
        raise ConfigError(
            f"config.model.conditional = True, but {config.data.name} has no labels: set it False"
        )
    if config.sample.guidance_channels > channels:
        raise ConfigError(
            f"config.sample.guidance_channels = {config.sample.guidance_channels} must not exceed "
            f"the {channels} channels of what the network sees"
        )
    try:
        process = builders.build_diffusion(config)
    except ValueError as error:
        raise ConfigError(f"config.diffusion: {error}") from error
    size = config.data.image_size
    if config.autoencoder.name:
        size, _, _ = dataset.latent_shape(config)
    if boundaries is not None:
        _check_boundaries(config, boundaries)
    for name in ("data.batch_size", "sample.batch_size"):
        _check_memory(config, name, (size, size, channels))
    try:
        num_labels = num_classes if config.model.conditional else 0
        model = builders.build_model(config, channels, num_labels)
    except ValueError as error:
        raise ConfigError(f"config.model: {error}") from error
    multiple = models.input_multiple(model)
    if size % multiple:
        raise ConfigError(
            f"config.data.image_size = {config.data.image_size} gives the network sides of {size}, "
            f"which must be divisible by {multiple}, by config.model"
        )
    if config.optimizer.frozen:
        _check_frozen(config.optimizer.frozen, model, (size, size, channels))
    try:
        method = builders.build_method(config, process.log_snr(np.arange(process.span)), boundaries)
    except (ValueError, OSError) as error:
        raise ConfigError(f"config.clusters: {error}") from error
    return Experiment((size, size, channels), model, process, method)


def _check_memory(config, name, image_shape):
    """Refuses a batch whose images alone, as float32, don't fit this machine."""
    group, setting = name.split(".")
    need = 4 * config[group][setting] * math.prod(image_shape)
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if need > there:
        raise ConfigError(
            f"config.{name} = {config[group][setting]} images of {'x'.join(map(str, image_shape))} "
            f"take {need >> 30} GiB, more than the {there >> 30} GiB of this machine"
        )


def _check_frozen(pattern, model, image_shape):
    params = jax.eval_shape(lambda: builders.init_params(model, image_shape, 0))
    names = jax.tree.leaves(builders.frozen(params, pattern))
    if not any(names) or all(names):
        raise ConfigError(
            f"config.optimizer.frozen = {pattern!r} matches {'all' if any(names) else 'none'} of "
            "the parameters; they are named as in the table at the start of a run"
        )


def abstract_params(pieces: Experiment) -> dict:
    """The shapes and types of the network's parameters."""
    return jax.eval_shape(lambda: builders.init_params(pieces.model, pieces.image_shape, 0))


def _check_boundaries(config, boundaries):
    k, last = config.clusters.k, config.diffusion.timesteps
    one = config.clusters.only >= 0
    if (
        len(boundaries) != (2 if one else k + 1)
        or any(low >= high for low, high in itertools.pairwise(boundaries))
        or not (boundaries[0] >= 0 and boundaries[-1] <= last)
        or not (one or boundaries[-1] - boundaries[0] == last)
    ):
        raise ConfigError(
            f"the boundaries {list(boundaries)} of facts.json are not those of "
            f"{'one of ' if one else ''}config.clusters.k = {k} clusters of "
            f"config.diffusion.timesteps = {last}"
        )


def denoiser(pieces: Experiment, params: dict) -> Partial:
    """The network as samplers take it, ``(x, t, y) -> output``; the parameters stay arguments."""
    return Partial(pieces.model.apply, {"params": params})


def draw_samples(
    config: ConfigDict,
    pieces: Experiment,
    denoise: Partial,
    num: int,
    start: int = 0,
    stop: int | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Draws samples as ``config.sample`` says; see `sampling.sample_batches`."""
    settings = config.sample
    sampler = samplers.ddim(settings.eta) if settings.sampler == "ddim" else samplers.ddpm()
    return sampling.sample_batches(
        sampler,
        pieces.process,
        denoise,
        pieces.image_shape,
        models.num_classes(pieces.model),
        samplers.SampleOptions(
            num_steps=settings.num_steps,
            spacing=settings.spacing,
            guidance=settings.guidance,
            guidance_channels=settings.guidance_channels,
            clip_x0=config.diffusion.clip_x0,
        ),
        seed=settings.seed,
        batch_size=settings.batch_size,
        num=num,
        start=start,
        stop=stop,
        decode=dataset.decoder(config),
    )


def training_step(config: ConfigDict, pieces: Experiment) -> Callable:
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
    step, own = _step_and_own(config, pieces)
    if jax.process_count() > 1:
        return _in_step(step, own)
    return lambda state, batch: step(state, batch, own)


def start_compiling(config: ConfigDict, pieces: Experiment) -> Callable:
    """The `training_step`, compiled from now on by a thread of its own.

    The first call waits for the thread and raises what went wrong in it. The thread ends with the
    compilation, whether or not anybody waits, and the program not before.

    With several processes it is the `training_step`, compiled at its first call, because JAX then
    asks for arrays.
    """
    if jax.process_count() > 1:
        return training_step(config, pieces)
    step, own = _step_and_own(config, pieces)
    lowered = step.lower(abstract_state(config, pieces), _abstract_batch(config, pieces), own)
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


def _step_and_own(config, pieces):
    method = pieces.method
    step = _training_step(
        _shared(config),
        pieces.model,
        pieces.process,
        method.draw,
        builders.is_vanilla(config),
        tuple(jax.local_devices()),
    )
    own = _Own(
        np.int32(config.seed),
        np.float32(config.optimizer.learning_rate),
        method.boundaries.astype(np.int32),
        None if method.timestep_order is None else method.timestep_order.astype(np.int32),
        None if method.loss_scale is None else method.loss_scale.astype(np.float32),
    )
    return step, own


class _Own(NamedTuple):
    """What of a run its step takes as an argument."""

    seed: np.ndarray
    learning_rate: np.ndarray
    boundaries: np.ndarray
    timestep_order: np.ndarray | None
    loss_scale: np.ndarray | None


def _shared(config):
    """What decides the program of a step, apart from what is built from it elsewhere; hashable."""
    shared = ConfigDict(config.to_dict())
    for group in ("data", "sample", "checkpoint", "evaluation", "clusters", "autoencoder"):
        del shared[group]
    for name in ("log_every", "tensorboard", "profile_steps", "init_from", "init_facts"):
        del shared[name]
    if shared.optimizer.schedule == "constant":
        del shared["num_steps"]
    del shared["seed"], shared.optimizer["learning_rate"], shared.method["share_weighted"]
    return FrozenConfigDict(shared)


@functools.lru_cache(maxsize=8)
def _first_state(shared, model, image_shape, vanilla, k, devices):
    """The state before the first step as a function of the seed: one program for all its leaves."""

    def make(seed):
        params = builders.init_params(model, image_shape, seed)
        weighting = builders.build_weighting(shared, k, seed, vanilla)
        return init_state(params, builders.build_optimizer(shared, 0.0), weighting)

    return jax.jit(
        make, out_shardings=replicated(devices), compiler_options=compiler_options(devices)
    )


def _first_state_of(config, pieces):
    method = pieces.method
    return _first_state(
        _shared(config),
        pieces.model,
        pieces.image_shape,
        builders.is_vanilla(config),
        len(method.boundaries) - 1,
        tuple(jax.local_devices()),
    )


@functools.lru_cache(maxsize=8)
def _training_step(shared, model, process, draw, vanilla, devices):
    def step(state, batch, own, axis_name=None):
        k = len(own.boundaries) - 1
        setup = Setup(
            apply_fn=lambda params, x, t, y: model.apply(
                {"params": builders.stop_gradients(params, shared.optimizer.frozen)}, x, t, y
            ),
            process=process,
            boundaries=own.boundaries,
            weighting=builders.build_weighting(shared, k, own.seed, vanilla, own.loss_scale),
            optimizer=builders.build_optimizer(shared, own.learning_rate),
            seed=own.seed,
            draw=draw,
            timestep_order=own.timestep_order,
            form=shared.method.gradient_form,
            microbatches=shared.optimizer.microbatches,
            num_classes=models.num_classes(model),
            label_dropout=shared.label_dropout,
            ema_decay=shared.ema_decay,
            skip_nonfinite=shared.optimizer.nonfinite == "skip",
        )
        return train_step(state, batch, setup, axis_name)

    return parallel_step(step, devices)


def check_batch(config: ConfigDict, method: builders.Method) -> None:
    """Raises a ConfigError if the batch can't be split over devices, microbatches and clusters."""
    batch_size, count = config.data.batch_size, jax.device_count()
    if batch_size % count:
        raise ConfigError(
            f"config.data.batch_size = {batch_size} must be divisible by the number of devices, "
            f"{count}"
        )
    try:
        check_step(
            len(method.boundaries) - 1,
            batch_size // count,
            draw=method.draw,
            form=config.method.gradient_form,
            microbatches=config.optimizer.microbatches,
            weighting=method.weighting,
        )
    except ValueError as error:
        raise ConfigError(
            f"config.data.batch_size = {batch_size} over {count} device(s): {error}"
        ) from None


def new_state(config: ConfigDict, experiment: Experiment, params: dict | None = None) -> TrainState:
    """The state before the first step, on this process's devices.

    Args:
      config: the run's config.
      experiment: what it describes.
      params: to begin with instead of fresh ones; see `init_from.initial_params`.
    """
    state = _first_state_of(config, experiment)(np.int32(config.seed))
    if params is None:
        return state
    place = lambda: replicate(params, jax.local_devices())
    return state._replace(params=place(), ema_params=place())


def abstract_state(config: ConfigDict, experiment: Experiment) -> TrainState:
    """The shapes, types and places of a state's arrays."""
    abstract = jax.eval_shape(_first_state_of(config, experiment), np.int32(0))
    sharding = replicated(jax.local_devices())
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract
    )


def _abstract_batch(config, pieces):
    """The shapes and types of a batch of one process that has all of it."""
    size = config.data.batch_size
    return {
        "image": jax.ShapeDtypeStruct(
            (size, *pieces.image_shape), np.float32 if config.autoencoder.name else np.uint8
        ),
        "label": jax.ShapeDtypeStruct((size,), np.int32),
    }
