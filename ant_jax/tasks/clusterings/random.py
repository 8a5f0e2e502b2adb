"""Random tasks instead of intervals, as a control."""

import numpy as np

from ant_jax.tasks.clustering import uniform_boundaries
from ant_jax.tasks.clusterings.clusters import Clusters

# All runs share one random partition, as all runs share the intervals.
_SEED = 0


def random(log_snr: np.ndarray, k: int) -> Clusters:
    """A random partition into k tasks of equally many levels."""
    order = np.random.default_rng(_SEED).permutation(len(log_snr))
    return Clusters(uniform_boundaries(len(log_snr), k), order)
