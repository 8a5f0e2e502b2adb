"""What training does between its steps, beside what `ant_jax.runtime` measures: saves and draws."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from absl import logging

from ant_jax import sampling
from ant_jax.runtime import devices, processes, signals
from ant_jax.runtime.checkpoint import Checkpointer
from ant_jax.runtime.logs import MetricWriter
from ant_jax.runtime.progress import Progress
from ant_jax.train_step import TrainState


class Reports:
    """Writes what was measured: a line on the console, one of ``metrics.jsonl``, TensorBoard."""

    def __init__(self, writer: MetricWriter, speedometer: Progress):
        self._writer, self._speedometer = writer, speedometer

    def write(self, step: int, report: dict[str, Any]) -> None:
        """Writes a report of the steps up to one; see `Measurements.report`."""
        speed = self._speedometer.line(step, report["loss"])
        self._writer.scalars(step, {**report, "steps_per_second": speed})

    def restart_clock(self, step: int) -> None:
        """Leaves the time since the last report out of the speed, as far as it was no step's."""
        self._speedometer.restart(step)


class Saves:
    """Saves states that training can go on from.

    Attributes:
      last: the last step that is saved; None before the first one.
    """

    def __init__(
        self,
        checkpointer: Checkpointer,
        record: dict[str, Any],
        measured: Callable[[], dict[str, Any]],
        last: int | None,
    ):
        """Saves nothing yet.

        Args:
          checkpointer: writes the checkpoints.
          record: what every checkpoint says of the run.
          measured: gives what a checkpoint is to hold as "metrics".
          last: the step that the run goes on from; None for a new run.
        """
        self._checkpointer, self._record, self._measured = checkpointer, record, measured
        self.last = last

    def save(self, step: int, state: TrainState) -> None:
        """Starts saving the state after a step, unless it is saved.

        Raises:
          FloatingPointError: if its parameters are not finite.
          DisagreementError: if it differs between processes or devices.
          CheckpointError: if it can't be saved, or the one before could not be.
        """
        if step == self.last:
            return
        metrics = self._measured()
        if not np.isfinite(jax.jit(optax.tree.norm)((state.params, state.ema_params))):
            raise FloatingPointError(f"step {step}: parameters are not finite; {self.advice()}")
        check_replicas(step, state)
        self._checkpointer.save(step, state, self._record | {"metrics": metrics})
        self.last = step

    def check(self) -> None:
        """Raises the CheckpointError of a save that has failed since, if any."""
        self._checkpointer.check()

    def advice(self) -> str:
        """What can be done where training has become unstable."""
        last = "none yet"
        if self.last is not None:
            last = f"step {self.last} in {self._checkpointer.directory}"
        return (
            f"last good checkpoint: {last}. A lower config.optimizer.learning_rate or "
            "config.optimizer.clip_norm may help, or config.optimizer.nonfinite = 'skip' if it is "
            "rare."
        )


def check_replicas(step: int, state: TrainState) -> None:
    """Raises a DisagreementError if a state differs between processes or devices."""
    processes.assert_equal(lambda: {f"the state after step {step}": devices.checksums(state)})


class Pictures:
    """Draws grids of samples, ``samples/STEP.png``."""

    def __init__(
        self,
        workdir: Path,
        is_due: Callable[[int], bool],
        draw: Callable[[Any], Iterator[tuple[np.ndarray, np.ndarray | None]]],
        writer: MetricWriter,
        guard: Callable[[], None],
    ):
        """Draws nothing yet.

        Args:
          workdir: of the run.
          is_due: whether a grid is drawn after a step.
          draw: from parameters to the images and labels of a grid, in batches.
          writer: gets each grid, for TensorBoard.
          guard: raises an error where the workdir has become another's.
        """
        self._folder, self._draw = workdir / "samples", draw
        self.is_due, self._writer, self._guard = is_due, writer, guard

    def is_missing(self, step: int) -> bool:
        """Whether a kill came between the checkpoint of a step and its grid."""
        return step > 0 and self.is_due(step) and not self._path(step).exists()

    def draw(self, step: int, params: Any) -> None:
        """Draws the grid of a step in process 0, for which the others wait."""
        self._guard()
        if processes.is_first():
            self._write(step, params)
        # In a collective on CPUs the others would not wait longer than half a minute.
        processes.barrier()

    def _write(self, step, params):
        try:
            grid = sampling.image_grid(np.concatenate([images for images, _ in self._draw(params)]))
        except FloatingPointError as error:
            # The parameters are finite, so training may well go on to better ones.
            logging.warning("no picture of step %d: %s", step, error)
            return
        path = self._path(step)
        sampling.save_png(path, grid)
        self._writer.image(step, "samples", grid)
        logging.info("samples of step %d: %s", step, path)

    def _path(self, step):
        return self._folder / f"{step:08d}.png"


def stops_here(stop: signals.Stop, waits: bool) -> bool:
    """Whether to stop after this step because a signal has come.

    All processes must stop at the same step, so many ask each other, and only where training waits
    for the devices anyway.

    Args:
      stop: what this process was asked for.
      waits: whether training waits for the devices at this step.
    """
    asked = stop.signum is not None
    if jax.process_count() == 1:
        return asked
    return waits and any(processes.all_gather(asked))
