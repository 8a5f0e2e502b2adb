"""DPM-Solver++, a multistep method of second order."""

from typing import Any, NamedTuple

import jax
import numpy as np

from ant_jax.diffusion.process import Process, Steps
from ant_jax.diffusion.samplers.sampler import Level, Sampler


class _Coefficients(NamedTuple):
    x: np.ndarray
    x0: np.ndarray
    change: np.ndarray  # of the data since the step before


def dpm_solver() -> Sampler:
    r"""Samples by DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2).

    It extrapolates the predicted data linearly in :math:`\lambda = \log(a / s)`, the logarithm of
    the ratio of signal to noise, from the step before. The first and the last step are of first
    order, as is any step from or to an infinite :math:`\lambda`. Deterministic given the first
    noise.
    """
    return Sampler(_coefficients, _step, multistep=True)


def _coefficients(process: Process, steps: Steps) -> _Coefficients:
    del process
    signal, noise = np.sqrt(steps.signal), np.sqrt(steps.noise)
    with np.errstate(divide="ignore"):
        step = np.diff(np.log(signal) - np.log(noise))  # - h of each step
    before = np.append(step[1:], -np.inf)
    # 1 / (2 r) with r = h of the step before / h.
    finite = np.isfinite(step) & np.isfinite(before)
    change = np.zeros(len(step))
    change[finite] = step[finite] / (2 * before[finite])
    ratio = noise[:-1] / noise[1:]
    return _Coefficients(ratio, signal[:-1] - signal[1:] * ratio, change)


def _step(predict: Any, pair: Any, level: Level, own: _Coefficients, noise: jax.Array) -> Any:
    del noise
    x, before = pair
    x0 = predict(x, level).x0
    ahead = x0 + own.change * (x0 - before)
    return own.x * x + own.x0 * ahead, x0
