"""Multi-task weightings and the functions that apply them.

Each method is a function of a module of its own name, ``nash`` of ``nash.py``, and is here too.
"""

import sys

from ant_jax import settings
from ant_jax.mtl.backward import Backward, backward, backward_at_features
from ant_jax.mtl.combine import CombineState, combine, init_combine
from ant_jax.mtl.gramian import gramian, pairwise_cosines
from ant_jax.mtl.weighting import TaskStats, Weighting
from ant_jax.mtl.wrappers import averaged, clipped, every, scaled

_METHODS = settings.names_in(sys.modules[__name__], Weighting)
globals().update(
    {name: settings.resolve(sys.modules[__name__], name, Weighting) for name in _METHODS}
)

__all__ = [
    "Backward",
    "CombineState",
    "TaskStats",
    "Weighting",
    "averaged",
    "backward",
    "backward_at_features",
    "clipped",
    "combine",
    "every",
    "gramian",
    "init_combine",
    "pairwise_cosines",
    "scaled",
    *_METHODS,
]
