"""What others have written, read without running it: PyTorch's files and published weights."""

from ant_jax.interop.autoencoder import AUTOENCODER
from ant_jax.interop.dit import dit_names, has_positions, names_of_diffusers
from ant_jax.interop.inception import INCEPTION
from ant_jax.interop.plain_pickle import Global, Unread
from ant_jax.interop.state_file import read_metadata, read_state, write_state
from ant_jax.interop.torch_file import read
from ant_jax.interop.unet import ORDERS, published_unet, unet_names
from ant_jax.interop.weights import Names, WeightsError, from_torch, to_torch

__all__ = [
    "AUTOENCODER",
    "INCEPTION",
    "ORDERS",
    "Global",
    "Names",
    "Unread",
    "WeightsError",
    "dit_names",
    "from_torch",
    "has_positions",
    "names_of_diffusers",
    "published_unet",
    "read",
    "read_metadata",
    "read_state",
    "to_torch",
    "unet_names",
    "write_state",
]
