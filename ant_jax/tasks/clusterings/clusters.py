"""The type of what a clustering finds."""

from typing import NamedTuple

import numpy as np


class Clusters(NamedTuple):
    """k tasks of n noise levels.

    Attributes:
      boundaries: (k + 1,) int; task i is boundaries[i] .. boundaries[i + 1] - 1.
      order: (n,) a permutation of the levels if tasks are not intervals: task i has the levels
        order[boundaries[i] : boundaries[i + 1]]. None for intervals.
    """

    boundaries: np.ndarray
    order: np.ndarray | None = None
