"""Noise processes with their training losses, loss weights and samplers: one file each."""

from ant_jax.diffusion.continuous import ContinuousProcess
from ant_jax.diffusion.edm import EDM
from ant_jax.diffusion.flow import Flow
from ant_jax.diffusion.gaussian import GaussianDiffusion, gaussian
from ant_jax.diffusion.process import Denoise, Prediction, Process, Steps
from ant_jax.diffusion.schedule import alphas_bar, log_snr
from ant_jax.diffusion.spacing import spaced_timesteps
from ant_jax.diffusion.switch import switch_by_level

__all__ = [
    "EDM",
    "ContinuousProcess",
    "Denoise",
    "Flow",
    "GaussianDiffusion",
    "Prediction",
    "Process",
    "Steps",
    "alphas_bar",
    "gaussian",
    "log_snr",
    "spaced_timesteps",
    "switch_by_level",
]
