"""What a config describes: the pieces of a run, checked before anything is compiled."""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.tree_util import Partial
from ml_collections import ConfigDict, FrozenConfigDict

from ant_jax import builders, checkpoint, data
from ant_jax import config as config_lib
from ant_jax.config import ConfigError
from ant_jax.diffusion import GaussianDiffusion
from ant_jax.files import write_bytes
from ant_jax.models.dit import DiT
from ant_jax.parallel import parallel_step, replicated
from ant_jax.train_step import TrainState, check_step, init_state, train_step


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


def build(
    config: ConfigDict,
    channels: int,
    num_classes: int,
    boundaries: Sequence[int] | None = None,
) -> Experiment:
    """Builds what a config describes.

    Args:
      config: the run's config.
      channels: of the images.
      num_classes: of the data.
      boundaries: of the clusters where they are known already, as those of a run are once it has
        begun, whatever becomes of the file they came from.

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
    try:
        method = builders.build_method(config, process.log_snr, boundaries)
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(f"config.clusters: {error}") from error
    return Experiment((size, size, channels), model, process, method)


def open_data(config: ConfigDict, split: str | None = None) -> data.Source:
    """The training data, or another split.

    Raises:
      ConfigError: naming the setting, if they can't be opened.
    """
    settings = config.data
    split = settings.split if split is None else split
    try:
        source = data.load(settings.name, split, settings.dir or None)
        data.check_crop(source, settings.crop, settings.image_size)
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(
            f"config.data.name = {settings.name!r}, split = {split!r}, "
            f"config.data.dir = {settings.dir!r}: {error}"
        ) from error
    return source


def save_facts(pieces: Experiment, source: data.Source, workdir: Path) -> None:
    """Writes ``facts.json``: what a run found out when it began, by the arguments of `build`."""
    facts = {
        "channels": source.image_shape[-1],
        "num_classes": source.num_classes,
        "boundaries": pieces.method.boundaries.tolist(),
    }
    write_bytes(workdir / "facts.json", json.dumps(facts).encode())


def load_facts(workdir: Path) -> dict[str, Any]:
    """What `save_facts` wrote."""
    return json.loads((workdir / "facts.json").read_text())


def denoiser(pieces: Experiment, params: dict) -> Partial:
    """The network as samplers take it, ``(x, t, y) -> output``; the parameters stay arguments."""
    return Partial(pieces.model.apply, {"params": params})


def training_step(config: ConfigDict, pieces: Experiment) -> Callable:
    """The train step on this process's devices, compiled at its first call.

    Runs that differ in nothing but the seed, the learning rate, which timesteps the k clusters are,
    and what happens between the steps share one step and its compiled programs.

    Returns:
      ``(state, batch) -> (state, metrics)``; see `train_step`. The state is donated.
    """
    method = pieces.method
    step = _training_step(
        _shared(config),
        pieces.model,
        pieces.process,
        method.timesteps,
        method.weighting is None,
        tuple(jax.local_devices()),
    )
    own = _Own(
        np.int32(config.seed),
        np.float32(config.optimizer.learning_rate),
        method.boundaries.astype(np.int32),
        None if method.timestep_order is None else method.timestep_order.astype(np.int32),
        None if method.loss_scale is None else method.loss_scale.astype(np.float32),
    )
    return lambda state, batch: step(state, batch, own)


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
    for group in ("data", "sample", "checkpoint", "evaluation", "clusters"):
        del shared[group]
    for name in ("log_every", "tensorboard", "profile_steps"):
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
        weighting = None if vanilla else builders.build_weighting(shared, k, seed)
        return init_state(params, builders.build_optimizer(shared, 0.0), weighting, k)

    return jax.jit(make, out_shardings=replicated(devices))


def _first_state_of(config, pieces):
    method = pieces.method
    return _first_state(
        _shared(config),
        pieces.model,
        pieces.image_shape,
        method.weighting is None,
        len(method.boundaries) - 1,
        tuple(jax.local_devices()),
    )


@functools.lru_cache(maxsize=8)
def _training_step(shared, model, process, timesteps, vanilla, devices):
    def step(state, batch, own, axis_name=None):
        k = len(own.boundaries) - 1
        return train_step(
            state,
            batch,
            apply_fn=lambda params, x, t, y: model.apply({"params": params}, x, t, y),
            diffusion=process,
            boundaries=own.boundaries,
            weighting=None if vanilla else builders.build_weighting(shared, k, own.seed),
            optimizer=builders.build_optimizer(shared, own.learning_rate),
            seed=own.seed,
            timesteps=timesteps,
            gradient_form=shared.method.gradient_form,
            microbatches=shared.optimizer.microbatches,
            num_classes=model.num_classes,
            label_dropout=shared.label_dropout,
            ema_decay=shared.ema_decay,
            timestep_order=own.timestep_order,
            loss_scale=own.loss_scale,
            axis_name=axis_name,
        )

    return parallel_step(step, devices)


def images(config: ConfigDict, split: str, num: int) -> tuple[np.ndarray, np.ndarray]:
    """The first images of a fixed shuffle of a split, or all of them if there are fewer.

    Returns:
      float32 (num, H, W, C) in [-1, 1] and int32 labels (num,).

    Raises:
      ConfigError: naming the setting, if they can't be opened.
    """
    source = open_data(config, split)
    settings = config.data
    batches = data.batches(
        source,
        batch_size=min(num, len(source)),
        seed=0,
        image_size=settings.image_size,
        crop=settings.crop,
        replace_unreadable=settings.replace_unreadable,
    )
    batch = next(batches)
    return np.float32(batch["image"]) / 127.5 - 1, batch["label"]


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
    """The state before the first step, on this process's devices."""
    return _first_state_of(config, experiment)(np.int32(config.seed))


def restore(
    config: ConfigDict, experiment: Experiment, workdir: Path, step: int | None = None
) -> tuple[int, TrainState] | None:
    """The newest intact checkpoint of a run, or that of a step, on this process's devices.

    Returns:
      (step, state), or None if there is no checkpoint. See `checkpoint.restore` for what it raises.
    """
    abstract = jax.eval_shape(_first_state_of(config, experiment), np.int32(0))
    sharding = replicated(jax.local_devices())
    template = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract
    )
    return checkpoint.restore(workdir / "checkpoints", template, step)
