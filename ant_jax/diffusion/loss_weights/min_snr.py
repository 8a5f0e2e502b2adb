"""Min-SNR weights: those of the loss of x_0, bounded at low noise levels."""

import dataclasses
from typing import Annotated

import jax
import numpy as np

from ant_jax.diffusion.loss_weights import LossWeight
from ant_jax.settings import Number


@dataclasses.dataclass(frozen=True)
class MinSNR(LossWeight):
    r"""Min-SNR weights :math:`\min(\mathrm{SNR}, \gamma) / \mathrm{SNR}` (Hang et al. 2023).

    This is the form for the error of the noise. The form for the error of x_0 is
    :math:`\min(\mathrm{SNR}, \gamma)`, and the form for the error of v is
    :math:`\min(\mathrm{SNR}, \gamma) / (\mathrm{SNR} + 1)`.

    Attributes:
      gamma: Positive SNR above which the weight falls below 1.

    Raises:
      ValueError: If ``gamma`` is not positive.
    """

    gamma: Annotated[float, Number(above=0)] = 5.0

    def __post_init__(self):
        if not self.gamma > 0:
            raise ValueError(f"gamma must be positive, got {self.gamma}")

    def __call__(self, log_snr: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
        """Weights in (0, 1], of the shape of the log-SNR."""
        xp = log_snr.__array_namespace__()
        return xp.exp(xp.minimum(0, np.log(self.gamma) - log_snr))
