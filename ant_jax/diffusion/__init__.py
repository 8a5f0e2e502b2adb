"""Gaussian diffusion: noise schedules, training losses and samplers."""

from ant_jax.diffusion import loss_weights
from ant_jax.diffusion.gaussian import ApplyFn, GaussianDiffusion, respace
from ant_jax.diffusion.sampler import ddim_sample, ddpm_sample
from ant_jax.diffusion.schedule import alphas_bar, log_snr
from ant_jax.diffusion.spacing import spaced_timesteps
from ant_jax.diffusion.switch import switch_by_timestep

__all__ = [
    "ApplyFn",
    "GaussianDiffusion",
    "alphas_bar",
    "ddim_sample",
    "ddpm_sample",
    "log_snr",
    "loss_weights",
    "respace",
    "spaced_timesteps",
    "switch_by_timestep",
]
