"""Collects the metrics of the steps between two reports."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from ant_jax.runtime import processes
from ant_jax.runtime.logs import MeanMetrics
from ant_jax.runtime.loss_guard import LossGuard

# The `Measurements.state` before the first step.
NOTHING = {"interval": {}, "skipped": 0, "replaced": 0}


class Measurements:
    """The metrics of the steps since the last report.

    Checkpoints hold its `state`, so that a report is the same if the run was interrupted.
    """

    def __init__(self, kept: Mapping[str, Any], guard: LossGuard, skips: bool, replaces: bool):
        """Goes on from a `state`.

        Args:
          kept: the `state`.
          guard: checks the metrics of every step.
          skips: whether steps that are not finite are skipped and counted.
          replaces: whether images that can't be read are replaced and counted.
        """
        self._guard, self._skips, self._replaces = guard, skips, replaces
        self._interval = MeanMetrics(kept["interval"])
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self._skipped = kept["skipped"]
        # Each process counts the images of its own part of the batches.
        self._replaced = kept["replaced"] if processes.is_first() else 0

    def add(self, step: int, on_device: dict[str, jax.Array], replaced: int = 0) -> None:
        """Adds the metrics of a step; while it runs, fetches those of the step before.

        Args:
          step: its number.
          on_device: metrics of `train_step`.
          replaced: number of images that were replaced in this process's part of the batch.

        Raises:
          FloatingPointError: if the metrics of the step before are not finite; see `LossGuard`.
        """
        self._replaced += replaced
        self._fetch()
        self._pending = step, on_device

    def state(self) -> dict[str, Any]:
        """The metrics so far, as values of JSON; raises the errors of `add`."""
        self._fetch()
        return {
            "interval": self._interval.state(),
            "skipped": self._skipped,
            "replaced": self._replaced_anywhere(),
        }

    def report(self) -> dict[str, Any]:
        """Returns a line of ``metrics.jsonl`` and resets; raises the errors of `add`."""
        self._fetch()
        report = self._interval.report()
        if self._replaces:
            report["replaced_images"] = self._replaced_anywhere()
            self._replaced = 0
        if self._skips:
            report["skipped_steps"] = self._skipped
            self._skipped = 0
        return report

    def _replaced_anywhere(self):
        return sum(processes.all_gather(self._replaced)) if self._replaces else 0

    def _fetch(self):
        if self._pending is None:
            return
        (step, on_device), self._pending = self._pending, None
        values = jax.device_get(on_device)
        if not self._guard.passes(step, values):
            self._skipped += 1
            # NaN is left out of the means.
            values = jax.tree.map(lambda value: np.full_like(value, np.nan), values)
        self._interval.add(values)
