"""Wrappers: each takes a `Weighting` and returns one."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ant_jax.mtl.weighting import State, Weighting, lifted
from ant_jax.settings import check_integer


class EveryState(NamedTuple):
    """State of `every`.

    Attributes:
      state: the method's own.
      weights: (k,) float32, each task's weight of the last renewal at which it was present.
      known: (k,) bool, whether there has been one.
      count: int32, the number of calls.
    """

    state: State
    weights: jax.Array
    known: jax.Array
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]


class CrMogmState(NamedTuple):
    """State of `cr_mogm`.

    Attributes:
      state: the method's own.
      weights: (k,) float32, the average of each task's weights.
      known: (k,) bool, whether a task has been present yet.
    """

    state: State
    weights: jax.Array
    known: jax.Array


def scaled(weighting: Weighting, scale: jax.typing.ArrayLike) -> Weighting:
    r"""The method on the losses :math:`s_i L_i` instead of :math:`L_i`.

    It sees :math:`s_i L_i` and :math:`s_i G_{ij} s_j`; its weights are multiplied by s, so that
    they are weights of the plain losses again.

    Args:
      weighting: the method.
      scale: (k,) factors > 0, such as k times each interval's share of the noise levels; may be
        traced.

    Raises:
      ValueError: if there are not k factors.
    """
    scale = jnp.asarray(scale, jnp.float32)
    if scale.shape != (weighting.k,):
        raise ValueError(f"scale must have shape ({weighting.k},), got {scale.shape}")

    def weigh(stats, state):
        if stats.losses is not None:
            stats = stats._replace(losses=stats.losses * scale)
        if stats.gram is not None:
            stats = stats._replace(gram=stats.gram * scale[:, None] * scale)
        weights, state = weighting.weigh(stats, state)
        return weights * scale, state

    return weighting._replace(weigh=weigh)


def every(weighting: Weighting, n: int) -> Weighting:
    """Renews the weights at every n-th call, and keeps them in between.

    A task that was absent at the last renewal keeps its last weight. The first call with a new task
    is also a renewal. Absent tasks get weight 0, and the weights of the others do not change.

    Args:
      weighting: the method. Its state changes only when the weights are renewed.
      n: renewals are at the calls 0, n, 2 n, ...

    Raises:
      ValueError: unless n is an integer >= 1.
    """
    check_integer("n", n, 1)
    k = weighting.k

    def init():
        zeros = jnp.zeros(k, jnp.float32)
        return EveryState(weighting.init(), zeros, jnp.zeros(k, bool), jnp.zeros((), jnp.int32))

    def weigh(stats, state):
        present = stats.present

        def renew():
            weights, inner = weighting.weigh(stats, state.state)
            return jnp.where(present, weights, state.weights), inner

        due = (state.count % n == 0) | jnp.any(present & ~state.known)
        weights, inner = jax.lax.cond(due, renew, lambda: (state.weights, state.state))
        new = EveryState(inner, weights, state.known | present, state.count + 1)
        return jnp.where(present, weights, 0), new

    return lifted(weighting)._replace(init=init, weigh=weigh)


def clipped(weighting: Weighting, max_norm: float) -> Weighting:
    r"""Limits the norm of the update, :math:`\| \sum_i w_i g_i \| \le` ``max_norm``.

    The norm is :math:`\sqrt{w^T G w}` by the Gram matrix of this call.

    Args:
      weighting: the method.
      max_norm: bound on the norm of the update.

    Returns:
      A `Weighting` that needs the Gram matrix and has the method's own state.

    Raises:
      ValueError: if max_norm <= 0.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm must be > 0, got {max_norm}")

    def weigh(stats, state):
        weights, state = weighting.weigh(stats, state)
        product = jnp.dot(stats.gram, weights, precision="highest")
        squared = jnp.dot(weights, product, precision="highest")
        norm = jnp.sqrt(jnp.maximum(squared, jnp.finfo(jnp.float32).tiny))
        return weights * jnp.minimum(1, max_norm / norm), state

    return weighting._replace(weigh=weigh, needs=weighting.needs | {"gram"})


def cr_mogm(weighting: Weighting, decay: float) -> Weighting:
    r"""CR-MOGM: averages the weights over time, :math:`w_t = \beta w_{t-1} + (1 - \beta) \hat w_t`.

    :math:`\hat w_t` are the method's weights (Zhou et al., *On the Convergence of Stochastic
    Multi-Objective Gradient Manipulation and Beyond*, NeurIPS 2022: correlation-reduced stochastic
    multi-objective gradient manipulation). Use it if the weights follow the noise of the batches:
    weights and gradients of one batch are correlated, and the method may then fail to converge.

    The average starts from the first weights of each task, as in TorchJD, which have the method's
    scale. The average of an absent task does not change. The paper recommends a :math:`\beta` that
    rises to 1 as the learning rate falls; here it is constant. Averaged weights lose what the
    method guarantees for the gradients of one batch, such as an update without conflict. Weights
    that are inverse to the gradients' length, as those of `nash`, are averaged over the lengths of
    many batches: `clipped` around this bounds the update.

    Args:
      weighting: the method.
      decay: the average's :math:`\beta`, 0 <= decay < 1; common is 0.9.

    Returns:
      A `Weighting` that needs what the method needs; its state is the method's and the averages.

    Raises:
      ValueError: for another decay.
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay must be >= 0 and < 1, got {decay}")
    k = weighting.k

    def init():
        return CrMogmState(weighting.init(), jnp.zeros(k, jnp.float32), jnp.zeros(k, bool))

    def weigh(stats, state):
        present = stats.present
        found, inner = weighting.weigh(stats, state.state)
        mean = jnp.where(state.known, decay * state.weights + (1 - decay) * found, found)
        weights = jnp.where(present, mean, state.weights)
        return jnp.where(present, mean, 0), CrMogmState(inner, weights, state.known | present)

    return lifted(weighting)._replace(init=init, weigh=weigh)
