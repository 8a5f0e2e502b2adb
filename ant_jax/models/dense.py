"""A dense layer whose gradient needs no transposed copy."""

import functools

import flax.linen as nn
import jax


def _of_matrix(x, kernel, dimension_numbers, precision=None):
    # With several axes of rows, XLA for CPUs transposes a copy of the output's gradient before it
    # computes the gradient of the kernel. That can double its time. Both have the same bits.
    del dimension_numbers  # of a dense layer: the last axis of x, the first of the kernel
    product = jax.lax.dot(x.reshape(-1, x.shape[-1]), kernel, precision=precision)
    return product.reshape(*x.shape[:-1], kernel.shape[-1])


# `flax.linen.Dense`, with all positions of all examples as the rows of one matrix.
Dense = functools.partial(nn.Dense, dot_general=_of_matrix)
