"""A dense layer that moves few bytes in its backward pass."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from flax.linen.dtypes import promote_dtype


class Dense(nn.Module):
    """`flax.linen.Dense`, with its parameters and its values, and an activation if one is given.

    All positions of all examples are the rows of one matrix. With several axes of rows, XLA for
    CPUs transposes a copy of the output's gradient before it computes the gradient of the kernel,
    which can double its time.

    The backward pass computes the activation again, from the matrix product. Otherwise XLA keeps
    what the derivative needs, such as the tanh of a GELU: as many bytes again as the output.

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
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x, kernel, bias = promote_dtype(x, kernel, bias, dtype=self.dtype)
        product = jax.lax.dot(x.reshape(-1, x.shape[-1]), kernel)
        product = product.reshape(*x.shape[:-1], self.features)
        activation = self.activation
        if activation is None:
            return product + bias
        return jax.checkpoint(lambda product, bias: activation(product + bias))(product, bias)
