"""How noise levels form tasks: one file each.

A component takes the log-SNR of n noise levels, evenly spaced by the process's own density, and k,
and returns `Clusters`.
"""

from ant_jax.tasks.clusterings.clusters import Clusters

__all__ = ["Clusters"]
