"""Multi-task weightings and the functions that apply them.

Each method is a function of a module of its own name, ``nash`` of ``nash.py``, and is here too.
So are the methods of the folder `aggregators`, which stand in place of `combine`.
"""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ant_jax import settings
from ant_jax.mtl import aggregators
from ant_jax.mtl.backward import Backward, backward, backward_at_features
from ant_jax.mtl.combine import CombineState, combine, init_combine
from ant_jax.mtl.gramian import gramian, pairwise_cosines
from ant_jax.mtl.hydalearn import lookahead_weights
from ant_jax.mtl.levels import level_uncertainty
from ant_jax.mtl.mixing import pike
from ant_jax.mtl.pooling import by_task, pooled
from ant_jax.mtl.rep_mtl import RepMTL, rep_mtl
from ant_jax.mtl.slgrad import SLGrad, slgrad, slgrad_weights
from ant_jax.mtl.weighting import TaskStats, WeighError, Weighting
from ant_jax.mtl.wrappers import clipped, cr_mogm, every, scaled

_METHODS = settings.names_in(sys.modules[__name__], Weighting)
globals().update(
    {name: settings.resolve(sys.modules[__name__], name, Weighting) for name in _METHODS}
)
globals().update({name: getattr(aggregators, name) for name in aggregators.__all__})
if TYPE_CHECKING:
    # Type checkers can't list the folder.
    def __getattr__(name: str) -> Callable[..., Any]: ...


__all__ = [
    "Backward",
    "CombineState",
    "RepMTL",
    "SLGrad",
    "TaskStats",
    "WeighError",
    "Weighting",
    "backward",
    "backward_at_features",
    "by_task",
    "clipped",
    "combine",
    "cr_mogm",
    "every",
    "gramian",
    "init_combine",
    "level_uncertainty",
    "lookahead_weights",
    "pairwise_cosines",
    "pike",
    "pooled",
    "rep_mtl",
    "scaled",
    "slgrad",
    "slgrad_weights",
    *_METHODS,
    *aggregators.__all__,
]
