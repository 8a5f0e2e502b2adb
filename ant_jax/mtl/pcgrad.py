"""PCGrad: projecting conflicting gradients (Yu et al., 2020), on the Gram matrix."""

import jax
import jax.numpy as jnp

from ant_jax.mtl.weighting import Weighting, check_arguments


def projection_orders(seed: int | jax.Array, count: jax.Array, k: int) -> jax.Array:
    """Orders in which each gradient is projected on the others, int32 of shape (k, k).

    Row i is a random permutation of all k tasks, task i itself is skipped. A function of
    the seed and the call count alone.
    """
    key = jax.random.fold_in(jax.random.key(seed), count)
    orders = jax.vmap(lambda key: jax.random.permutation(key, k))(jax.random.split(key, k))
    return orders.astype(jnp.int32)


def pcgrad(k: int, seed: int | jax.Array = 0) -> Weighting:
    r"""PCGrad: gradient surgery.

    :math:`g_i' \leftarrow g_i' - \frac{\langle g_i', g_j \rangle}{\| g_j \|^2} g_j` for each i,
    over the other j in random order, where :math:`\langle g_i', g_j \rangle < 0`; the update is the
    mean of the :math:`g_i'` (Yu et al., *Gradient Surgery for Multi-Task Learning*, NeurIPS 2020,
    algorithm 1). Use it if gradients conflict in pairs and have similar lengths. Here :math:`g_i'`
    is kept as its coefficients over the g_j, so only the Gram matrix is needed. The mean runs over
    the tasks that are present.

    Example::

      tx = optax.chain(mtl.combine(mtl.pcgrad(5)), optax.adam(1e-3))

    Args:
      k: number of tasks.
      seed: seed of the projection orders; may be traced.

    Returns:
      A `Weighting` that needs the Gram matrix; its state counts the calls.

    Raises:
      ValueError: if k < 1.
    """
    check_arguments(pcgrad, k)

    def surgery(i, order, gram, present):
        def project(coefficients, j):
            inner = jnp.dot(gram[j], coefficients, precision="highest")
            conflict = (inner < 0) & (j != i) & present[j] & (gram[j, j] > 0)
            shift = jnp.where(conflict, inner / jnp.where(conflict, gram[j, j], 1), 0)
            return coefficients.at[j].add(-shift), None

        start = jax.nn.one_hot(i, k, dtype=jnp.float32)
        return jax.lax.scan(project, start, order)[0]

    def weigh(stats, count):
        present = stats.present
        orders = projection_orders(seed, count, k)
        each = jax.vmap(surgery, (0, 0, None, None))
        coefficients = each(jnp.arange(k), orders, stats.gram, present)
        total = jnp.where(present[:, None], coefficients, 0).sum(0)
        return jnp.where(present, total, 0) / jnp.maximum(present.sum(), 1), count + 1

    init = lambda: jnp.zeros((), jnp.int32)
    return Weighting(init=init, weigh=weigh, k=k, needs=frozenset({"gram"}))
