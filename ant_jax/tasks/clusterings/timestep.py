"""Intervals of equally many levels."""

import numpy as np

from ant_jax.tasks.clustering import uniform_boundaries
from ant_jax.tasks.clusterings.clusters import Clusters


def timestep(log_snr: np.ndarray, k: int) -> Clusters:
    """The k intervals of least total distance in timestep (Go et al. 2023, section 4.1)."""
    return Clusters(uniform_boundaries(len(log_snr), k))
