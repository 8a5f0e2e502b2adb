"""The implementation of attention."""

from typing import Annotated, Any, Literal, get_args

import jax
import jax.numpy as jnp

from ant_jax.settings import Affects

Implementation = Literal["xla", "cudnn"]
ATTENTION = get_args(Implementation)

Attention = Annotated[Implementation, Affects.NOTHING]
"""Type of a setting: "xla", matrix products and a softmax compiled by XLA, for every device; or
"cudnn", fused kernels for NVIDIA GPUs, forward and backward."""

# The limit of jax.nn.dot_product_attention for cuDNN on Ampere; on Hopper it is 256.
_LARGEST_HEAD = 128


def check_attention(attention: str, head: int, dtype: Any) -> None:
    """Checks that an implementation supports the attention of a network.

    Args:
      attention: an `Attention`.
      head: channels per head.
      dtype: type of the activations.

    Raises:
      ValueError: if cuDNN's kernels don't support the heads or the type.
    """
    if attention == "cudnn" and dtype != jnp.bfloat16:
        raise ValueError(f"attention 'cudnn' needs dtype bfloat16, not {jnp.dtype(dtype).name}.")
    if attention == "cudnn" and (head % 8 or head > _LARGEST_HEAD):
        raise ValueError(
            f"attention 'cudnn' needs heads of a multiple of 8 channels up to {_LARGEST_HEAD}, not "
            f"{head}."
        )


def check_attention_devices(attention: str) -> None:
    """Raises a ValueError if the current devices don't support an `Attention`."""
    if attention == "cudnn" and jax.default_backend() != "gpu":
        raise ValueError(
            f"attention 'cudnn' needs an NVIDIA GPU, but the devices here are of the kind "
            f"{jax.default_backend()!r}: set attention to 'xla'"
        )
