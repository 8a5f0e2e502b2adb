"""The learned uncertainty of noise levels (Karras et al., EDM2, 2024), around any method."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ant_jax.mtl.weighting import LevelRule, State, Weighting, lifted

_FEATURES = 128
_LEAST = -40.0
# Adam squares the gradients.
_LARGEST_SLOPE = 1e18


class LevelState(NamedTuple):
    """State of `level_uncertainty`.

    Attributes:
      state: the method's own.
      coefficients: (m,) float32, those of u.
      adam: their Adam state.
    """

    state: State
    coefficients: jax.Array
    adam: optax.OptState


def fourier_features(levels: jax.Array) -> jax.Array:
    """The features of EDM2: 128 cosines of fixed random frequencies and phases, of mean square 1.

    Args:
      levels: (B,), such as log(sigma) / 4. The frequencies have standard deviation 1.
    """
    rng = np.random.default_rng(0)
    frequencies = np.float32(2 * np.pi * rng.normal(size=_FEATURES))
    phases = np.float32(2 * np.pi * rng.uniform(size=_FEATURES))
    return np.float32(np.sqrt(2)) * jnp.cos(levels[:, None] * frequencies + phases)


def level_uncertainty(
    weighting: Weighting,
    learning_rate: float,
    features: Callable[[jax.Array], jax.Array] = fourier_features,
) -> Weighting:
    r"""Weighs each example by a learned uncertainty of its noise level; the method sees the result.

    The loss l of an example of level t counts as :math:`l\, e^{-u(t)}`. u minimises the mean of
    :math:`l\, e^{-u(t)} + u(t)` over the examples, so :math:`e^{u(t)}` becomes the mean loss at t,
    and all levels count alike (Karras et al., *Analyzing and Improving the Training Dynamics of
    Diffusion Models*, CVPR 2024, eq. 21). With `linear` or `vanilla` this is EDM2's loss. It is the
    continuous form of `uncertainty`: if u is constant in each task, it is that method's s plus
    log(k), and the weights are equal but for a common factor.

    :math:`u(t) = c^T \phi(t) / \sqrt{m}` is linear in m features. EDM2 normalises the coefficients
    c and trains them with the network's optimizer. Here they start at 0, so that all losses count
    alike at first, and Adam without decay trains them. As s in `uncertainty`, u stays at -40 or
    above.

    Use it around any method, and with `backward`: `combine` sees no examples::

      weighting = mtl.level_uncertainty(mtl.nash(5), 0.01)
      state = mtl.init_combine(weighting)
      found = mtl.backward(losses_fn, params, batch, weighting, state, tasks=tasks, levels=levels)

    Args:
      weighting: the method.
      learning_rate: Adam's learning rate for c.
      features: :math:`\phi`, levels (B,) to (B, m).

    Returns:
      A `Weighting` that needs what the method needs.

    Raises:
      ValueError: unless learning_rate > 0, or if the method has weights of levels already.
    """
    if not learning_rate > 0:
        raise ValueError(f"learning_rate must be > 0, got {learning_rate}")
    if weighting.levels is not None:
        raise ValueError("the method has weights of levels already")
    adam = optax.adam(learning_rate)

    def scaled_features(levels):
        found = features(levels).astype(jnp.float32)
        return found / np.float32(np.sqrt(found.shape[1]))

    def u_of(state, levels):
        u = jnp.dot(scaled_features(levels), state.coefficients, precision="highest")
        return jnp.maximum(u, _LEAST)

    def init():
        size = jax.eval_shape(features, jax.ShapeDtypeStruct((1,), jnp.float32)).shape[1]
        coefficients = jnp.zeros(size, jnp.float32)
        return LevelState(weighting.init(), coefficients, adam.init(coefficients))

    def weigh(stats, state):
        weights, inner = weighting.weigh(stats, state.state)
        return weights, state._replace(state=inner)

    def gradient(state, levels, losses):
        u = u_of(state, levels)
        slopes = jnp.clip(1 - losses * jnp.exp(-u), -_LARGEST_SLOPE, _LARGEST_SLOPE)
        slopes = jnp.where((u == _LEAST) & (slopes > 0), 0, slopes)
        return jnp.dot(slopes, scaled_features(levels), precision="highest")

    def update(state, gradient):
        updates, after = adam.update(gradient, state.adam)
        return state._replace(coefficients=state.coefficients + updates, adam=after)

    rule = LevelRule(lambda state, levels: jnp.exp(-u_of(state, levels)), gradient, update)
    return lifted(weighting)._replace(init=init, weigh=weigh, levels=rule)
