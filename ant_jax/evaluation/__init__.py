"""Measures samples: a feature extractor computes outputs of images, and metrics compute figures.

A figure is a named number, such as the FID. An extractor is one file, ``features/NAME.py``, and a
metric is one file, ``metrics/NAME.py``; your own is ``package.module:attribute``. Each is a
function with the file's name. Its typed arguments are its settings (`ant_jax.settings`), and it
returns an `Extractor` or a `Metric`::

  def mine(weights: Path) -> Extractor:
      return Extractor({"features": (384,)}, check, load)

  def spread() -> Metric:
      def measure(samples, reference):
          return {"spread": float(samples.kept["features"].std())}

      return Metric(measure, samples=frozenset({"features"}))

Extractors and metrics agree on these names of outputs. An extractor may have others as well:

============  =====================  ===============================================================
``features``  (d,) float             features of the whole image
``spatial``   (d,) float             features that depend on where things are in the image
``logits``    (classes,) float       unnormalised log-probabilities of a classifier
``labels``    () integer             the class that a classifier of the data's classes predicts
``pixels``    (h, w, c) uint8        the image itself, if distances between pixels mean something
============  =====================  ===============================================================

Images are processed batch by batch. Moments need only sums in memory. The outputs of each image are
kept if a metric needs them. A metric is left out if the extractor or the reference lacks what the
metric needs: a file of statistics, for example, has only moments.
"""

from ant_jax.evaluation.evaluator import Evaluator, best_by, build_evaluator, measure, table
from ant_jax.evaluation.features import Extractor, Network
from ant_jax.evaluation.losses import interval_losses
from ant_jax.evaluation.metrics import Metric
from ant_jax.evaluation.metrics.frechet import frechet_distance
from ant_jax.evaluation.metrics.inception_score import inception_score_of
from ant_jax.evaluation.metrics.nearest import nearest_distances
from ant_jax.evaluation.metrics.precision_recall import PrecisionRecall, precision_and_recall
from ant_jax.evaluation.moments import Gaussian, Moments, covariance, gaussian, merge, moments
from ant_jax.evaluation.real_images import Images, data_reference, read_reference
from ant_jax.evaluation.statistics import read_statistics
from ant_jax.evaluation.summary import Reference, Summary, summarise

__all__ = [
    "Extractor",
    "Gaussian",
    "Images",
    "Evaluator",
    "Metric",
    "Moments",
    "Network",
    "PrecisionRecall",
    "Reference",
    "Summary",
    "best_by",
    "covariance",
    "data_reference",
    "frechet_distance",
    "gaussian",
    "inception_score_of",
    "interval_losses",
    "build_evaluator",
    "measure",
    "merge",
    "moments",
    "nearest_distances",
    "precision_and_recall",
    "read_reference",
    "read_statistics",
    "summarise",
    "table",
]
