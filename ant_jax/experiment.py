"""What a config describes: the pieces of a run, checked before anything is compiled."""

import functools
from pathlib import Path
from typing import NamedTuple

import jax
from ml_collections import ConfigDict

from ant_jax import builders, checkpoint, data
from ant_jax import config as config_lib
from ant_jax.config import ConfigError
from ant_jax.diffusion import GaussianDiffusion
from ant_jax.models.dit import DiT
from ant_jax.parallel import replicated
from ant_jax.train_step import TrainState, check_step, init_state


class Experiment(NamedTuple):
    """What a config describes, before anything is compiled.

    Attributes:
      image_shape: (H, W, C) of what the model sees.
      model: the network.
      process: the noise process.
      method: clusters and weighting.
    """

    image_shape: tuple[int, int, int]
    model: DiT
    process: GaussianDiffusion
    method: builders.Method


def build(config: ConfigDict, channels: int, num_classes: int) -> Experiment:
    """Builds what a config describes for images of so many channels and classes.

    Raises:
      ConfigError: naming the setting, if the config is not valid or asks for labels there are not.
    """
    config_lib.validate(config)
    if config.model.conditional and not num_classes:
        raise ConfigError(
            f"config.model.conditional = True, but {config.data.name} has no labels: set it False"
        )
    process = builders.build_diffusion(config)
    model = builders.build_model(config, channels, num_classes if config.model.conditional else 0)
    size = config.data.image_size
    method = builders.build_method(config, process.log_snr)
    return Experiment((size, size, channels), model, process, method)


def open_data(config: ConfigDict) -> data.Source:
    """The training data.

    Raises:
      ConfigError: naming the setting, if they can't be opened.
    """
    settings = config.data
    try:
        source = data.load(settings.name, settings.split, settings.dir or None)
        data.check_crop(source, settings.crop, settings.image_size)
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(
            f"config.data.name = {settings.name!r}, config.data.split = {settings.split!r}, "
            f"config.data.dir = {settings.dir!r}: {error}"
        ) from error
    return source


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
            config.clusters.k,
            batch_size // count,
            timesteps=method.timesteps,
            microbatches=config.optimizer.microbatches,
            gradient_form=config.method.gradient_form,
            weighting=method.weighting,
        )
    except ValueError as error:
        raise ConfigError(
            f"config.data.batch_size = {batch_size} over {count} device(s): {error}"
        ) from None


def new_state(config: ConfigDict, experiment: Experiment) -> TrainState:
    """The state before the first step."""
    params = builders.init_params(experiment.model, experiment.image_shape, config.seed)
    optimizer = builders.build_optimizer(config)
    return init_state(params, optimizer, experiment.method.weighting, config.clusters.k)


def restore(
    config: ConfigDict, experiment: Experiment, workdir: Path, step: int | None = None
) -> tuple[int, TrainState] | None:
    """The newest intact checkpoint of a run, or that of a step, on this process's devices.

    Returns:
      (step, state), or None if there is no checkpoint. See `checkpoint.restore` for what it raises.
    """
    abstract = jax.eval_shape(functools.partial(new_state, config, experiment))
    sharding = replicated(jax.local_devices())
    template = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract
    )
    return checkpoint.restore(workdir / "checkpoints", template, step)
