"""Noise schedules: the signal fraction at each timestep, in float64 NumPy."""

import numpy as np

_MAX_BETA = 0.999


def _linear_betas(num_timesteps: int) -> np.ndarray:
    # The end points were chosen for T = 1000. The factor keeps the total noise for any other T.
    return np.linspace(1e-4, 0.02, num_timesteps) * (1000 / num_timesteps)


def _ldm_betas(num_timesteps: int) -> np.ndarray:
    # As above, the end points are for T = 1000.
    return np.linspace(0.0015**0.5, 0.0195**0.5, num_timesteps) ** 2 * (1000 / num_timesteps)


def _cosine_betas(num_timesteps: int) -> np.ndarray:
    offset = 0.008
    u = np.arange(num_timesteps + 1) / num_timesteps
    signal = np.cos((u + offset) / (1 + offset) * np.pi / 2) ** 2
    return 1 - signal[1:] / signal[:-1]


SCHEDULES = {"cosine": _cosine_betas, "linear": _linear_betas, "ldm": _ldm_betas}


def alphas_bar(name: str, num_timesteps: int) -> np.ndarray:
    r"""Signal fraction :math:`\bar\alpha_t = \prod_{s \le t} (1 - \beta_s)` of a named schedule.

    * ``"linear"``: :math:`\beta` evenly spaced from 1e-4 to 0.02, times 1000 / T (Ho et al. 2020,
      section 4).
    * ``"cosine"``: :math:`\bar\alpha_t \propto \cos^2\left(\frac{t/T + s}{1 + s}
      \frac{\pi}{2}\right)` with s = 0.008 (Nichol & Dhariwal 2021, eq. 17).
    * ``"ldm"``: :math:`\sqrt\beta` evenly spaced from :math:`\sqrt{0.0015}` to
      :math:`\sqrt{0.0195}`, and :math:`\beta` times 1000 / T (the configs of Rombach et al. 2022
      for FFHQ and CelebA-HQ).

    In all of them, :math:`\beta` is clipped at 0.999.

    Args:
      name: ``"linear"``, ``"cosine"`` or ``"ldm"``.
      num_timesteps: T, at least 1.

    Returns:
      (T,) float64 array, strictly decreasing, in (0, 1); index 0 has the least noise.

    Raises:
      ValueError: If the name is unknown or ``num_timesteps`` is below 1.
    """
    if name not in SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}: expected one of {sorted(SCHEDULES)}")
    if num_timesteps < 1:
        raise ValueError(f"num_timesteps must be at least 1, got {num_timesteps}")
    return np.cumprod(1 - np.minimum(SCHEDULES[name](num_timesteps), _MAX_BETA))


def log_snr(alphas_bar: np.ndarray) -> np.ndarray:
    r"""Log signal-to-noise ratio :math:`\log \bar\alpha_t - \log(1 - \bar\alpha_t)`, in nats.

    Args:
      alphas_bar: Array of any shape, in (0, 1).

    Returns:
      float64 array of the same shape.
    """
    alphas_bar = np.asarray(alphas_bar, np.float64)
    return np.log(alphas_bar) - np.log1p(-alphas_bar)
