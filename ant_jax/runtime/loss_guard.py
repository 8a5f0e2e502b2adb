"""Ends training if losses or gradients are not finite."""

from collections.abc import Callable, Mapping

import numpy as np
from absl import logging

# More skipped steps in a row than this are the fault of the parameters, not of the data.
_PATIENCE = 9


class LossGuard:
    """Checks the loss and the gradient norm of every step, in order."""

    def __init__(self, skips: bool, advice: Callable[[], str]):
        """Starts with a count of 0.

        Args:
          skips: whether the train step skips an update that is not finite, so that training goes
            on; see `train_step`.
          advice: returns the end of the error message, which tells the user what to do.
        """
        self._patience = _PATIENCE if skips else 0
        self._advice = advice
        self._in_a_row = 0

    def passes(self, step: int, metrics: Mapping[str, np.ndarray]) -> bool:
        """Whether the loss and the gradient norm of a step are finite; logs a warning if not.

        Args:
          step: its number.
          metrics: of `train_step`, on the host.

        Raises:
          FloatingPointError: if they are not finite and either steps are not skipped or the nine
            steps before it were skipped too.
        """
        if np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"]):
            self._in_a_row = 0
            return True
        self._in_a_row += 1
        losses = ", ".join(f"{loss:.4g}" for loss in metrics["cluster_losses"])
        figures = (
            f"step {step}: loss {metrics['loss']:.4g}, gradient norm {metrics['grad_norm']:.4g}; "
            f"task losses [{losses}]"
        )
        if self._in_a_row > self._patience:
            raise FloatingPointError(f"{figures}; {self._advice()}")
        logging.warning("%s; the update is skipped", figures)
        return False
