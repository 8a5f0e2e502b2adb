"""ConFIG: conflict-free inverse gradients (Liu et al., 2024)."""

import jax.numpy as jnp

from ant_jax.mtl.cone import unit_gram
from ant_jax.mtl.spectrum import equal_projections
from ant_jax.mtl.weighting import Weighting, check_arguments


def config(k: int) -> Weighting:
    r"""ConFIG: conflict-free inverse gradients.

    :math:`w = v\, (1^T G v) / (k\, v^T G v),\ v = G^{-1} n,\ n_i = \sqrt{G_{ii}}`. The direction
    :math:`J^T v` has equal projections on all gradients, and the update is the mean of the
    projections of the gradients on it (Liu, Chu and Thuerey, *ConFIG: Towards Conflict-free
    Training of Physics Informed Neural Networks*, ICLR 2025, eq. 2, with equal weights for the
    tasks). Use it if the update should have the same angle to all gradients, and become short if
    they conflict. Single weights may be negative. `imtl_g` has the same direction and another
    length. If gradients depend on each other, the inverse is the pseudo-inverse of their cosines.

    The authors' code takes the sum of the projections, here it is the mean. For gradients that
    depend on each other the sum can be negative; the authors' update then points the other way,
    here it is 0. In float32 PyTorch's pseudo-inverse makes the update 0 for more than 8 million
    parameters; here the result does not depend on the number of parameters.

    Example::

      tx = optax.chain(mtl.combine(mtl.config(5)), optax.adam(1e-3))

    Args:
      k: number of tasks.

    Returns:
      A stateless `Weighting` that needs the Gram matrix. Identical gradients g give the update g.

    Raises:
      ValueError: if k < 1.
    """
    check_arguments(config, k)

    def weigh(stats, state):
        unit = unit_gram(stats.gram, stats.present)
        _, norms, active = unit
        v, projections, squared = equal_projections(unit)
        # Norms are divided by each other only, so that no product overflows.
        shortest = jnp.where(active, norms, jnp.inf).min()
        ratios = jnp.where(active, norms / shortest, 0)
        length = jnp.maximum(jnp.dot(ratios, projections, precision="highest"), 0)
        mean = length / jnp.where(squared > 0, squared, 1) / jnp.maximum(stats.present.sum(), 1)
        return jnp.where(active, v * mean * shortest / norms, 0), state

    return Weighting(init=tuple, weigh=weigh, k=k, needs=frozenset({"gram"}))
