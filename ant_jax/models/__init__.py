"""Denoising networks, as Flax Linen modules."""

from ant_jax.models.autoencoder import Autoencoder
from ant_jax.models.dit import DiT
from ant_jax.models.unet import UNet

__all__ = ["Autoencoder", "DiT", "UNet"]
