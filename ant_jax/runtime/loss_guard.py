"""A loss or a gradient that is not finite ends training, at once or where it does not pass."""

from collections.abc import Callable, Mapping

import numpy as np
from absl import logging

# So many steps in a row that are not finite come from the parameters, not from the data.
_PATIENCE = 9


class LossGuard:
    """Looks at the loss and the gradient norm of every step, in order."""

    def __init__(self, skips: bool, advice: Callable[[], str]):
        """Begins with no step that was not finite.

        Args:
          skips: whether the train step leaves out an update that is not finite, so that training
            goes on after it; see `train_step`.
          advice: gives the end of the message, which says what can be done.
        """
        self._patience = _PATIENCE if skips else 0
        self._advice = advice
        self._in_a_row = 0

    def passes(self, step: int, metrics: Mapping[str, np.ndarray]) -> bool:
        """Whether the loss and the gradient norm of a step are finite; says so where they are not.

        Args:
          step: its number.
          metrics: of `train_step`, on the host.

        Raises:
          FloatingPointError: if they are not finite, and steps are not skipped, or nine before
            it were skipped.
        """
        if np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"]):
            self._in_a_row = 0
            return True
        self._in_a_row += 1
        losses = ", ".join(f"{loss:.4g}" for loss in metrics["cluster_losses"])
        figures = (
            f"step {step}: loss {metrics['loss']:.4g}, gradient norm {metrics['grad_norm']:.4g}; "
            f"cluster losses [{losses}]"
        )
        if self._in_a_row > self._patience:
            raise FloatingPointError(f"{figures}; {self._advice()}")
        logging.warning("%s; the update is skipped", figures)
        return False
