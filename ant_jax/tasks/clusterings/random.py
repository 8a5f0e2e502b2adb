"""No intervals: a control."""

import numpy as np

from ant_jax.tasks.clustering import uniform_boundaries
from ant_jax.tasks.clusterings.clusters import Clusters

# The partition is the same for every run, as that into intervals is.
_SEED = 0


def random(log_snr: np.ndarray, k: int) -> Clusters:
    """A random partition into k tasks of equally many levels."""
    order = np.random.default_rng(_SEED).permutation(len(log_snr))
    return Clusters(uniform_boundaries(len(log_snr), k), order)
