"""The trimmed mean of the gradients, entry by entry (Yin et al., 2018)."""

from typing import Annotated

import jax
import jax.numpy as jnp
from optax.experimental import aggregating

from ant_jax.mtl.aggregators.parts import on_parts
from ant_jax.mtl.weighting import check_arguments
from ant_jax.settings import Integer, check_integer


def trimmed_mean(
    k: int, trim: Annotated[int, Integer(0)] = 1, axis_name: str | None = None
) -> aggregating.Aggregator:
    r"""The coordinate-wise trimmed mean.

    :math:`\frac{1}{k - 2b} \sum_{r = b + 1}^{k - b} g_{(r) p}` is entry p of the update, where
    :math:`g_{(1) p} \le \dots \le g_{(k) p}` are the k numbers in order: the mean without the b
    lowest and the b highest (Yin et al., *Byzantine-Robust Distributed Learning: Towards Optimal
    Statistical Rates*, ICML 2018). b = 0 is the mean; for odd k, b = (k - 1) / 2 is the median.

    Use it where up to b gradients may be outliers.

    Only the tasks that are present count. If there are 2b or fewer, the median is taken.

    Example::

      tx = optax.chain(mtl.trimmed_mean(5, trim=1), optax.adam(1e-3))

    Args:
      k: number of tasks.
      trim: b, how many gradients are left out at each end.
      axis_name: name of a mapped axis, as for `combine`.

    Returns:
      A stateless `Aggregator` of gradients with leaves (k, *param_shape). Identical gradients g
      give the update g.

    Raises:
      ValueError: if k < 1 or k < 2 trim + 1; from update, if a leaf's leading axis is not k.
    """
    check_arguments(trimmed_mean, k)
    check_integer("trim", trim, 0, (k - 1) // 2)

    def aggregate(parts, present, state):
        number = present.sum()
        low = jnp.clip((number - 1) // 2, 0, trim)
        ranks = jnp.arange(k)[:, None]
        middle = (ranks >= low) & (ranks < number - low)

        def mean(g):
            # Absent tasks come last.
            ordered = jnp.sort(jnp.where(present[:, None], g, jnp.inf), axis=0)
            total = jnp.where(middle, ordered, 0).sum(0)
            # What is not finite would be trimmed.
            finite = jnp.isfinite(g).all(0)
            return jnp.where(finite, total / jnp.maximum(number - 2 * low, 1), jnp.nan)

        return jax.tree.map(mean, parts), state

    return on_parts(k, axis_name, lambda params: (), aggregate)
