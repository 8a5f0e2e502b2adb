"""Reads files of PyTorch and published weights without running code in them."""

from ant_jax.interop.plain_pickle import Global, Unread
from ant_jax.interop.state_file import read_metadata, read_state, write_state
from ant_jax.interop.torch_file import read
from ant_jax.published_weights import Names, WeightsError, from_torch, to_torch

__all__ = [
    "Global",
    "Names",
    "Unread",
    "WeightsError",
    "from_torch",
    "read",
    "read_metadata",
    "read_state",
    "to_torch",
    "write_state",
]
