"""Weights of the epsilon loss by timestep, as functions of the log-SNR.

Each returns a (T,) float64 array for ``GaussianDiffusion(..., loss_weight=...)`` of a model that
predicts epsilon. The error of v is that of epsilon over the square root of ``alphas_bar``, so for
a model that predicts v the same loss has these weights times ``alphas_bar``. All of them work on
log-SNR rather than SNR, which overflows at the ends of a fine schedule.
"""

import numpy as np


def p2(log_snr: np.ndarray, k: float = 1.0, gamma: float = 1.0) -> np.ndarray:
    r"""P2 weights :math:`1 / (k + \mathrm{SNR}_t)^\gamma` (Choi et al. 2022).

    The paper states them relative to its baseline, the epsilon loss, which is what they multiply
    here. They move effort from the low-noise timesteps to the others.

    Args:
      log_snr: (T,) log signal-to-noise ratios, in nats.
      k: Positive; bounds the weights by :math:`k^{-\gamma}`.
      gamma: Strength of the down-weighting; 0 gives ones.

    Returns:
      (T,) float64 weights.

    Raises:
      ValueError: If ``k`` is not positive.
    """
    if not k > 0:
        raise ValueError(f"k must be positive, got {k}")
    return np.exp(-gamma * np.logaddexp(np.log(k), np.asarray(log_snr, np.float64)))


def min_snr(log_snr: np.ndarray, gamma: float = 5.0) -> np.ndarray:
    r"""Min-SNR weights :math:`\min(\mathrm{SNR}_t, \gamma) / \mathrm{SNR}_t` (Hang et al. 2023).

    This is the form for epsilon prediction; the paper's :math:`\min(\mathrm{SNR}_t, \gamma)` is for
    that of x_0. Times :math:`\bar\alpha_t` it is that for v,
    :math:`\min(\mathrm{SNR}_t, \gamma) / (\mathrm{SNR}_t + 1)`.

    Args:
      log_snr: (T,) log signal-to-noise ratios, in nats.
      gamma: Positive SNR above which the weight falls below 1.

    Returns:
      (T,) float64 weights in (0, 1].

    Raises:
      ValueError: If ``gamma`` is not positive.
    """
    if not gamma > 0:
        raise ValueError(f"gamma must be positive, got {gamma}")
    return np.exp(np.minimum(0, np.log(gamma) - np.asarray(log_snr, np.float64)))
