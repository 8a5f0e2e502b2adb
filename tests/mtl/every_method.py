"""All methods of the folder and all aggregators, and what their tests share."""

import jax
import numpy as np

from ant_jax import mtl, settings
from ant_jax.mtl import aggregators
from ant_jax.mtl.aggregators.halves import OnHalves

FOLDER = {
    name: settings.resolve(mtl, name, mtl.Weighting)
    for name in settings.names_in(mtl, mtl.Weighting)
}
AGGREGATORS = aggregators.__all__
# Those that take the gradients of two halves of each task's examples.
HALVES = set(settings.names_in(aggregators, OnHalves))


def flat(tree, lead):
    """Leaves with some leading axes, side by side in float64."""
    leaves = [np.asarray(leaf, float) for leaf in jax.tree.leaves(tree)]
    return np.concatenate([leaf.reshape(*leaf.shape[:lead], -1) for leaf in leaves], -1)


def equal_replicas(tree):
    for leaf in jax.tree.leaves(tree):
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[0], leaf.shape))
    return jax.tree.map(lambda leaf: leaf[0], tree)
