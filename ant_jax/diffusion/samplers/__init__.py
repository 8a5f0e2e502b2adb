"""Samplers: one file each, and the loop that they share."""

from ant_jax.diffusion.samplers.ddim import ddim
from ant_jax.diffusion.samplers.ddpm import ddpm
from ant_jax.diffusion.samplers.sampler import Level, SampleOptions, Sampler

__all__ = ["Level", "SampleOptions", "Sampler", "ddim", "ddpm"]
