"""Matrices of task affinities: their grid, file, interpolation and profile. Needs only NumPy."""

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from ant_jax import npz
from ant_jax.settings import check_integer


class GapProfile(NamedTuple):
    """Affinity by the gap between two tasks; all arrays (b,), one entry for each nonempty bin.

    Attributes:
      centres: Centres of the bins, in the unit of the positions.
      mean: Mean affinity of the pairs in the bin.
      std: Standard deviation of these affinities (divisor: count).
      count: Number of pairs, at least 1.
    """

    centres: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    count: np.ndarray  # pyright: ignore[reportIncompatibleMethodOverride]


def timestep_grid(num_timesteps: int, n: int) -> np.ndarray:
    """Evenly spaced timesteps at which to measure the affinity.

    Args:
      num_timesteps: The number of timesteps T, at least 1.
      n: Number of timesteps to choose, `1 <= n <= T`.

    Returns:
      (n,) distinct ascending integers from 0 to T - 1, both included; only T // 2 for n = 1.

    Raises:
      ValueError: If an argument is not an integer as described.
    """
    check_integer("num_timesteps", num_timesteps, 1)
    check_integer("n", n, 1)
    if n > num_timesteps:
        raise ValueError(f"n must be at most the number of timesteps {num_timesteps}, not {n}.")
    if n == 1:
        return np.array([num_timesteps // 2])
    # Round in integers: equal remainders round in the same direction, so all timesteps differ.
    return (np.arange(n) * (num_timesteps - 1) + (n - 1) // 2) // (n - 1)


def interpolate(affinity: np.ndarray, timesteps: np.ndarray, num_timesteps: int) -> np.ndarray:
    """Interpolates the affinity of a grid to all timesteps, for `clustering.gradient_costs`.

    The interpolation is bilinear in the two timesteps and constant outside the grid. Measured
    entries do not change. Between grid points the diagonal is interpolated like any other entry,
    and so is below 1.

    The interpolation moves boundaries of clusters by about one cell of the grid if the affinity is
    smooth within a cell. Elsewhere they may move further, at little cost: the log-SNR of a cosine
    schedule jumps at its two ends.

    Args:
      affinity: (n, n) affinity of the grid, symmetric or not.
      timesteps: (n,) grid: strictly increasing integers in [0, T), at least two unless T = 1.
      num_timesteps: The number of timesteps T.

    Returns:
      (T, T) float64.

    Raises:
      ValueError: If an argument is not as described, or `affinity` is not finite.
    """
    affinity, timesteps = _check_grid(affinity, timesteps, num_timesteps)
    if num_timesteps == 1:
        return affinity.copy()
    every = np.arange(num_timesteps)
    left = np.clip(np.searchsorted(timesteps, every, side="right") - 1, 0, len(timesteps) - 2)
    gap = timesteps[left + 1] - timesteps[left]
    fraction = np.clip((every - timesteps[left]) / gap, 0, 1)
    columns = (1 - fraction) * affinity[:, left] + fraction * affinity[:, left + 1]
    fraction = fraction[:, None]
    return (1 - fraction) * columns[left] + fraction * columns[left + 1]


def save(
    file: BinaryIO,
    affinity: np.ndarray,
    timesteps: np.ndarray,
    num_timesteps: int,
    log_snr: np.ndarray | None = None,
    made_from: Mapping[str, Any] | None = None,
) -> None:
    """Writes a measured affinity as an .npz file.

    Args:
      file: Opened for writing.
      affinity: (n, n), as for `interpolate`.
      timesteps: (n,), as for `interpolate`.
      num_timesteps: The number of timesteps T.
      log_snr: (T,) of the timesteps, by which `load` recognises another noise process.
      made_from: What the affinity was measured with, as values of JSON; see `made_from`.

    Raises:
      ValueError: If the arguments are not valid for `interpolate`.
    """
    affinity, timesteps = _check_grid(affinity, timesteps, num_timesteps)
    more: dict[str, Any] = {} if log_snr is None else {"log_snr": log_snr}
    if made_from is not None:
        more["made_from"] = np.frombuffer(json.dumps(made_from).encode(), np.uint8)
    np.savez(file, affinity=affinity, timesteps=timesteps, num_timesteps=num_timesteps, **more)


def made_from(path: str | Path) -> dict[str, Any]:
    """What the affinity of a file was measured with, as `save` got it; {} if it does not say."""
    with npz.opened(path) as archive:
        if not npz.has(archive, "made_from"):
            return {}
        return json.loads(_array(archive, "made_from", _LONGEST).astype(np.uint8).tobytes())


# Bytes of JSON.
_LONGEST = 100_000
# Log-SNR of equal processes differ by rounding at most.
_TOLERANCE = 1e-3
_ARRAYS = ("num_timesteps", "affinity", "timesteps")


def load(path: str | Path, num_timesteps: int, log_snr: np.ndarray | None = None) -> np.ndarray:
    """Reads what `save` wrote and interpolates it to all timesteps.

    Args:
      path: The file.
      num_timesteps: The number of timesteps T of the run that uses the affinity.
      log_snr: (T,) of this run; None to leave out the check.

    Returns:
      (T, T) float64, as returned by `interpolate`.

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: If the file is not a valid affinity, or was measured with another T or log-SNR.
    """
    with npz.opened(path) as archive:
        missing = [name for name in _ARRAYS if not npz.has(archive, name)]
        if missing:
            raise ValueError(
                f"it is not a task affinity: it has no {', '.join(missing)}; "
                "python -m experiments.task_affinity writes one"
            )
        measured = _array(archive, "num_timesteps", 1)
        if measured.shape != () or measured != num_timesteps:
            raise ValueError(
                f"it was measured with T = {_short(measured)}, the config has T = {num_timesteps}"
            )
        if log_snr is not None and npz.has(archive, "log_snr"):
            there = _array(archive, "log_snr", num_timesteps)
            if there.shape != log_snr.shape or not np.allclose(there, log_snr, atol=_TOLERANCE):
                raise ValueError(
                    "it was measured with another noise process, whose levels have another "
                    "log-SNR: measure one for this config"
                )
        affinity = _array(archive, "affinity", num_timesteps**2)
        timesteps = _array(archive, "timesteps", num_timesteps)
        return interpolate(affinity, timesteps, num_timesteps)


def _array(archive, name, most):
    """Reads an array of at most `most` numbers."""
    with npz.member(archive, name) as (file, header):
        if header.dtype.kind not in "fiu":
            raise ValueError(f"{name!r} must be numbers, not {header.dtype}")
        if math.prod(header.shape) > most:
            raise ValueError(
                f"{name!r} has shape {header.shape}, more than the {most} numbers that it may have"
            )
        return npz.content(file, header)


def affinity_by_gap(affinity: np.ndarray, positions: np.ndarray, bins: int = 20) -> GapProfile:
    """Mean and spread of the affinity of two tasks by the gap between them (O1 of Go et al. 2023).

    Args:
      affinity: (n, n) affinity; only pairs i < j are read.
      positions: (n,) positions of the tasks: their timesteps or log-SNR, not all equal.
      bins: Number of bins of equal width from 0 to the largest gap, at least 1.

    Returns:
      The profile, without empty bins, by ascending gap.

    Raises:
      ValueError: If an argument is not as described or not finite.
    """
    check_integer("bins", bins, 1)
    values, gaps = _pairs(affinity, positions)
    width = gaps.max() / bins
    if not width:
        raise ValueError("positions must not be all equal.")
    bin_of = np.minimum((gaps / width).astype(int), bins - 1)
    filled, bin_of, count = np.unique(bin_of, return_inverse=True, return_counts=True)
    mean = np.bincount(bin_of, values) / count
    std = np.sqrt(np.bincount(bin_of, (values - mean[bin_of]) ** 2) / count)
    return GapProfile((filled + 0.5) * width, mean, std, count)


def rank_correlation(affinity: np.ndarray, positions: np.ndarray) -> float:
    """Spearman's rank correlation of affinity and gap over all pairs of tasks (Spearman 1904).

    Args:
      affinity: (n, n) affinity; only pairs i < j are read.
      positions: (n,) positions of the tasks: their timesteps or log-SNR.

    Returns:
      The correlation in [-1, 1]; -1 if affinity always falls as the gap widens. Ties have their
      average rank.

    Raises:
      ValueError: If an argument is not as described or not finite, or if all pairs have the same
        affinity or the same gap, so that there is no correlation.
    """
    ranks = []
    for name, values in zip(("affinity", "gap"), _pairs(affinity, positions), strict=True):
        _, rank_of, count = np.unique(values, return_inverse=True, return_counts=True)
        if len(count) == 1:
            raise ValueError(f"the {name} of all pairs is the same: no correlation is defined.")
        rank = (np.cumsum(count) - (count - 1) / 2)[rank_of]
        ranks.append(rank - rank.mean())
    a, b = ranks
    return float(np.clip(a @ b / np.sqrt((a @ a) * (b @ b)), -1, 1))


def _pairs(affinity, positions):
    """Affinities and gaps of the pairs i < j, (n (n - 1) / 2,) float64 each."""
    affinity = _square(affinity)
    positions = np.asarray(positions, np.float64)
    if positions.shape != affinity.shape[:1] or not np.isfinite(positions).all():
        raise ValueError(f"positions must be {len(affinity)} finite numbers, not {positions!r}.")
    if len(positions) < 2:
        raise ValueError("at least two tasks are needed to make a pair.")
    i, j = np.triu_indices(len(affinity), k=1)
    return affinity[i, j], np.abs(positions[i] - positions[j])


def _check_grid(affinity, timesteps, num_timesteps):
    check_integer("num_timesteps", num_timesteps, 1)
    affinity, timesteps = _square(affinity), np.asarray(timesteps)
    n = len(affinity)
    if timesteps.shape != (n,) or timesteps.dtype.kind not in "iu":
        raise ValueError(
            f"timesteps must be {n} integers, one for each row of affinity, not "
            f"{_short(timesteps)}."
        )
    timesteps = timesteps.astype(np.int64)
    if timesteps[0] < 0 or timesteps[-1] >= num_timesteps or (np.diff(timesteps) <= 0).any():
        raise ValueError(
            f"timesteps must be strictly increasing in [0, {num_timesteps}), not "
            f"{_short(timesteps)}."
        )
    if n < 2 and num_timesteps > 1:
        raise ValueError("one timestep is too few to interpolate from.")
    return affinity, timesteps


def _short(array):
    """On one line."""
    text = np.array2string(array, threshold=6, separator=", ", max_line_width=sys.maxsize)
    return " ".join(text.split())


def _square(affinity):
    affinity = np.asarray(affinity, np.float64)
    if affinity.ndim != 2 or affinity.shape[0] != affinity.shape[1] or affinity.size == 0:
        raise ValueError(f"affinity must have shape (n, n) with n >= 1, not {affinity.shape}.")
    if not np.isfinite(affinity).all():
        raise ValueError("affinity must be finite.")
    return affinity
