"""RLW: random loss weights (Lin et al., 2022)."""

import jax
import jax.numpy as jnp

from ant_jax.mtl.weighting import Weighting, check_arguments


def random(k: int, seed: int | jax.Array = 0) -> Weighting:
    r"""RLW: random loss weighting.

    :math:`w = \mathrm{softmax}(z),\ z \sim N(0, I)`, anew at each call (Lin et al., *Reasonable
    Effectiveness of Random Weighting: A Litmus Test for Multi-Task Learning*, TMLR 2022). Use it as
    a baseline: a method that is not better than random weights balances nothing. The mean of the
    weights over many calls is 1/k. The softmax runs over the tasks that are present.

    Example::

      tx = optax.chain(mtl.combine(mtl.random(5, seed=1)), optax.adam(1e-3))

    Args:
      k: number of tasks.
      seed: seed of the weights; may be traced.

    Returns:
      A `Weighting` that needs nothing; its state counts the calls. Identical gradients g give the
      update g.

    Raises:
      ValueError: if k < 1.
    """
    check_arguments(random, k)

    def weigh(stats, count):
        key = jax.random.fold_in(jax.random.key(seed), count)
        logits = jax.random.normal(key, (k,), jnp.float32)
        return jax.nn.softmax(logits, where=stats.present), count + 1

    init = lambda: jnp.zeros((), jnp.int32)
    return Weighting(init=init, weigh=weigh, k=k, needs=frozenset())
