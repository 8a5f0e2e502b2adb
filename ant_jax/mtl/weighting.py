"""The type of a weighting: a rule that chooses the cotangent of the cluster losses."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

State = Any


class Weighting(NamedTuple):
    """An MTL method as an (init, weigh) pair on k-sized quantities.

    Every method's update direction is ``J^T w`` with ``J`` the k x P Jacobian of the cluster
    losses; a method only chooses ``w``. Nothing of size P enters it.

    Attributes:
      init: ``() -> state``; the state is any pytree of arrays and is checkpointed.
      weigh: ``(losses (k,), gram (k, k), present (k,) bool, state) -> (weights (k,), state)``, pure
        and jittable, in float32. ``gram = J J^T``; what the method does not need may be None.
        Clusters that are not present get weight 0. It need not care for losses or gradients that
        are not finite: `combine` and the train step drop the state that comes of them.
      needs_gram: whether `weigh` reads ``gram``; if not, one backward pass is enough.
      k: number of clusters.
      needs_losses: whether `weigh` reads ``losses``.
    """

    init: Callable[[], State]
    weigh: Callable[[jax.Array | None, jax.Array | None, jax.Array, State], tuple[jax.Array, State]]
    needs_gram: bool
    k: int
    needs_losses: bool = False


def check_k(k: int) -> None:
    """Raises a ValueError unless k is a positive int."""
    if not isinstance(k, int) or isinstance(k, bool) or k < 1:
        raise ValueError(f"k, the number of clusters, must be an int >= 1, got {k!r}")
