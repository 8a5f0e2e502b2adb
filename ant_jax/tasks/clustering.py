"""Interval clustering: split the T denoising tasks into k contiguous intervals of timesteps.

Go et al., *Addressing Negative Transfer in Diffusion Models* (NeurIPS 2023, arXiv 2306.00354),
section 4.1. A cost matrix holds the cost of every closed interval `l..r` of timesteps, measured
from its centre `c = (l + r + 1) // 2`. A dynamic programme finds the partition with the lowest
total cost. The module needs only NumPy and computes in float64, once, before training. A cost
matrix takes 8 n^2 bytes, 0.8 GB for n = 10 000; everything else here takes less.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

MAX_TIMESTEPS = 10_000  # a larger cost matrix would take gigabytes and minutes

_ROWS = 256  # rows of a cost matrix that are processed together


def timestep_costs(num_timesteps: int) -> np.ndarray:
    """Costs of intervals by distance in timestep, `sum_t |t - c|` (Go et al. 2023, section 4.1).

    Args:
      num_timesteps: The number of timesteps n, at least 1.

    Returns:
      Float64 array (n, n), in timesteps: entry `[l, r]` is the cost of `l..r`, inf where `l > r`.

    Raises:
      ValueError: If `num_timesteps` is not an integer from 1 to `MAX_TIMESTEPS`.
    """
    _check_integer("num_timesteps", num_timesteps)
    _check_size(num_timesteps)
    # 2d timesteps cost d^2 and 2d + 1 cost d (d + 1): a quarter of the squared length, floored.
    by_length = np.arange(1, num_timesteps + 1) ** 2 // 4
    row = np.concatenate([np.full(num_timesteps - 1, np.inf), by_length])
    return np.lib.stride_tricks.sliding_window_view(row, num_timesteps)[::-1].copy()


def snr_costs(log_snr: np.ndarray) -> np.ndarray:
    """Costs of intervals by distance in log-SNR, `sum_t |log_snr[t] - log_snr[c]|`.

    Go et al. 2023, section 4.1. Correct for any sequence, monotone or not.

    Args:
      log_snr: Array (n,), the log signal-to-noise ratio (natural logarithm) of each timestep.

    Returns:
      Float64 array (n, n), in nats: entry `[l, r]` is the cost of `l..r`, inf where `l > r`.

    Raises:
      ValueError: If `log_snr` is empty, longer than `MAX_TIMESTEPS`, not one-dimensional or not
        finite.
    """
    log_snr = np.asarray(log_snr, np.float64)
    if log_snr.ndim != 1 or log_snr.size == 0:
        raise ValueError(f"log_snr must have shape (n,) with n >= 1, not {log_snr.shape}.")
    _check_size(log_snr.size)
    if not np.isfinite(log_snr).all():
        raise ValueError("log_snr must be finite.")

    def distances(offset):
        gap = abs(offset)
        return np.abs(log_snr[gap:] - log_snr[: log_snr.size - gap])

    return _costs_from_centre(log_snr.size, distances)


def gradient_costs(affinity: np.ndarray) -> np.ndarray:
    """Costs of intervals by task affinity, `-sum_t affinity[c, t]` (Go et al. 2023, section 4.1).

    Args:
      affinity: Array (n, n), the similarity of the gradients of each pair of timesteps (a cosine,
        no unit). Costs of centre c use row c, so the matrix need not be symmetric.

    Returns:
      Float64 array (n, n): entry `[l, r]` is the cost of `l..r`, inf where `l > r`.

    Raises:
      ValueError: If `affinity` is empty, not square or not finite.
    """
    affinity = _square("affinity", affinity)
    if not np.isfinite(affinity).all():
        raise ValueError("affinity must be finite.")
    return _costs_from_centre(len(affinity), lambda offset: -affinity.diagonal(offset))


def interval_clusters(costs: np.ndarray, k: int) -> np.ndarray:
    """Finds the k nonempty intervals with the lowest total cost, by exact dynamic programming.

    Go et al. 2023, section 4.1: `D_1[r] = cost[0, r]` and
    `D_j[r] = min_l D_{j-1}[l - 1] + cost[l, r]`, in O(k n^2) time and O(k n) memory besides the
    costs. Among partitions of equal cost the last interval starts as early as possible, then the
    interval before it, and so on.

    Args:
      costs: Array (n, n): entry `[l, r]` is the cost of the closed interval `l..r`. Entries with
        `l > r` are ignored.
      k: The number of intervals, `1 <= k <= n`.

    Returns:
      The boundaries b: an integer array (k + 1,) with `b[0] = 0 < ... < b[k] = n`; cluster i
      holds the timesteps t with `b[i] <= t < b[i + 1]`.

    Raises:
      ValueError: If `costs` is empty, not square or not finite for some `l <= r`, or if `k` is
        not an integer between 1 and n.
    """
    costs = _square("costs", costs)
    n = len(costs)
    _check_integer("k", k, n)
    for first in range(0, n, _ROWS):
        if not np.isfinite(_upper_rows(costs, first, 0)).all():
            raise ValueError("costs[l, r] must be finite for every l <= r.")

    # least[j][r] is the lowest cost of splitting 0..r into j + 1 intervals. The last interval
    # always ends at n - 1, so the k-th stage needs only one entry. The second loop computes it. It
    # needs no table of minimisers, because it recomputes one column per stage.
    least = [costs[0]]
    for _ in range(k - 2):
        stage = np.full(n, np.inf)
        for first in range(1, n, _ROWS):
            rows = _upper_rows(costs, first, np.inf)
            rows += least[-1][first - 1 : first - 1 + len(rows), None]
            stage[first:] = np.minimum(stage[first:], rows.min(axis=0))
        least.append(stage)
    boundaries = np.zeros(k + 1, np.int64)
    boundaries[k] = n
    for j in range(k - 1, 0, -1):
        last = boundaries[j + 1] - 1
        boundaries[j] = 1 + np.argmin(least[j - 1][:last] + costs[1 : last + 1, last])
    return boundaries


def uniform_boundaries(num_timesteps: int, k: int) -> np.ndarray:
    """Boundaries of k evenly spaced clusters, whose sizes differ by at most one timestep.

    They are optimal for `timestep_costs`: the cost `length**2 // 4` is convex in the length, so no
    partition is cheaper than a balanced one.

    Args:
      num_timesteps: The number of timesteps n, at least 1.
      k: The number of clusters, `1 <= k <= n`.

    Returns:
      Integer array (k + 1,), as returned by `interval_clusters`.

    Raises:
      ValueError: If `num_timesteps` is not an integer of at least 1, or `k` not one of 1 to n.
    """
    _check_integer("num_timesteps", num_timesteps)
    _check_integer("k", k, num_timesteps)
    return np.arange(k + 1) * num_timesteps // k


def assign_clusters(t: Any, boundaries: Any) -> Any:
    """Returns the cluster of each timestep; `jax.jit` can trace it if `t` is a JAX array.

    Args:
      t: NumPy or JAX array of any shape, timesteps in `[0, boundaries[-1])`. Timesteps
        outside are assigned to the nearest cluster, because traced values can't be checked.
      boundaries: NumPy or JAX array (k + 1,), as returned by `interval_clusters`, or the levels of
        a continuous process there.

    Returns:
      Integer array of the shape and kind (NumPy or JAX) of `t`, values in `[0, k)`.
    """
    return (t[..., None] >= boundaries[1:-1]).sum(axis=-1)


def _costs_from_centre(n: int, distances: Callable[[int], np.ndarray]) -> np.ndarray:
    """Sums the distances from the centre of every interval.

    The centre does not change if an interval of odd length loses its right end, or an interval of
    even length its left end. So the costs of one length are those of the previous length plus one
    distance each. This holds for any distances, and avoids the cancellation in differences of
    prefix sums.

    Args:
      n: The number of timesteps.
      distances: Maps an offset d to the d-th diagonal, as `np.diagonal` orders it, of the (n, n)
        matrix whose entry `[c, t]` is the distance of timestep t from centre c.

    Returns:
      Float64 array (n, n), inf where `l > r`.
    """
    costs = np.full((n, n), np.inf)
    by_left_end = distances(0)
    np.fill_diagonal(costs, by_left_end)
    for length in range(2, n + 1):
        half = length // 2
        count = n - length + 1
        if length % 2:
            by_left_end = by_left_end[:-1] + distances(half)[half:]
        else:
            by_left_end = by_left_end[1:] + distances(-half)[:count]
        costs.reshape(-1)[length - 1 : n * count : n + 1] = by_left_end
    return costs


def _upper_rows(costs: np.ndarray, first: int, below: float) -> np.ndarray:
    """A copy of `_ROWS` rows from the diagonal on, `below` where `l > r`."""
    rows = costs[first : first + _ROWS, first:].copy()
    rows[np.tri(*rows.shape, k=-1, dtype=bool)] = below
    return rows


def _square(name: str, matrix: np.ndarray) -> np.ndarray:
    matrix = np.asarray(matrix, np.float64)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.size == 0:
        raise ValueError(f"{name} must have shape (n, n) with n >= 1, not {matrix.shape}.")
    return matrix


def _check_size(num_timesteps: int) -> None:
    if num_timesteps > MAX_TIMESTEPS:
        raise ValueError(
            f"the costs of {num_timesteps} timesteps would take {8e-9 * num_timesteps**2:.0f} GB: "
            f"clusters need at most {MAX_TIMESTEPS} timesteps."
        )


def _check_integer(name: str, value: int, largest: int | None = None) -> None:
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, not {value!r}.")
    if largest is not None and value > largest:
        raise ValueError(f"{name} must be at most the number of timesteps {largest}, not {value}.")
