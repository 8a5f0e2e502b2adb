"""Networks whose features samples are evaluated by: one file each; see `ant_jax.evaluation`."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

Outputs = Mapping[str, np.ndarray]


class Network(NamedTuple):
    """A loaded feature extractor.

    Attributes:
      outputs: From batches of uint8 images (n, height, width, channels) of one size to what the
        extractor gives of all of them, (n, *shape) by name; in their order, but perhaps in batches
        of other sizes. Raises ValueError where it can't evaluate such images.
      digest: Of the weights: another one, another cache, and figures of something else.
    """

    outputs: Callable[[Iterable[np.ndarray]], Iterator[Outputs]]
    digest: str


class Extractor(NamedTuple):
    """A feature extractor before it is loaded: making one costs nothing.

    Attributes:
      shapes: What it gives of an image, by name; see `ant_jax.evaluation`.
      check: From height, width and channels (None where that is not known yet) of images to
        nothing. Raises ValueError where it can't evaluate them, or lacks something: words that
        follow its name, such as "evaluates grey images". It is called before hours of drawing.
      load: Reads its weights. Raises ValueError or OSError where it can't.
      figure_names: What the field calls the figures of these features, where that is not the
        metric's own name for them.
    """

    shapes: Mapping[str, tuple[int, ...]]
    check: Callable[[int, int, int | None], None]
    load: Callable[[], Network]
    figure_names: Mapping[str, str] = {}
