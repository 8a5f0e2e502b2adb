"""Dense layers that move few bytes in their backward pass."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from ant_jax.platforms import platform


class Dense(nn.Module):
    """`flax.linen.Dense`, with its parameters and its values, and an activation if one is given.

    All positions of all examples are the rows of one matrix, except on TPUs. With several axes of
    rows, XLA for CPUs transposes a copy of the output's gradient before it computes the gradient of
    the kernel, which can double its time. With one axis, XLA for TPUs needs a sixth more memory for
    k tasks side by side.

    The backward pass computes the activation again, from its input. Otherwise XLA keeps what the
    derivative needs, such as the tanh of a GELU: as many bytes again as the output. With
    `ant_jax.runtime.devices.compiler_options` cuBLAS then applies the bias and a GELU within the
    product, and writes the input and the output of the GELU.

    Attributes:
      features: of the output.
      dtype: type of the product; by default that of the input and the parameters.
      kernel_init: initialiser of the kernel.
      activation: applied to the output.
    """

    features: int
    dtype: Any = None
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    activation: Callable[[jax.Array], jax.Array] | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., N) -> (..., features)."""
        output = _affine(*_operands(self, x))
        return output if self.activation is None else jax.checkpoint(self.activation)(output)


class SplitDense(nn.Module):
    """`Dense`, whose output comes in equal parts, each from a product of its own.

    If one product is split into query, key and value, GPUs copy it.

    Attributes:
      features: of all parts together.
      parts: their number.
      dtype: type of the products; by default that of the input and the parameters.
      kernel_init: initialiser of the kernel.
    """

    features: int
    parts: int
    dtype: Any = None
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: jax.Array) -> list[jax.Array]:
        """(..., N) -> arrays (..., features / parts)."""
        x, kernel, bias = _operands(self, x)
        each = jnp.split(kernel, self.parts, 1), jnp.split(bias, self.parts)
        return [_affine(x, *part) for part in zip(*each, strict=True)]


def _operands(layer, x):
    """The input and the parameters, in the type of the product."""
    kernel = layer.param("kernel", layer.kernel_init, (x.shape[-1], layer.features))
    bias = layer.param("bias", nn.initializers.zeros, (layer.features,))
    return promote_dtype(x, kernel, bias, dtype=layer.dtype)


def _affine(x, kernel, bias):
    if platform() == "tpu":
        return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ()))) + bias
    product = jax.lax.dot(x.reshape(-1, x.shape[-1]), kernel)
    return product.reshape(*x.shape[:-1], kernel.shape[1]) + bias
