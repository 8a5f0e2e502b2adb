"""The Gram matrix of stacked gradients, and their cosines."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ant_jax.platforms import platform

# With more tasks a sum for each of k (k + 1) / 2 pairs is no faster on a CPU, and would probably
# not fit the registers of a GPU.
_LARGEST_BY_PAIRS = {"cpu": 7, "gpu": 8}
# On a CPU a product of smaller gradients takes as long, and compiles faster.
_SMALLEST_BY_PAIRS = 1 << 18
# How many numbers a CPU adds one after the other. More would add up their rounding errors.
_RUN = 1024

_flatten = contextvars.ContextVar("flatten", default=True)


@contextlib.contextmanager
def keeping_axes() -> Iterator[None]:
    """Lets `gramian` keep the axes of the gradients, in a program that `jax.jit` partitions.

    Otherwise the devices would gather a gradient that is sharded along one of its axes. On a CPU
    this form takes two to three times as long.
    """
    token = _flatten.set(False)
    try:
        yield
    finally:
        _flatten.reset(token)


def gramian(stacked: Any) -> jax.Array:
    """Inner products of k gradients, ``G = J J^T``.

    Args:
      stacked: pytree of gradients with leaves of shape (k, *param_shape).

    Returns:
      (k, k) float32, accumulated in float32 at full precision.
    """
    leaves = jax.tree.leaves(stacked)
    by_pairs = [leaf for leaf in leaves if _is_summed_by_pairs(leaf)]
    grams = [_by_pairs(by_pairs)] if by_pairs else []
    for leaf in leaves:
        if _is_summed_by_pairs(leaf):
            continue
        rows = leaf.astype(jnp.float32)
        if _flatten.get():
            rows = rows.reshape(len(rows), -1)
        axes = tuple(range(1, rows.ndim))
        grams.append(jnp.tensordot(rows, rows, (axes, axes), precision="highest"))
    return jnp.asarray(sum(grams))


def _is_summed_by_pairs(leaf):
    k = len(leaf)
    if not _flatten.get() or k > _LARGEST_BY_PAIRS.get(platform(), 0):
        return False
    size = leaf.size // k
    return platform() != "cpu" or (size >= _SMALLEST_BY_PAIRS and size % _RUN == 0)


def _by_pairs(leaves):
    """One loop over each leaf with a sum for each pair, which reads the gradients once as they are.

    A product of so few rows is slow: cuBLAS gets a copy of them in float32, and XLA for CPUs sorts
    them into blocks first.
    """
    k = len(leaves[0])
    first, second = np.triu_indices(k)
    add = lambda a, b: tuple(map(jnp.add, a, b))
    zeros = total = (np.float32(0),) * len(first)
    for leaf in leaves:
        axes = tuple(range(leaf.ndim - 1))
        if platform() == "cpu":
            leaf, axes = leaf.reshape(k, -1, _RUN), (1,)
        rows = [leaf[i].astype(jnp.float32) for i in range(k)]
        products = tuple(rows[i] * rows[j] for i, j in zip(first, second, strict=True))
        sums = jax.lax.reduce(products, zeros, add, axes)
        # Nothing is left to add on a GPU.
        total = add(total, map(jnp.sum, sums))
    pair = np.zeros((k, k), int)
    pair[first, second] = pair[second, first] = np.arange(len(first))
    return jnp.stack(total)[pair]


def pairwise_cosines(gram: jax.Array) -> jax.Array:
    """Cosines between different gradients.

    Args:
      gram: (k, k) Gram matrix.

    Returns:
      (k (k - 1) / 2,) float32, the pairs (0, 1), (0, 2), ..., (k - 2, k - 1); NaN for a pair of
      which one has no gradient (zero diagonal).
    """
    diagonal = jnp.diag(gram)
    inverse = jnp.where(diagonal > 0, jax.lax.rsqrt(diagonal), jnp.nan)
    cosines = gram * inverse[:, None] * inverse
    return cosines[jnp.triu_indices(gram.shape[0], 1)]
