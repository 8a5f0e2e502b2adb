"""What the steps between two reports have measured."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from ant_jax.runtime import processes
from ant_jax.runtime.logs import MeanMetrics
from ant_jax.runtime.loss_guard import LossGuard

# What `Measurements.state` gives where nothing has been measured.
NOTHING = {"interval": {}, "skipped": 0, "replaced": 0}


class Measurements:
    """What the steps since the last report have measured.

    A checkpoint keeps its `state`, so that a report does not depend on where a run was interrupted.
    """

    def __init__(self, kept: Mapping[str, Any], guard: LossGuard, skips: bool, replaces: bool):
        """Goes on from what was kept.

        Args:
          kept: a `state`.
          guard: sees the metrics of every step.
          skips: whether steps that are not finite are skipped and counted.
          replaces: whether images that can't be read are replaced and counted.
        """
        self._guard, self._skips, self._replaces = guard, skips, replaces
        self._interval = MeanMetrics(kept["interval"])
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self._skipped = kept["skipped"]
        # Each process counts in its own part of the batches.
        self._replaced = kept["replaced"] if processes.is_first() else 0

    def add(self, step: int, on_device: dict[str, jax.Array], replaced: int = 0) -> None:
        """Takes a step's metrics, and fetches those of the one before, while this one runs.

        Args:
          step: its number.
          on_device: metrics of `train_step`.
          replaced: number of images that were replaced in this process's part of the batch.

        Raises:
          FloatingPointError: if those of the one before are not finite; see `LossGuard`.
        """
        self._replaced += replaced
        self._fetch()
        self._pending = step, on_device

    def state(self) -> dict[str, Any]:
        """All that was measured, as JSON can hold it; raises what `add` does."""
        self._fetch()
        return {
            "interval": self._interval.state(),
            "skipped": self._skipped,
            "replaced": self._replaced_anywhere(),
        }

    def report(self) -> dict[str, Any]:
        """What a line of ``metrics.jsonl`` says; starts anew; raises what `add` does."""
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
            # No part of a mean.
            values = jax.tree.map(lambda value: np.full_like(value, np.nan), values)
        self._interval.add(values)
