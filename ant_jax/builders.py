"""From a config to the things it names."""

import functools
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import keystr
from ml_collections import ConfigDict

from ant_jax import diffusion, models, mtl
from ant_jax import settings as settings_lib
from ant_jax.diffusion.loss_weights.min_snr import MinSNR
from ant_jax.diffusion.loss_weights.p2 import P2
from ant_jax.runtime.files import user_path
from ant_jax.tasks import affinity, clustering

# Keeps PCGrad's random orders apart from the draws of the train step, which use the bare seed.
_ORDER_STREAM = 1 << 30
# The partition into random clusters is the same for every run, as that into intervals is.
_PARTITION_SEED = 0


class Method(NamedTuple):
    """How the denoising tasks are clustered and balanced.

    Attributes:
      boundaries: (k + 1,) of the clusters.
      weighting: the MTL method.
      draw: how timesteps are drawn.
      timestep_order: (T,) where clusters are no intervals, otherwise None.
      loss_scale: (k,) factors of the losses that the method sees, or None for ones.
    """

    boundaries: np.ndarray
    weighting: mtl.Weighting
    draw: str
    timestep_order: np.ndarray | None = None
    loss_scale: np.ndarray | None = None


def build_diffusion(config: ConfigDict) -> diffusion.Process:
    """The noise process with its loss weight; the same object for the same settings.

    Raises:
      ValueError: if float32 can't hold the loss weight.
    """
    settings = config.diffusion
    weight = {
        "none": lambda: None,
        "p2": lambda: P2(settings.p2_k, settings.p2_gamma),
        "min_snr": lambda: MinSNR(settings.min_snr_gamma),
    }[settings.loss_weight]()
    return diffusion.gaussian(
        settings.timesteps, settings.schedule, settings.variance, settings.prediction, weight
    )


def _network(config):
    return settings_lib.resolve(models, config.model.name, nn.Module)


def build_model(config: ConfigDict, channels: int, num_classes: int) -> nn.Module:
    """The network; ``num_classes`` is that of the data, or 0 for an unconditional model.

    Raises:
      ValueError: if the settings don't fit each other or the devices.
    """
    settings, network = config.model, _network(config)
    return models.build_network(
        network,
        {name: settings[name] for name in models.network_settings(network) if name in settings},
        channels=channels,
        num_classes=num_classes,
        learned_variance=config.diffusion.variance == "learned_range",
        dtype=jnp.dtype(settings.dtype),
    )


def meaning_of_params(config: ConfigDict) -> dict[str, Any]:
    """The settings that decide what the network's parameters do, whatever their shapes."""
    network, given = _network(config), config.model
    settings = models.network_settings(network)
    meaning = {"model.name": given.name}
    for name in models.meaning_of(network):
        meaning[f"model.{name}"] = given.get(name, settings[name].default)
    return meaning | {"diffusion.prediction": config.diffusion.prediction}


def init_params(model: nn.Module, image_shape: tuple[int, int, int], seed: int) -> dict:
    """The model's parameters before training."""
    return _init_params(jax.random.key(seed), model, image_shape)


@functools.partial(jax.jit, static_argnames=("model", "image_shape"))
def _init_params(key, model, image_shape):
    label = jnp.zeros(1, jnp.int32) if models.num_classes(model) else None
    return model.init(key, jnp.zeros((1, *image_shape)), jnp.zeros(1, jnp.int32), label)["params"]


def build_method(
    config: ConfigDict, log_snr: np.ndarray, boundaries: Sequence[int] | None = None
) -> Method:
    """The clusters of timesteps and the weighting of their losses.

    Args:
      config: the run's config.
      log_snr: (T,) of its noise process.
      boundaries: of the clusters that the method trains on, where they are known already.

    Raises:
      FileNotFoundError: if the task affinity asked for is not there.
      ValueError: if it is not one of T timesteps.
    """
    settings, num_timesteps = config.clusters, len(log_snr)
    boundaries = _boundaries(settings, log_snr) if boundaries is None else np.array(boundaries)
    order = None
    if settings.cost == "random":
        order = np.random.default_rng(_PARTITION_SEED).permutation(num_timesteps)
    k, scale, draw = len(boundaries) - 1, None, config.method.timesteps
    if is_vanilla(config):
        draw = "stratified" if settings.only >= 0 else "uniform"
    elif config.method.share_weighted:
        scale = np.diff(boundaries) * (k / num_timesteps)
    weighting = build_weighting(config, k, config.seed, is_vanilla(config), scale)
    return Method(boundaries, weighting, draw, order, scale)


def is_vanilla(config: ConfigDict) -> bool:
    """Whether no method weighs the losses: vanilla, or a specialist of one interval."""
    return config.clusters.only >= 0 or config.method.name == "vanilla"


def _boundaries(settings, log_snr):
    if settings.cost == "snr":
        boundaries = clustering.interval_clusters(clustering.snr_costs(log_snr), settings.k)
    elif settings.cost == "gradient":
        costs = clustering.gradient_costs(affinity.load(user_path(settings.affinity), len(log_snr)))
        boundaries = clustering.interval_clusters(costs, settings.k)
    else:
        boundaries = clustering.uniform_boundaries(len(log_snr), settings.k)
    return boundaries[settings.only : settings.only + 2] if settings.only >= 0 else boundaries


def build_weighting(
    config: ConfigDict,
    k: int,
    seed: int | jax.Array,
    vanilla: bool,
    loss_scale: jax.typing.ArrayLike | None = None,
) -> mtl.Weighting:
    """The weighting of k task losses; the seed and the scale may be traced."""
    if vanilla:
        return mtl.vanilla(k)
    settings = config.method
    fixed = settings.linear_weights
    weighting = {
        "linear": lambda: mtl.linear(k, tuple(map(float, fixed.split(","))) if fixed else ()),
        "uncertainty": lambda: mtl.uncertainty(k, settings.uncertainty_learning_rate),
        "pcgrad": lambda: mtl.pcgrad(k, seed + _ORDER_STREAM),
        "nash": lambda: mtl.nash(k),
    }[settings.name]()
    if settings.name == "nash":
        if settings.nash_update_every > 1:
            weighting = mtl.every(weighting, settings.nash_update_every)
        weighting = mtl.clipped(weighting, settings.nash_max_norm)
    if loss_scale is not None:
        weighting = mtl.scaled(weighting, loss_scale)
    # With the Gram matrix of the gradients at hand their cosines are reported, whoever needs it.
    return weighting._replace(needs=weighting.needs | ({"gram"} if settings.cosines else set()))


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
