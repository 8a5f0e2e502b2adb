"""Aligned-MTL: gradients made orthogonal and equally long (Senushkin et al., 2023)."""

from typing import Literal

import jax.numpy as jnp

from ant_jax.mtl.cone import unit_gram
from ant_jax.mtl.spectrum import spectrum
from ant_jax.mtl.weighting import Weighting, check_arguments


def aligned_mtl(k: int, scale: Literal["min", "median", "rmse"] = "min") -> Weighting:
    r"""Aligned-MTL: independent component alignment.

    :math:`w = \sqrt{\lambda_s}\, G^{-1/2} 1 / k`: the gradients are replaced by orthogonal vectors
    of the same length, :math:`\sqrt{\lambda_s}`, and the update is their mean. :math:`G^{-1/2}` is
    a pseudo-inverse. :math:`\lambda_s` is the smallest of the eigenvalues of G that are not 0, as
    in the paper, or their median or mean (Senushkin et al., *Independent Component Alignment for
    Multi-Task Learning*, CVPR 2023, algorithm 1). Use it if long gradients should not dominate, and
    stable training matters more than speed. With "min" the update is short if
    gradients conflict, or if two are nearly the same. Single weights may be negative.

    The authors' code takes the sum of the vectors, here it is the mean. An eigenvalue below 1e-6 k
    of the largest counts as 0, since float32 does not resolve it. So a gradient that is about 1000
    times shorter than others may get weight 0. Of an even number of eigenvalues the median is the
    lower one in the middle.

    Example::

      tx = optax.chain(mtl.combine(mtl.aligned_mtl(5)), optax.adam(1e-3))

    Args:
      k: number of tasks.
      scale: which eigenvalue gives the length, "min", "median", or "rmse" for their mean.

    Returns:
      A stateless `Weighting` that needs the Gram matrix. Identical gradients g give the update g.

    Raises:
      ValueError: if k < 1, or for another scale.
    """
    check_arguments(aligned_mtl, k, scale=scale)

    def weigh(stats, state):
        cosines, norms, active = unit_gram(stats.gram, stats.present)
        lengths = jnp.where(active, norms, 0)
        lengths = lengths / jnp.maximum(lengths.max(), jnp.finfo(norms.dtype).tiny)
        values, vectors, positive = spectrum(cosines * lengths[:, None] * lengths)
        rank = positive.sum()
        if scale == "rmse":
            chosen = jnp.where(positive, values, 0).sum() / jnp.maximum(rank, 1)
        else:
            # The eigenvalues that count are the last ones.
            chosen = values[k - rank + (rank - 1) // 2 * (scale == "median")]
        mean = active / jnp.maximum(stats.present.sum(), 1).astype(jnp.float32)
        parts = jnp.dot(mean, vectors, precision="highest")
        parts = jnp.where(positive, parts * jnp.sqrt(chosen / jnp.where(positive, values, 1)), 0)
        weights = jnp.dot(vectors, parts, precision="highest")
        return jnp.where(active, weights, 0), state

    return Weighting(init=tuple, weigh=weigh, k=k, needs=frozenset({"gram"}))
