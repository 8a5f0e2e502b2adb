"""A train step that compiles at once, and whose update is the gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ant_jax import train_step as ts
from ant_jax.diffusion import GaussianDiffusion, alphas_bar

T, K, BATCH, CLASSES = 100, 4, 32, 3
BOUNDARIES = np.array([0, 7, 30, 71, T])
DIFFUSION = GaussianDiffusion(alphas_bar("cosine", T))


def apply_fn(params, x, t, y):
    """A network that is small to compile, and has all that matters here: x, t and y all count."""
    features = jnp.concatenate([x.reshape(len(x), -1), jnp.sin(t[:, None] / 20)], 1)
    hidden = jnp.tanh(features @ params["in"] + params["labels"][y])
    return (hidden @ params["out"]).reshape(x.shape)


def make_params():
    shapes = {"in": (17, 12), "labels": (CLASSES + 1, 12), "out": (12, 16)}
    rng = np.random.default_rng(1)
    return {n: jnp.asarray(0.4 * rng.normal(size=s), jnp.float32) for n, s in shapes.items()}


def make_batch(size):
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (size, 4, 4, 1)).astype(np.uint8),
        "label": rng.integers(0, CLASSES, size).astype(np.int32),
    }


def step_fn(weighting, **settings):
    """A step whose update is the combined gradient itself: params_after - params = gradient."""
    settings = {
        "apply_fn": apply_fn,
        "process": DIFFUSION,
        "boundaries": BOUNDARIES,
        "optimizer": optax.identity(),
        "seed": 3,
        "num_classes": CLASSES,
        "label_dropout": 0.3,
    } | settings
    setup = ts.Setup(weighting=weighting, **settings)
    return lambda state, batch, axis_name=None: ts.train_step(state, batch, setup, axis_name)


def norm(tree):
    """In NumPy, here and below: JAX would compile every operation for every shape."""
    return np.sqrt(
        sum(np.sum(np.square(np.asarray(leaf, float))) for leaf in jax.tree.leaves(tree))
    )


def assert_close(a, b, rtol=2e-5):
    scale = norm(b)
    assert scale > 1e-3
    assert norm(jax.tree.map(np.subtract, a, b)) < rtol * scale
