"""Which noise levels a sampler uses."""

import re

import numpy as np

# The spacings of `noise_ratios`.
RATIO_SPACINGS = ("karras", "log_snr")


def spaced_timesteps(num_timesteps: int, num_steps: int, spacing: str = "even") -> np.ndarray:
    """Chooses timesteps from 0 .. T - 1 for sampling with fewer steps.

    * ``"even"``: both ends, with a fractional stride rounded to integers (Nichol & Dhariwal 2021,
      section 4); a single step is the last timestep.
    * ``"10,20,30"``: 10, 20 and 30 timesteps in three sections of equal length, the least noisy
      first. They include both ends of each section (the code of Nichol & Dhariwal 2021). The
      numbers add up to ``num_steps``. A section with a single step has its first timestep.
    * ``"ddim"``: 0, s, 2s, ... with the least integer stride s that gives ``num_steps`` of them
      (Song et al. 2021; "ddimN" in the code of Nichol & Dhariwal).
    * ``"ldm"``: 1, 1 + s, 1 + 2s, ... with s = T / ``num_steps`` (the code of Rombach et al. 2022).

    Args:
      num_timesteps: T.
      num_steps: Number of timesteps, in 1 .. T; above 1 for ``"ddim"``, below T for ``"ldm"``.
      spacing: One of the above.

    Returns:
      Integer array (num_steps,), strictly increasing.

    Raises:
      ValueError: If ``num_steps`` is out of range, or ``spacing`` is unknown or does not give that
        many timesteps.
    """
    if not 1 <= num_steps <= num_timesteps:
        raise ValueError(f"num_steps must be in 1 .. {num_timesteps}, got {num_steps}")
    if spacing == "even":
        if num_steps == 1:
            return np.array([num_timesteps - 1])  # where the noise is
        return _evenly(num_timesteps, num_steps)
    if spacing == "ddim":
        stride = -(-num_timesteps // num_steps)
        if stride == num_timesteps or len(range(0, num_timesteps, stride)) != num_steps:
            possible = [-(-num_timesteps // stride) for stride in range(1, num_timesteps)]
            raise ValueError(
                f"no integer stride gives num_steps = {num_steps} of {num_timesteps} timesteps "
                f"(spacing 'ddim'): the nearest are {_nearest(num_steps, possible)}"
            )
        return np.arange(0, num_timesteps, stride)
    if spacing == "ldm":
        stride = num_timesteps // num_steps
        if num_timesteps % num_steps or stride == 1:
            possible = [n for n in range(1, num_timesteps) if num_timesteps % n == 0]
            raise ValueError(
                f"num_steps = {num_steps} must be below {num_timesteps} timesteps and divide them "
                f"(spacing 'ldm'): the nearest are {_nearest(num_steps, possible)}"
            )
        return np.arange(1, num_timesteps, stride)
    if not re.fullmatch(r"\d+(,\d+)*", spacing):
        raise ValueError(
            "spacing must be 'even', 'karras', 'log_snr', 'ddim', 'ldm' or steps for each section "
            f"as '10,20,30', got {spacing!r}"
        )
    counts = [int(count) for count in spacing.split(",")]
    if sum(counts) != num_steps:
        raise ValueError(
            f"the sections of spacing {spacing!r} have {sum(counts)} steps, not num_steps = "
            f"{num_steps}"
        )
    size, longer = divmod(num_timesteps, len(counts))
    sections, start = [], 0
    for i, count in enumerate(counts):
        length = size + (i < longer)
        if count > length:
            raise ValueError(
                f"spacing {spacing!r} takes {count} steps from a section of {length} timesteps"
            )
        sections.append(start + _evenly(length, count))
        start += length
    return np.concatenate(sections)


def noise_ratios(num_steps: int, spacing: str, low: float, high: float) -> np.ndarray:
    """Ratios of noise to signal for a sampler.

    * ``"karras"``: evenly spaced in the 7th root (Karras et al. 2022, eq. 5, rho = 7).
    * ``"log_snr"``: evenly spaced in the logarithm.

    Args:
      num_steps: number of ratios. One alone is ``high``.
      spacing: one of the above.
      low: the least ratio.
      high: the greatest ratio.

    Returns:
      (num_steps,) float64, strictly increasing.

    Raises:
      ValueError: if ``spacing`` is unknown.
    """
    if spacing not in RATIO_SPACINGS:
        raise ValueError(f"spacing must be 'even', 'karras' or 'log_snr', got {spacing!r}")
    way = np.linspace(1, 0, num_steps)[::-1] if num_steps > 1 else np.ones(1)
    if spacing == "log_snr":
        return np.exp(np.log(low) + way * (np.log(high) - np.log(low)))
    return (low ** (1 / 7) + way * (high ** (1 / 7) - low ** (1 / 7))) ** 7


def _evenly(length: int, count: int) -> np.ndarray:
    """Chooses ``count`` of ``length`` numbers, both ends included; the first if ``count`` is 1."""
    # Summed one by one, not multiplied, to round as the code of Nichol & Dhariwal does.
    strides = np.full(count, (length - 1) / max(count - 1, 1))
    strides[:1] = 0
    return np.rint(np.cumsum(strides)).astype(int)


def _nearest(wanted: int, possible: list[int]) -> str:
    below = sorted({n for n in possible if n < wanted})[-1:]
    above = sorted({n for n in possible if n > wanted})[:1]
    return " and ".join(map(str, below + above)) or "none"
