"""Metrics of samples, one file each; see `ant_jax.evaluation`."""

from collections.abc import Callable
from typing import NamedTuple

from ant_jax.evaluation.summary import Reference, Summary


class Metric(NamedTuple):
    """A metric that compares samples with real images.

    It is left out if the extractor or the reference lacks what it needs. A reference that is a file
    of statistics has moments, but no outputs of single images.

    Attributes:
      measure: ``measure(samples, reference)`` gets a summary of the samples, and returns figures by
        name. It may leave out a figure if there are too few images for it. Raises ValueError if it
        can't measure.
      moments: Names of outputs whose mean and covariance it needs, for samples and real images.
      samples: Names of outputs that it needs for each sample.
      real: Names of outputs that it needs for each real image. Training data has them for 10 000
        images.
      floors: Names of figures that are also computed for held-out real images, as ``real_NAME``, to
        compare with.
      lowest_is_best: Name of the figure whose lowest value is that of the best model; "" for none.
      highest_is_best: Name of the figure whose highest value is that of the best model; "" for
        none. The best checkpoint of a run is chosen by one of these.
    """

    measure: Callable[[Summary, Reference], dict[str, float]]
    moments: frozenset[str] = frozenset()
    samples: frozenset[str] = frozenset()
    real: frozenset[str] = frozenset()
    floors: frozenset[str] = frozenset()
    lowest_is_best: str = ""
    highest_is_best: str = ""
