"""Intervals of levels whose gradients agree."""

import os
from typing import Annotated

import numpy as np

from ant_jax.settings import Affects, Path
from ant_jax.tasks import affinity as affinities
from ant_jax.tasks.clustering import gradient_costs, interval_clusters
from ant_jax.tasks.clusterings.clusters import Clusters


def gradient(
    log_snr: np.ndarray, k: int, affinity: Annotated[Path, Affects.NOTHING] = ""
) -> Clusters:
    """The k intervals of greatest total task affinity (Go et al. 2023, section 4.1).

    Args:
      log_snr: (n,) of the levels.
      k: number of tasks.
      affinity: an .npz of ``python -m experiments.task_affinity``. A run keeps its
        first tasks, even if the file changes or is deleted.

    Raises:
      OSError: if there is no such file.
      ValueError: if it is not the affinity of n levels with this log-SNR.
    """
    matrix = affinities.load(os.path.expanduser(affinity), len(log_snr), log_snr)
    return Clusters(interval_clusters(gradient_costs(matrix), k))
