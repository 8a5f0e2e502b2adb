"""What others have written: PyTorch's files, and weights as parameters of the networks here."""

from ant_jax.interop.autoencoder_names import autoencoder_from_torch
from ant_jax.interop.plain_pickle import Global
from ant_jax.interop.torch_file import read
from ant_jax.interop.unet_names import unet_from_torch

__all__ = ["Global", "autoencoder_from_torch", "read", "unet_from_torch"]
