"""Which program computes attention."""

from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp

from ant_jax.settings import Affects

ATTENTION = ("xla", "cudnn")

Attention = Annotated[Literal[ATTENTION], Affects.NOTHING]
"""Type of a setting: "xla", products and a softmax as XLA compiles them, on every device; or
"cudnn", the fused kernels of NVIDIA's GPUs, forward and backward."""

# Of the kernels of cuDNN on Ampere, by jax.nn.dot_product_attention; Hopper's take 256.
_LARGEST_HEAD = 128


def check_attention(attention: str, head: int, dtype: Any) -> None:
    """Checks that a network's attention can be computed.

    Args:
      attention: an `Attention`.
      head: channels of a head.
      dtype: type of the activations.

    Raises:
      ValueError: for heads or types that cuDNN's kernels don't take.
    """
    if attention == "cudnn" and dtype != jnp.bfloat16:
        raise ValueError(f"attention 'cudnn' needs dtype bfloat16, not {jnp.dtype(dtype).name}.")
    if attention == "cudnn" and (head % 8 or head > _LARGEST_HEAD):
        raise ValueError(
            f"attention 'cudnn' needs heads of a multiple of 8 channels up to {_LARGEST_HEAD}, not "
            f"{head}."
        )


def check_attention_devices(attention: str) -> None:
    """Raises a ValueError if the devices that are there don't have an `Attention`."""
    if attention == "cudnn" and jax.default_backend() != "gpu":
        raise ValueError(
            f"attention 'cudnn' needs an NVIDIA GPU, and the devices here are of the kind "
            f"{jax.default_backend()!r}: set it to 'xla'"
        )
