"""Feature extractors, one file each; see `ant_jax.evaluation`."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

Outputs = Mapping[str, np.ndarray]


class Network(NamedTuple):
    """A loaded feature extractor.

    Attributes:
      outputs: Takes batches of uint8 images (n, height, width, channels) of one size. Yields the
        outputs of all images, (n, *shape) by name, in the same order; these batches may have other
        sizes. Raises ValueError if it can't evaluate such images.
      digest: Hash of the weights. Caches and results depend on it.
    """

    outputs: Callable[[Iterable[np.ndarray]], Iterator[Outputs]]
    digest: str


class Extractor(NamedTuple):
    """A feature extractor that is not loaded yet, so making one costs nothing.

    Attributes:
      shapes: Shapes of the outputs of one image, by name; see `ant_jax.evaluation`.
      check: ``check(height, width, channels)`` raises ValueError if the extractor can't evaluate
        such images, or lacks something, such as its weights. The channels are None if they are not
        known yet. The message continues the extractor's name, such as "evaluates grey images". The
        check runs before the samples are drawn, which can take hours.
      load: Reads the weights. Raises ValueError or OSError if it can't.
      figure_names: The field's names of figures of these features, by the metric's own name, such
        as {"frechet_distance": "fid"}.
    """

    shapes: Mapping[str, tuple[int, ...]]
    check: Callable[[int, int, int | None], None]
    load: Callable[[], Network]
    figure_names: Mapping[str, str] = {}
