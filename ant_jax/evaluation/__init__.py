"""Judging samples: feature extractors, metrics of their features, label accuracy and copies."""

from ant_jax.evaluation.features.inception import Network, load_inception
from ant_jax.evaluation.image_metrics import image_metrics
from ant_jax.evaluation.image_reference import Reference, data_reference, read_reference
from ant_jax.evaluation.metrics.frechet import Moments, covariance, frechet_distance, merge, moments
from ant_jax.evaluation.metrics.inception_score import inception_score
from ant_jax.evaluation.metrics.losses import interval_losses
from ant_jax.evaluation.metrics.nearest import nearest_distances
from ant_jax.evaluation.metrics.precision_recall import PrecisionRecall, precision_recall
from ant_jax.evaluation.reference import (
    Gaussian,
    Statistics,
    num_samples,
    read_samples,
    read_statistics,
    write_samples,
    write_statistics,
)
from ant_jax.evaluation.sample_metrics import Extractor, extractor, real_floor, sample_metrics

__all__ = [
    "Extractor",
    "Gaussian",
    "Moments",
    "Network",
    "PrecisionRecall",
    "Reference",
    "Statistics",
    "covariance",
    "data_reference",
    "extractor",
    "frechet_distance",
    "image_metrics",
    "inception_score",
    "interval_losses",
    "load_inception",
    "merge",
    "moments",
    "nearest_distances",
    "num_samples",
    "precision_recall",
    "read_reference",
    "read_samples",
    "read_statistics",
    "real_floor",
    "sample_metrics",
    "write_samples",
    "write_statistics",
]
