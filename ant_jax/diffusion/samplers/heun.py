"""Heun's method for the probability-flow ODE, with new noise or without."""

import functools
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ant_jax.diffusion.process import Process, Steps
from ant_jax.diffusion.samplers.sampler import NO_END, Level, Sampler
from ant_jax.settings import Number


class _Coefficients(NamedTuple):
    scale: np.ndarray  # factor of x as it is raised to the level `at`
    fresh: np.ndarray  # standard deviation of the noise that raises it
    at: Level  # where the network is called first
    below: Level  # where the step ends
    end: np.ndarray  # whether the step ends without noise


def heun(
    churn: Annotated[float, Number(0)] = 0.0,
    churn_low: Annotated[float, Number(0)] = 0.0,
    churn_high: Annotated[float, Number(above=0)] = NO_END,
    churn_scale: Annotated[float, Number(above=0)] = 1.0,
) -> Sampler:
    r"""Samples by Heun's second-order method (Karras et al. 2022, algorithms 1 and 2).

    Data and noise change along the ODE as :math:`dx = x_0\, da + \epsilon\, ds`, with the factors a
    and s of the process. A step takes the mean of the predicted :math:`x_0` and :math:`\epsilon` at
    both of its ends: the trapezoidal rule, in t for flow matching and in sigma for EDM. The last
    step, which ends without noise, is Euler's. So S steps call the network 2 S - 1 times.

    With churn, a step first adds noise, which raises the ratio of noise to signal by the factor
    :math:`1 + \min(churn / S, \sqrt 2 - 1)`. Discrete processes take the nearest timestep. The
    paper has churn 40 from 0.05 to 50 with scale 1.003 for ImageNet.

    Args:
      churn: amount of new noise, S_churn; 0 is deterministic given the first noise.
      churn_low: the least ratio of noise to signal at which noise is added, S_min.
      churn_high: the greatest ratio at which noise is added, S_max.
      churn_scale: factor of the new noise's standard deviation, S_noise.

    Raises:
      ValueError: if ``churn_low`` is not below ``churn_high``.
    """
    if not churn_low < churn_high:
        raise ValueError(f"churn_low = {churn_low} must be below churn_high = {churn_high}")
    return Sampler(
        functools.partial(_coefficients, churn, churn_low, churn_high, churn_scale),
        _step,
        calls=lambda num_steps: 2 * num_steps - 1,
    )


def _coefficients(
    churn: float, low: float, high: float, scale: float, process: Process, steps: Steps
) -> _Coefficients:
    signal, noise = np.sqrt(steps.signal), np.sqrt(steps.noise)
    with np.errstate(divide="ignore"):
        ratio = noise[1:] / signal[1:]
    raised = (low <= ratio) & (ratio <= high) & np.isfinite(ratio) & (churn > 0)
    factor = 1 + min(churn / len(steps.t), np.sqrt(2) - 1)
    t = np.array(steps.t)
    t[raised] = np.maximum(process.at_log_snr(-2 * np.log(factor * ratio[raised])), t[raised])
    at_signal, at_noise = signal[1:].copy(), noise[1:].copy()
    at_signal[raised], at_noise[raised] = process.factors(t[raised])
    keep = np.where(raised, at_signal / np.where(raised, signal[1:], 1), 1)
    fresh = at_noise**2 - (keep * noise[1:]) ** 2
    # The network is not called where a step ends without noise.
    below = np.append(steps.t[:1], steps.t[:-1])
    return _Coefficients(
        keep,
        scale * np.sqrt(np.where(raised, np.maximum(fresh, 0), 0)),
        Level(t, at_signal, at_noise),
        Level(below, signal[:-1], noise[:-1]),
        np.append(steps.noise[0] == 0, np.zeros(len(t) - 1, bool)),
    )


def _step(predict: Any, x: jax.Array, level: Level, own: _Coefficients, noise: jax.Array) -> Any:
    del level
    x = x * own.scale + noise * own.fresh
    first = predict(x, own.at)
    euler = own.below.signal * first.x0 + own.below.noise * first.noise

    def trapezoid():
        second = predict(euler, own.below)
        x0, noise = (first.x0 + second.x0) / 2, (first.noise + second.noise) / 2
        signal_change = own.below.signal - own.at.signal
        return x + signal_change * x0 + (own.below.noise - own.at.noise) * noise

    return jax.lax.cond(own.end > 0, lambda: jnp.asarray(euler), trapezoid)
