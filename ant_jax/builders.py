"""From a config to the things it names."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from ant_jax import clustering, diffusion, mtl
from ant_jax.diffusion import loss_weights
from ant_jax.models.dit import DiT

# Keeps PCGrad's random orders apart from the draws of the train step, which use the bare seed.
_ORDER_STREAM = 1 << 30


class Method(NamedTuple):
    """How the denoising tasks are clustered and balanced; weighting None is vanilla."""

    boundaries: np.ndarray
    weighting: mtl.Weighting | None
    timesteps: str


def build_diffusion(config: ConfigDict) -> diffusion.GaussianDiffusion:
    """The noise process with its loss weight; the same object for the same settings."""
    settings = config.diffusion
    weights = {
        "none": (),
        "p2": (settings.p2_k, settings.p2_gamma),
        "min_snr": (settings.min_snr_gamma,),
    }
    name = settings.loss_weight
    return _diffusion(
        settings.schedule, settings.timesteps, settings.variance, name, *weights[name]
    )


# Compiled samplers are found again by the identity of the process and the model.
@functools.cache
def _diffusion(schedule, timesteps, variance, weight_name, *weight_settings):
    alphas_bar = diffusion.alphas_bar(schedule, timesteps)
    weight = None
    if weight_name != "none":
        weight_function = {"p2": loss_weights.p2, "min_snr": loss_weights.min_snr}[weight_name]
        weight = weight_function(diffusion.log_snr(alphas_bar), *weight_settings)
    return diffusion.GaussianDiffusion(alphas_bar, variance, weight)


def build_model(config: ConfigDict, channels: int, num_classes: int) -> DiT:
    """The network; ``num_classes`` is that of the data, or 0 for an unconditional model."""
    settings = config.model
    return _dit(
        width=settings.width,
        depth=settings.depth,
        heads=settings.heads,
        patch=settings.patch,
        channels=channels,
        num_classes=num_classes,
        learned_variance=config.diffusion.variance == "learned_range",
        dtype=jnp.dtype(settings.dtype),
        remat=settings.remat,
    )


_dit = functools.cache(DiT)


def init_params(model: DiT, image_shape: tuple[int, int, int], seed: int) -> dict:
    """The model's parameters before training."""
    label = jnp.zeros(1, jnp.int32) if model.num_classes else None
    init = jax.jit(model.init)
    return init(jax.random.key(seed), jnp.zeros((1, *image_shape)), jnp.zeros(1, jnp.int32), label)[
        "params"
    ]


def build_method(config: ConfigDict, log_snr: np.ndarray) -> Method:
    """The clusters of timesteps and the weighting of their losses."""
    k, settings = config.clusters.k, config.method
    if config.clusters.cost == "snr":
        boundaries = clustering.interval_clusters(clustering.snr_costs(log_snr), k)
    else:
        boundaries = clustering.uniform_boundaries(len(log_snr), k)
    if settings.name == "vanilla":
        return Method(boundaries, None, "uniform")
    weighting = {
        "linear": lambda: mtl.linear(k),
        "uncertainty": lambda: mtl.uncertainty(k, settings.uncertainty_learning_rate),
        "pcgrad": lambda: mtl.pcgrad(k, config.seed + _ORDER_STREAM),
        "nash": lambda: mtl.nash(k, settings.nash_update_every, settings.nash_max_norm),
    }[settings.name]()
    return Method(boundaries, weighting, settings.timesteps)


def build_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """AdamW with warm-up, clipping of the combined gradient in front of it where asked for."""
    settings = config.optimizer
    schedule = optax.constant_schedule(settings.learning_rate)
    if settings.schedule == "cosine":
        decay_steps = max(config.num_steps - settings.warmup_steps, 1)
        schedule = optax.cosine_decay_schedule(settings.learning_rate, decay_steps)
    if settings.warmup_steps:
        warmup = optax.linear_schedule(0, settings.learning_rate, settings.warmup_steps)
        schedule = optax.join_schedules([warmup, schedule], [settings.warmup_steps])
    adamw = optax.adamw(schedule, weight_decay=settings.weight_decay)
    if settings.clip_norm:
        return optax.chain(optax.clip_by_global_norm(settings.clip_norm), adamw)
    return adamw
