"""Weights of the training loss by noise level: one file each.

A loss weight is a function of the log-SNR: what it returns multiplies the squared error of the
predicted *noise*. So it means the same for every process, whatever its network predicts. A process
multiplies it by the ratio of the squared error of the noise to that of its own prediction. For v
this ratio is alphas_bar, the signal fraction.

Log-SNR, rather than SNR, because SNR overflows at the ends of a fine schedule.
"""

import abc

import jax
import numpy as np


class LossWeight(abc.ABC):
    """A loss weight: a frozen dataclass whose fields are its settings.

    Processes are cached by their settings. So loss weights with equal settings must be equal and
    hashable, as frozen dataclasses are.
    """

    @abc.abstractmethod
    def __call__(self, log_snr: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
        """Factors of the squared error of the noise.

        Args:
          log_snr: of any shape, in nats: NumPy in float64 for processes of discrete levels, JAX in
            float32 for continuous ones. ``log_snr.__array_namespace__()`` is numpy or jax.numpy.

        Returns:
          Factors of the same shape, not negative.
        """
