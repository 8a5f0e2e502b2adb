"""Which program computes attention."""

from typing import Any

import jax.numpy as jnp

ATTENTION = ("xla", "cudnn")

# Of the kernels of cuDNN on Ampere, by jax.nn.dot_product_attention; Hopper's take 256.
_LARGEST_HEAD = 128


def check_attention(attention: str, head: int, dtype: Any) -> None:
    """Checks that a network's attention is one that can be computed.

    Args:
      attention: "xla", products and a softmax as XLA compiles them, on every device; or "cudnn",
        the fused kernels of NVIDIA's GPUs, forward and backward.
      head: channels of a head.
      dtype: type of the activations.

    Raises:
      ValueError: for an unknown one, or for heads or types that cuDNN's kernels don't take.
    """
    if attention not in ATTENTION:
        raise ValueError(f"attention must be one of {', '.join(ATTENTION)}, not {attention!r}.")
    if attention == "cudnn" and dtype != jnp.bfloat16:
        raise ValueError(f"attention 'cudnn' needs dtype bfloat16, not {jnp.dtype(dtype).name}.")
    if attention == "cudnn" and (head % 8 or head > _LARGEST_HEAD):
        raise ValueError(
            f"attention 'cudnn' needs heads of a multiple of 8 channels up to {_LARGEST_HEAD}, not "
            f"{head}."
        )
