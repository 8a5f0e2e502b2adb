"""From a config to a `Setup`, with all checks that need no compilation."""

import functools
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from jax.tree_util import Partial
from ml_collections import ConfigDict, FrozenConfigDict

from ant_jax import config as config_lib
from ant_jax import dataset, models, mtl, optimizers, sampling, setup_checks
from ant_jax.config import ConfigError
from ant_jax.diffusion import Process
from ant_jax.diffusion.samplers import SampleOptions
from ant_jax.runtime.sharded import gathering
from ant_jax.tasks import affinity as affinities
from ant_jax.tasks.clusterings import Clusters
from ant_jax.tasks.clusters import NEEDS_INTERVALS, level_boundaries, levels
from ant_jax.train_step import check_step

# Keeps a method's random draws apart from those of the train step, which use the bare seed.
_METHOD_STREAM = 1 << 30


class Setup(NamedTuple):
    """What a config describes, before anything is compiled.

    Attributes:
      image_shape: (H, W, C) of the network's input.
      model: the network; see `ant_jax.models`.
      process: the noise process.
      clusters: the noise levels of each task; a specialist has one task.
      weighting: the multi-task method with its wrappers.
      draw: how noise levels are drawn; see `tasks.clusters.draw`.
      given_weighting: the method that the caller gave, if any.
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
      num_classes: of the data; 0 if it has no labels.
      boundaries: of the tasks, if they are known. A run that goes on keeps its boundaries, even
        if the file that they came from has changed.
      model: a network, instead of the one that the config names.
      process: a noise process, instead of the one that the config names.
      weighting: a method, instead of the one that the config names.

    Raises:
      ConfigError: naming the setting, if the config is not valid, needs labels that the data does
        not have, or does not fit the boundaries.
    """
    config_lib.validate(config)
    for name, value, kind in (
        ("model", model, nn.Module),
        ("process", process, Process),
        ("weighting", weighting, mtl.Weighting),
    ):
        if value is not None and not isinstance(value, kind):
            way = f": call it, {value.__name__}()" if isinstance(value, type) else ""
            raise ConfigError(f"{name}= must be a {kind.__name__}, got {value!r}{way}")
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
        process = config_lib.build_process(config)
    if boundaries is not None:
        setup_checks.check_boundaries(config, boundaries, process)
    size = config.data.image_size
    if config.autoencoder.name:
        size, _, _ = dataset.latent_shape(config)
    shape = (size, size, channels)
    for group, name in (("data", "batch_size"), ("sample", "batch_size")):
        setup_checks.check_memory(config, group, name, shape)
    if model is None:
        model = build_model(config, channels, num_classes if config.model.conditional else 0)
    setup_checks.check_labels(config, models.num_classes(model))
    multiple = models.input_multiple(model)
    if size % multiple:
        # Of pixels, if the network sees latents.
        step = multiple * (config.data.image_size // size)
        below = config.data.image_size // step * step
        near = f"{below} or {below + step}" if below else below + step
        raise ConfigError(
            f"config.data.image_size = {config.data.image_size} must be a multiple of {step} for "
            f"this config.model: {near}, for example"
        )
    for name in ("frozen", "decay_mask"):
        if config.optimizer[name]:
            params = jax.eval_shape(lambda: init_params(model, shape, 0))
            setup_checks.check_pattern(config, name, params)
    for name, argument in (("weight_decay", "weight_decay"), ("decay_mask", "mask")):
        if config.optimizer[name] and not config_lib.takes(config, "optimizer", argument):
            raise ConfigError(
                f"config.optimizer.{name} = {config.optimizer[name]!r} has no effect: "
                f"{config.optimizer.name!r} has no argument {argument!r}; leave the setting out"
            )
    clusters = build_clusters(config, process, boundaries)
    settings = config.method
    if clusters.order is not None and (settings.suppress != 1 or settings.curriculum_steps):
        raise ConfigError(f"config.clusters.name = {config.clusters.name!r}: {NEEDS_INTERVALS}")
    k = len(clusters.boundaries) - 1
    if weighting is not None and weighting.k != k:
        raise ConfigError(
            f"the weighting that was given is for {weighting.k} tasks, and config.clusters.k = {k}"
        )
    specialist, scale = config.clusters.specialist >= 0, interval_scale(config, process, clusters)
    built = build_weighting(config, k, config.seed, scale, specialist, weighting)
    draw = _draw(config, weighting)
    return Setup(shape, model, process, clusters, built, draw, weighting)


def build_model(config: ConfigDict, channels: int, num_classes: int) -> nn.Module:
    """The network; equal settings give equal networks.

    Args:
      config: the run's config.
      channels: of the network's input.
      num_classes: of the data; 0 for an unconditional network.

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
    """The noise levels of each task.

    Args:
      config: the run's config.
      process: the noise process.
      boundaries: of the tasks, if they are known; otherwise they are computed.
    """
    settings = config.clusters
    # Intervals are their boundaries. Random clusters and those of a user may have an order as well.
    if boundaries is not None and settings.name != "random" and ":" not in settings.name:
        return Clusters(np.array(boundaries))
    log_snr = process.log_snr(levels(process))
    clusters = config_lib.build(config, "clusters", log_snr=log_snr, k=settings.k)
    if settings.name == "gradient":
        _compare_affinity(config)
    if clusters.order is not None and not isinstance(process.span, int):
        raise ConfigError(
            f"config.clusters.name = {settings.name!r} forms tasks that are no intervals, which "
            f"config.process.name = {config.process.name!r} with continuous levels does not have"
        )
    found = level_boundaries(process, clusters.boundaries)
    if settings.specialist >= 0:
        found = found[settings.specialist : settings.specialist + 2]
    return clusters._replace(boundaries=found if boundaries is None else np.array(boundaries))


def task_ends(setup: Setup) -> tuple[np.ndarray, ...] | None:
    """The first and the last noise level of each task, and their log-SNR: four arrays (k,).

    None if the tasks are no intervals.
    """
    boundaries, process = setup.clusters.boundaries, setup.process
    if setup.clusters.order is not None:
        return None
    # The last level of a task is below the first of the next one, if levels are integers.
    first, last = boundaries[:-1], boundaries[1:] - isinstance(process.span, int)
    return first, last, process.log_snr(first), process.log_snr(last)


def behind_affinity(config: ConfigDict) -> dict[str, Any]:
    """The settings by which one task affinity differs from another, by ``"group.name"``."""
    own = [f"data.{name}" for name in config_lib.arguments(config, "data")]
    data = {"data.name", "data.image_size", "autoencoder.name", *own}
    return json.loads(
        json.dumps(
            {
                name: value
                for name, value in config_lib.flatten(config).items()
                if name in data or name.startswith(("process.", "model."))
            }
        )
    )


def _compare_affinity(config):
    there = affinities.made_from(os.path.expanduser(config.clusters.affinity))
    now = behind_affinity(config)
    differing = [name for name in there if there[name] != now.get(name)]
    if differing:
        logging.warning(
            "config.clusters.affinity = %r was measured with other settings: %s",
            config.clusters.affinity,
            "; ".join(
                f"config.{name}: {there[name]!r} there, {now.get(name, 'not set')!r} here"
                for name in differing
            ),
        )


def interval_scale(config: ConfigDict, process: Process, clusters: Clusters) -> np.ndarray | None:
    """The factor of each task loss that ``weight_by_interval_size`` asks for, (k,), else None."""
    if not config.method.weight_by_interval_size:
        return None
    sizes = np.diff(process.cdf(clusters.boundaries))
    return sizes * (len(sizes) / sizes.sum())


def build_weighting(
    config: ConfigDict | FrozenConfigDict,
    k: int,
    seed: int | jax.Array,
    loss_scale: jax.typing.ArrayLike | None,
    specialist: bool,
    given: mtl.Weighting | None,
) -> mtl.Weighting:
    """The weighting of k tasks with the wrappers that the config names.

    Args:
      config: the run's config, or the part of it that decides the program.
      k: number of tasks.
      seed: of the run; may be traced.
      loss_scale: see `interval_scale`; may be traced.
      specialist: whether one task is trained alone, which needs no method.
      given: a method, instead of the one that the config names.
    """
    settings = config.method
    weighting = _build_weighting(config, k, seed, loss_scale, specialist, given)
    if settings.level_uncertainty:
        weighting = mtl.level_uncertainty(weighting, settings.level_uncertainty)
    if settings.pike:
        weighting = mtl.pike(
            weighting,
            settings.pike,
            settings.pike_noise,
            settings.pike_blocks,
            settings.pike_every,
        )
    return weighting


def _build_weighting(config, k, seed, loss_scale, specialist, given):
    if specialist:
        return mtl.vanilla(k)
    settings = config.method
    weighting = given
    if weighting is None:
        weighting = config_lib.build(config, "method", k=k, seed=seed + _METHOD_STREAM)
    if given is not None or ":" in settings.name:
        setup_checks.check_weigh(
            weighting, "weighting=" if given else f"config.method.name = {settings.name!r}"
        )
    if settings.update_every > 1:
        weighting = mtl.every(weighting, settings.update_every)
    if settings.max_norm:
        weighting = mtl.clipped(weighting, settings.max_norm)
    if loss_scale is not None:
        weighting = mtl.scaled(weighting, loss_scale)
    # The cosines are computed from the Gram matrix, which the method may not need itself.
    return weighting._replace(needs=weighting.needs | ({"gram"} if settings.cosines else set()))


def build_optimizer(
    config: ConfigDict | FrozenConfigDict,
    learning_rate: float | jax.Array,
    axis_name: str | None = None,
) -> optimizers.Optimizer:
    """The optimizer with its warm-up and schedule; it gets the combined gradient, clipped first.

    Args:
      config: the run's config, or the part of it that decides the program.
      learning_rate: the value after the warm-up; may be traced.
      axis_name: name of the mapped axis over which the gradients are split, if they are.
    """
    settings = config.optimizer
    schedule = config_lib.build_schedule(config, learning_rate)
    if settings.warmup_steps:
        warmup = optax.linear_schedule(0, learning_rate, settings.warmup_steps)
        schedule = optax.join_schedules([warmup, schedule], [settings.warmup_steps])
    mask = None
    if settings.decay_mask:
        mask = functools.partial(optimizers.matching, pattern=settings.decay_mask)
    optimizer = config_lib.build(
        config,
        "optimizer",
        learning_rate=schedule,
        weight_decay=settings.weight_decay,
        mask=mask,
    )
    if settings.clip_norm:
        optimizer = optimizers.clipped(optimizer, settings.clip_norm, axis_name)
    if settings.frozen:
        optimizer = optimizers.freezing(optimizer, settings.frozen)
    return optimizer


def _draw(config, given):
    if config.clusters.specialist >= 0 or config.method.pike:
        return "stratified"
    if config.method.draw != "auto":
        return config.method.draw
    return "uniform" if config.method.name == "vanilla" and given is None else "stratified"


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
            batch_size,
            count,
            draw=setup.draw,
            form=form,
            microbatches=config.optimizer.microbatches,
            weighting=setup.weighting,
            curriculum_steps=config.method.curriculum_steps,
        )
    except ValueError as error:
        raise ConfigError(f"config.data.batch_size = {batch_size}: {error}") from None


def init_params(model: nn.Module, image_shape: tuple[int, int, int], seed: int | jax.Array) -> dict:
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
    """The network with its parameters bound, ``(x, t, y) -> output``; a pytree of them."""
    return Partial(gathering(setup.model.apply, params), {"params": params})


def nfe(config: ConfigDict) -> int:
    """How often the network is called for a sample; with guidance each call has a doubled batch."""
    return config_lib.build(config, "sampler").calls(config.sampler.num_steps)


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
        labels=config.sample.labels,
        start=start,
        stop=stop,
        decode=dataset.decoder(config),
    )
