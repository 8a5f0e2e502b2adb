"""Task affinity: the similarity of the gradients of two denoising tasks.

Go et al., *Addressing Negative Transfer in Diffusion Models* (NeurIPS 2023, arXiv 2306.00354),
section 3.1: the cosine similarity of the mean gradients of the losses at two timesteps, averaged
over training. Observation O1: it falls as the gap in timestep or in log-SNR widens. A matrix of
affinities is the input of gradient-based interval clustering, `clustering.gradient_costs`.
"""

from ant_jax.tasks.affinity.gradients import SKETCH_SIZE, sketch, task_affinity
from ant_jax.tasks.affinity.matrix import (
    GapProfile,
    affinity_by_gap,
    interpolate,
    load,
    made_from,
    rank_correlation,
    save,
    timestep_grid,
)

__all__ = [
    "SKETCH_SIZE",
    "GapProfile",
    "affinity_by_gap",
    "interpolate",
    "load",
    "made_from",
    "rank_correlation",
    "save",
    "sketch",
    "task_affinity",
    "timestep_grid",
]
