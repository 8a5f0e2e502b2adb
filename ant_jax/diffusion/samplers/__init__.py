"""Samplers: one file each, and the loop that they share."""

from ant_jax.diffusion.samplers.ddim import ddim
from ant_jax.diffusion.samplers.ddpm import ddpm
from ant_jax.diffusion.samplers.dpm_solver import dpm_solver
from ant_jax.diffusion.samplers.euler_maruyama import euler_maruyama
from ant_jax.diffusion.samplers.heun import heun
from ant_jax.diffusion.samplers.sampler import Level, SampleOptions, Sampler

__all__ = [
    "Level",
    "SampleOptions",
    "Sampler",
    "ddim",
    "ddpm",
    "dpm_solver",
    "euler_maruyama",
    "heun",
]
