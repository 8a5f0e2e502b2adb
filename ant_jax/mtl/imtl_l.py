"""IMTL-L: learned scales that make all losses equal (Liu et al., 2021)."""

from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ant_jax.mtl.per_task import adam_step
from ant_jax.mtl.weighting import Weighting, check_arguments
from ant_jax.settings import Number

# Adam squares e^s L.
_MOST = 30.0


class ImtlLState(NamedTuple):
    """Log-scales s of the losses, shape (k,), and their Adam states, one a task."""

    log_scale: jax.Array
    adam: optax.OptState


def imtl_l(k: int, learning_rate: Annotated[float, Number(above=0)] = 0.025) -> Weighting:
    r"""IMTL-L: impartial multi-task learning by the losses.

    :math:`w_i = e^{s_i} / k`, which minimises :math:`\frac1k \sum_i (e^{s_i} L_i - s_i)` jointly
    over the parameters and the log-scales s, from s = 0 (Liu et al., *Towards Impartial Multi-task
    Learning*, ICLR 2021). Use it if the losses have different sizes and one backward pass must be
    enough. The minimum over s is :math:`w_i = 1 / (k L_i)`: the update becomes the gradient of the
    mean of the log-losses. `uncertainty` has the same minimum up to a factor.

    The weights are those before the update of s, and s moves along :math:`e^{s_i} L_i - 1` by its
    own Adam without decay. In LibMTL and TorchJD, s belongs to the optimizer of the network, and
    the objective is the sum instead of the mean. The losses must be positive. s stays at 30 or
    below: the weight of a loss that is 0 would grow until it overflows.

    Example::

      tx = optax.chain(mtl.combine(mtl.imtl_l(5)), optax.adam(1e-3))

    Args:
      k: number of tasks.
      learning_rate: Adam's learning rate for s.

    Returns:
      A `Weighting` that needs the losses; its state is s and Adam's. At first, identical gradients
      g give the update g.

    Raises:
      ValueError: if k < 1, or if a setting is out of its range.
    """
    check_arguments(imtl_l, k, learning_rate=learning_rate)
    adam = optax.adam(learning_rate)

    def init():
        log_scale = jnp.zeros(k, jnp.float32)
        return ImtlLState(log_scale, jax.vmap(adam.init)(log_scale))

    def weigh(stats, state):
        present = stats.present
        scale = jnp.exp(state.log_scale)
        gradients = scale * stats.losses - 1
        bound = lambda s: jnp.minimum(s, _MOST)
        after = adam_step(adam, gradients, state.log_scale, state.adam, present, bound)
        weights = jnp.where(present, scale / jnp.maximum(present.sum(), 1), 0)
        return weights, ImtlLState(*after)

    return Weighting(init=init, weigh=weigh, k=k, needs=frozenset({"losses"}))
