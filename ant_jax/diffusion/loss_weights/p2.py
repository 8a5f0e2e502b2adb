"""P2 weights: less weight for low noise levels."""

import dataclasses
from typing import Annotated

import jax
import numpy as np

from ant_jax.diffusion.loss_weights import LossWeight
from ant_jax.settings import Number


@dataclasses.dataclass(frozen=True)
class P2(LossWeight):
    r"""P2 weights :math:`1 / (k + \mathrm{SNR})^\gamma` (Choi et al. 2022).

    The paper states them relative to its baseline, the loss of the noise, and here they multiply
    this loss. They move weight from low noise levels to the others.

    Attributes:
      k: Positive; bounds the weights by :math:`k^{-\gamma}`.
      gamma: Strength of the down-weighting; 0 gives ones.

    Raises:
      ValueError: If ``k`` is not positive.
    """

    k: Annotated[float, Number(above=0)] = 1.0
    gamma: Annotated[float, Number(0)] = 1.0

    def __post_init__(self):
        if not self.k > 0:
            raise ValueError(f"k must be positive, got {self.k}")

    def __call__(self, log_snr: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
        """Weights of the shape of the log-SNR."""
        xp = log_snr.__array_namespace__()
        return xp.exp(-self.gamma * xp.logaddexp(np.log(self.k), log_snr))
