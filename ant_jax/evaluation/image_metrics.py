"""The figures that the field reports of generated images."""

from collections.abc import Iterable

import numpy as np

from ant_jax.evaluation.features.inception import Network
from ant_jax.evaluation.image_reference import Reference
from ant_jax.evaluation.metrics.frechet import frechet_distance
from ant_jax.evaluation.metrics.inception_score import inception_score
from ant_jax.evaluation.metrics.precision_recall import precision_recall
from ant_jax.evaluation.summary import summarise

_NEIGHBOURS = 3


def image_metrics(
    batches: Iterable[tuple[np.ndarray, np.ndarray | None]], network: Network, reference: Reference
) -> dict[str, float]:
    """Judges generated images as Dhariwal & Nichol, *Diffusion Models Beat GANs*, 2021, do.

    The images pass through one batch at a time; the features of all are in memory, 12 kB for each.
    Every figure depends on the number of samples: compare equal numbers, and 50 000 with published
    figures.

    Args:
      batches: Pairs of uint8 images (n, height, width, 1 or 3) and labels, which don't matter.
        For the inception score they should not be sorted by class; sample i of
        `sampling.sample_batches` is of class i mod classes, so its splits of 5000 are balanced.
      network: From `load_inception`.
      reference: The real images.

    Returns:
      fid: Frechet distance of the pool features (Heusel et al. 2017).
      sfid: That of the spatial features (Nash et al. 2021); absent where the reference has none.
      inception_score: See `inception_score`.
      precision, recall: See `precision_recall`; k = 3. Absent where the reference has no images, or
        no more than 3, or there are no more samples than that.
      num_samples: Number of generated images.

    Raises:
      ValueError: If there are fewer than two samples.
    """
    summary = summarise(network.features(images for images, _ in batches))
    found, real = summary.statistics, reference.statistics
    metrics = {"fid": frechet_distance(*found.pool, *real.pool)}
    if real.spatial is not None:
        metrics["sfid"] = frechet_distance(*found.spatial, *real.spatial)
    metrics["inception_score"] = inception_score(summary.logits)
    if reference.pool is not None and min(len(reference.pool), summary.count) > _NEIGHBOURS:
        metrics |= precision_recall(reference.pool, summary.pool, _NEIGHBOURS)._asdict()
    return metrics | {"num_samples": summary.count}
