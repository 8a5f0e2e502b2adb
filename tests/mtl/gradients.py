"""Random and hard sets of k gradients, float64 of shape (n, k, p), and their Gram matrices."""

import jax
import jax.numpy as jnp
import numpy as np

from ant_jax.mtl import TaskStats


def _random(rng, n, k, p):
    return rng.normal(size=(n, k, p))


def _nearly_parallel(rng, n, k, p):
    """Angles from 1e-1 down to 1e-6."""
    angles = 10 ** rng.uniform(-6, -1, size=(n, 1, 1))
    return rng.normal(size=(n, 1, p)) + angles * rng.normal(size=(n, k, p))


def _scales_apart(rng, n, k, p):
    """Norms apart by 1e6."""
    exponents = rng.uniform(-3, 3, size=(n, k, 1))
    exponents[:, 0], exponents[:, -1] = 3, -3
    return 10**exponents * rng.normal(size=(n, k, p))


def _zero_row(rng, n, k, p):
    gradients = rng.normal(size=(n, k, p))
    gradients[np.arange(n), rng.integers(k, size=n)] = 0
    return gradients


def _rank_one(rng, n, k, p):
    return rng.uniform(0.1, 10, size=(n, k, 1)) * rng.normal(size=(n, 1, p))


def _opposed(rng, n, k, p):
    """The last gradient is a negative multiple of the first."""
    gradients = rng.normal(size=(n, k, p))
    gradients[:, -1] = -rng.uniform(0.1, 10, size=(n, 1)) * gradients[:, 0]
    return gradients


def _rank_one_opposed(rng, n, k, p):
    gradients = _rank_one(rng, n, k, p)
    gradients[:, -1] *= -1
    return gradients


def _sum_zero(rng, n, k, p):
    gradients = rng.normal(size=(n, k, p))
    gradients[:, -1] = -gradients[:, :-1].sum(1)
    return gradients


def _nearly_opposed(rng, n, k, p):
    gradients = rng.normal(size=(n, k, p))
    gradients[:, -1] = -gradients[:, 0] + 1e-3 * rng.normal(size=(n, p))
    return gradients


# Near those of OPPOSED no bargaining solution exists: a combination with positive weights vanishes.
REGULAR = (_random, _nearly_parallel, _scales_apart, _zero_row, _rank_one)
OPPOSED = (_opposed, _rank_one_opposed, _sum_zero, _nearly_opposed)


def draw(families, k, n=20, p=20, seed=0):
    """Stacks n sets of k gradients from each of the families, (len(families) * n, k, p)."""
    rng = np.random.default_rng([seed, k])
    return np.concatenate([family(rng, n, k, p) for family in families])


def grams(gradients):
    """Gram matrices in float64."""
    return gradients @ gradients.swapaxes(-1, -2)


def weigh(weighting, gram):
    """Weights of a method for a batch of Gram matrices, all tasks present, from the first state."""
    stats = lambda gram: TaskStats(None, gram, jnp.ones(weighting.k))
    one = lambda gram: weighting.weigh(stats(gram), weighting.init())[0]
    return np.asarray(jax.jit(jax.vmap(one))(jnp.float32(gram)), np.float64)
