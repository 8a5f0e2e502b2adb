"""Negative transfer: compares a multi-task model with specialists (Go et al. 2023, O2).

A specialist is a model that is trained on one interval of noise levels alone. If it denoises its
interval better than the multi-task model does, the other tasks have harmed this interval.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from ant_jax.diffusion import switch_by_level


class TransferGap(NamedTuple):
    """The distance of samples to the data, with and without specialists.

    Attributes:
      multi_task: distance of the multi-task model's samples.
      mixed: (k,) distances of samples for which specialist i denoised interval i and the multi-task
        model all other intervals.
      gap: (k,) ``multi_task - mixed``. A positive gap means negative transfer in that interval,
        because the specialist improves the samples. Papers differ in the sign; this is the sign of
        Go et al.
    """

    multi_task: float
    mixed: np.ndarray
    gap: np.ndarray


def transfer_gap(
    distance: Callable[[Partial], float],
    apply_fn: Callable[..., Any],
    multi_task: Any,
    specialists: Sequence[Any],
    boundaries: np.ndarray,
) -> TransferGap:
    """Measures the negative transfer gap of each interval (Go et al. 2023, section 3.2).

    Args:
      distance: draws samples with a network ``(x, t, y) -> output`` and returns their distance to
        the data, such as the Frechet distance. Use the same initial noise in every call, so that
        the differences have less variance. All calls share one compiled program.
      apply_fn: ``(params, x, t, y) -> output``.
      multi_task: parameters of the model trained on all noise levels.
      specialists: k sets of parameters; the i-th is trained on interval i.
      boundaries: (k + 1,) boundaries of the intervals.

    Returns:
      The gap of each interval.

    Raises:
      ValueError: if the number of specialists is not the number of intervals.
    """
    k = len(boundaries) - 1
    if len(specialists) != k:
        raise ValueError(f"{k} intervals need {k} specialists, got {len(specialists)}")

    def mixed_with(specialist, interval):
        params = jax.tree.map(lambda *leaves: jnp.stack(leaves), multi_task, specialist)
        edges = np.array([0, *interval, boundaries[-1]])
        return distance(switch_by_level(apply_fn, params, edges, np.array([0, 1, 0])))

    alone = mixed_with(multi_task, (0, 0))
    mixed = np.array(
        [mixed_with(specialist, boundaries[i : i + 2]) for i, specialist in enumerate(specialists)]
    )
    return TransferGap(alone, mixed, alone - mixed)
