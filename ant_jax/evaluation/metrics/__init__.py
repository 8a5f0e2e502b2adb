"""Figures of samples: one file each; see `ant_jax.evaluation`."""

from collections.abc import Callable
from typing import NamedTuple

from ant_jax.evaluation.summary import Reference, Summary


class Metric(NamedTuple):
    """A metric of samples against real images.

    It is left out where the extractor does not give what it needs, or the reference does not have
    it: a file of statistics alone has moments, and nothing of each image.

    Attributes:
      measure: From a summary of the samples and the reference to figures by name. It may leave out
        figures that so few images don't have. Raises ValueError where it can't measure.
      moments: Names of outputs whose mean and covariance it takes, of samples and real images.
      samples: Names of outputs that it takes of each sample.
      real: Names of outputs that it takes of each real image, of the first 10 000 of training data.
      floors: Names of figures that are also given for held-out real images, as ``real_NAME``: the
        scale on which to read them.
    """

    measure: Callable[[Summary, Reference], dict[str, float]]
    moments: frozenset[str] = frozenset()
    samples: frozenset[str] = frozenset()
    real: frozenset[str] = frozenset()
    floors: frozenset[str] = frozenset()
