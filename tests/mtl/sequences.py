"""A weighting on a sequence of losses and Gram matrices."""

import jax
import jax.numpy as jnp
import numpy as np

from ant_jax.mtl import TaskStats


def weigh_all(weighting, losses, gram=None, counts=None, length=None):
    """Weights (n, k) and the last state, for losses (n, k), or (k,) and a length.

    The Gram matrix is the same at all n steps.
    """
    losses = np.asarray(losses, np.float32)
    if length is not None:
        losses = np.broadcast_to(losses, (length, weighting.k))
    counts = np.ones_like(losses) if counts is None else np.float32(counts)
    gram = None if gram is None else jnp.asarray(gram, jnp.float32)

    def step(state, row):
        weights, state = weighting.weigh(TaskStats(row[0], gram, row[1]), state)
        return state, weights

    state, weights = jax.lax.scan(step, weighting.init(), (losses, counts))
    return np.asarray(weights), state


def weigh_once(weighting, losses, gram=None):
    return weigh_all(weighting, losses, gram, length=1)[0][0]
