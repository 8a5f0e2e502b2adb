"""Intervals of levels that are close in log-SNR."""

import numpy as np

from ant_jax.tasks.clustering import interval_clusters, snr_costs
from ant_jax.tasks.clusterings.clusters import Clusters


def snr(log_snr: np.ndarray, k: int) -> Clusters:
    """The k intervals of least total distance in log-SNR (Go et al. 2023, section 4.1)."""
    return Clusters(interval_clusters(snr_costs(log_snr), k))
