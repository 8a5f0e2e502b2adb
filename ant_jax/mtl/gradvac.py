"""GradVac: gradients turned towards their usual cosines (Wang et al., 2021)."""

from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp

from ant_jax.mtl.cone import ridge, unit_gram
from ant_jax.mtl.pcgrad import projection_orders
from ant_jax.mtl.weighting import Weighting, check_arguments
from ant_jax.settings import Number

_LARGEST_TARGET = 0.999


class GradvacState(NamedTuple):
    """State of `gradvac`.

    Attributes:
      phi: (k, k), the average cosine of each corrected gradient i with gradient j; 0 at first.
      count: int32, the number of calls.
    """

    phi: jax.Array
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]


def gradvac(
    k: int, beta: Annotated[float, Number(0, 1)] = 0.01, seed: int | jax.Array = 0
) -> Weighting:
    r"""GradVac: gradient vaccine.

    :math:`g_i' \leftarrow g_i' + \frac{\| g_i' \|}{\| g_j \|} (\hat\phi_{ij} \frac{\sqrt{1 -
    \phi_{ij}^2}}{\sqrt{1 - \hat\phi_{ij}^2}} - \phi_{ij}) g_j`, for each i over the other j in
    random order, where the cosine :math:`\phi_{ij}` of :math:`g_i'` and :math:`g_j` is below its
    average :math:`\hat\phi_{ij}`. After this step it is equal to the average. The average follows,
    :math:`\hat\phi_{ij} \leftarrow (1 - \beta) \hat\phi_{ij} + \beta \phi_{ij}`, and the update is
    the mean of the :math:`g_i'` (Wang et al., *Gradient Vaccine: Investigating and Improving
    Multi-task Optimization in Massively Multilingual Models*, ICLR 2021). Use it instead of
    `pcgrad` if the gradients usually agree, so that few are in conflict. With :math:`\beta = 0` it
    is `pcgrad`. Here :math:`g_i'` is kept as its coefficients over the g_j, so only the Gram matrix
    is needed.

    Public codes take the sum of the corrected gradients, here it is the mean over the tasks that
    are present. The default of beta in these codes is 0.5. The paper groups the parameters by
    layer, here all are one group. An average beyond 0.999 counts as 0.999. A gradient that the
    corrections cancel is not corrected further.

    Example::

      tx = optax.chain(mtl.combine(mtl.gradvac(5)), optax.adam(1e-3))

    Args:
      k: number of tasks.
      beta: how fast the average cosines follow.
      seed: seed of the orders; may be traced.

    Returns:
      A `Weighting` that needs the Gram matrix; its state holds the average cosines and counts the
      calls. Identical gradients g give the update g.

    Raises:
      ValueError: if k < 1, or if beta is not in 0 .. 1.
    """
    check_arguments(gradvac, k, beta=beta)
    dot = lambda a, b: jnp.dot(a, b, precision="highest")

    def vaccinate(i, order, averages, unit):
        """Coefficients of gradient i over the unit vectors of all, in lengths of i; averages."""
        cosines, _, active = unit

        def correct(carry, j):
            coefficients, averages = carry
            products = dot(cosines, coefficients)
            squared = dot(coefficients, products)
            # Below this the vector is the rounding error of one that was cancelled.
            known = squared > ridge(k) * jnp.abs(coefficients).sum() ** 2
            norm = jnp.sqrt(jnp.where(known, squared, 1))
            cosine = jnp.clip(products[j] / norm, -1, 1)
            target = jnp.clip(averages[j], -_LARGEST_TARGET, _LARGEST_TARGET)
            ratio = jnp.sqrt((1 - cosine**2) / (1 - target**2))
            valid = known & (j != i) & active[j]
            shift = jnp.where(valid & (cosine < target), norm * (target * ratio - cosine), 0)
            average = (1 - beta) * averages[j] + beta * cosine
            averages = averages.at[j].set(jnp.where(valid, average, averages[j]))
            return (coefficients.at[j].add(shift), averages), None

        return jax.lax.scan(correct, (jax.nn.one_hot(i, k, dtype=jnp.float32), averages), order)[0]

    def weigh(stats, state):
        unit = unit_gram(stats.gram, stats.present)
        active = unit.active
        orders = projection_orders(seed, state.count, k)
        each = jax.vmap(vaccinate, (0, 0, 0, None))
        coefficients, averages = each(jnp.arange(k), orders, state.phi, unit)
        coefficients = coefficients * unit.norms[:, None] / unit.norms
        total = jnp.where(active[:, None], coefficients, 0).sum(0)
        weights = jnp.where(active, total, 0) / jnp.maximum(stats.present.sum(), 1)
        phi = jnp.where(active[:, None], averages, state.phi)
        return weights, GradvacState(phi, state.count + 1)

    init = lambda: GradvacState(jnp.zeros((k, k), jnp.float32), jnp.zeros((), jnp.int32))
    return Weighting(init=init, weigh=weigh, k=k, needs=frozenset({"gram"}))
