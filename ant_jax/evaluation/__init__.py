"""Judging samples: feature extractors, the Frechet distance, label accuracy and copies."""

from ant_jax.evaluation.frechet import Moments, covariance, frechet_distance, merge, moments
from ant_jax.evaluation.losses import interval_losses
from ant_jax.evaluation.nearest import nearest_distances
from ant_jax.evaluation.sample_metrics import Extractor, extractor, real_floor, sample_metrics

__all__ = [
    "Extractor",
    "Moments",
    "covariance",
    "extractor",
    "frechet_distance",
    "interval_losses",
    "merge",
    "moments",
    "nearest_distances",
    "real_floor",
    "sample_metrics",
]
