"""What training does between its steps: it reports, saves, draws samples and evaluates."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
import optax
from absl import logging

from ant_jax import sampling
from ant_jax.runtime import devices, processes, signals
from ant_jax.runtime.checkpoint import Checkpointer, read_record
from ant_jax.runtime.logs import MetricWriter
from ant_jax.runtime.progress import Progress
from ant_jax.train_step import TrainState

# Figures that do not depend on the run begin with these.
_OF_THE_REFERENCE = ("real_", "classifier_")


class Reports:
    """Writes the metrics of the last steps to the console and to the `MetricWriter`.

    Attributes:
      waiting: the line of the last step, which `write` has not written yet. Checkpoints hold it: a
        line that waits for an evaluation is not lost if the run is killed meanwhile.
    """

    def __init__(
        self,
        writer: MetricWriter,
        speedometer: Progress,
        callback: Callable[[int, dict[str, Any]], None] | None = None,
        waiting: dict[str, Any] | None = None,
    ):
        """Reports nothing yet.

        Args:
          writer: writes ``metrics.jsonl``.
          speedometer: writes to the console.
          callback: see `train.train`.
          waiting: the line that waits in the checkpoint.
        """
        self._writer, self._speedometer, self._callback = writer, speedometer, callback
        self.waiting = waiting

    def measured(self, step: int, report: dict[str, Any]) -> None:
        """Writes a step to the console; its line waits for `write`. See `Measurements.report`."""
        speed = self._speedometer.line(step, report["loss"])
        self.waiting = {"step": step, **report, "steps_per_second": speed}

    def write(self, figures: Mapping[str, Any] = MappingProxyType({})) -> None:
        """Writes the line that waits, and figures of an evaluation with it."""
        assert self.waiting is not None  # `measured` comes first
        line, self.waiting = self.waiting, None
        step = line.pop("step")
        # No figure of a metric of one's own may replace the loss.
        line = {**figures, **line}
        self._writer.scalars(step, line)
        if self._callback is not None and processes.is_first():
            self._callback(step, line)

    def restart_clock(self, step: int) -> None:
        """Restarts the clock, so that the speed leaves out time that was not spent on steps."""
        self._speedometer.restart(step)


class Saves:
    """Saves the training state, after checking it.

    Attributes:
      last: the last step that was saved; None before the first one.
    """

    def __init__(
        self,
        checkpointer: Checkpointer,
        record: dict[str, Any],
        measured: Callable[[], dict[str, Any]],
        last: int | None,
        whole: Callable[[TrainState], TrainState],
    ):
        """Saves nothing yet.

        Args:
          checkpointer: writes the checkpoints.
          record: describes the run in every checkpoint; see `save_record`.
          measured: returns the entry "metrics" of a checkpoint's record.
          last: the step that the run goes on from; None for a new run.
          whole: see `state_layout.Layout`.
        """
        self._checkpointer, self._record, self._measured = checkpointer, record, measured
        self._whole = whole
        self.last = last

    def save(self, step: int, state: TrainState) -> None:
        """Starts saving the state after a step, unless that step is saved already.

        Raises:
          FloatingPointError: if its parameters are not finite.
          DisagreementError: if it differs between processes or devices.
          CheckpointError: if it can't be saved, or if the last save failed.
        """
        if step == self.last:
            return
        metrics = self._measured()
        state = self.whole(state)
        if not np.isfinite(jax.jit(optax.tree.norm)((state.params, state.ema_params))):
            raise FloatingPointError(f"step {step}: parameters are not finite; {self.advice()}")
        check_replicas(step, state)
        self._checkpointer.save(step, state, self._record | {"metrics": metrics})
        self.last = step

    def whole(self, state: TrainState) -> TrainState:
        """The state as a checkpoint has it, after waiting for the last save.

        Raises:
          CheckpointError: if the last save failed.
        """
        # On CPUs a save holds its whole state until it ends. Two may not fit in memory.
        self._checkpointer.wait()
        return self._whole(state)

    def check(self) -> None:
        """Raises the CheckpointError of the save in the background, if it has failed."""
        self._checkpointer.check()

    def advice(self) -> str:
        """Tells the user what to do if training has become unstable."""
        last = "none yet"
        if self.last is not None:
            last = f"step {self.last} in {self._checkpointer.directory}"
        return (
            f"last good checkpoint: {last}. A lower config.optimizer.learning_rate or "
            "config.optimizer.clip_norm may help, or config.optimizer.nonfinite = 'skip' if this "
            "is rare."
        )


def check_replicas(step: int, state: TrainState) -> None:
    """Raises a DisagreementError if a state differs between processes or devices."""
    # Compiling the checksums takes a second, which one device alone need not spend.
    if not devices.alone(jax.local_devices()):
        name = f"the state after step {step}"
        processes.assert_replicas_equal(name, devices.checksums(state))


class Pictures:
    """Draws grids of samples and writes them to ``samples/STEP.png``."""

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
          is_due: returns whether a grid is drawn after a step.
          draw: returns the images and labels of a grid, in batches, from parameters.
          writer: writes each grid to the boards.
          guard: raises an error if this run no longer owns the workdir.
        """
        self._folder, self._draw = workdir / "samples", draw
        self.is_due, self._writer, self._guard = is_due, writer, guard
        self._compiled = False

    def is_missing(self, step: int) -> bool:
        """Whether the grid of a step is missing: the run was killed after saving the checkpoint."""
        if step == 0 or not self.is_due(step):
            return False
        # Process 0 looks for all, because another may see the disk a little later.
        return processes.broadcast_from_first(lambda: not self._path(step).exists())

    def draw(self, step: int, params: Any) -> None:
        """Draws the grid of a step in process 0; the other processes wait."""
        self._guard()
        if processes.is_first():
            self._write(step, params)
        # On CPUs a collective would time out after half a minute.
        processes.barrier()

    def _write(self, step, params):
        if not self._compiled:
            logging.info("compiling the sampler for pictures ...")
            self._compiled = True
        try:
            grid = sampling.image_grid(np.concatenate([images for images, _ in self._draw(params)]))
        except FloatingPointError as error:
            # Not an error: the parameters are finite, and training may improve them.
            logging.warning("no picture of step %d: %s", step, error)
            return
        path = self._path(step)
        sampling.save_png(path, grid)
        self._writer.image(step, "samples", grid)
        logging.info("samples of step %d: %s", step, path)

    def _path(self, step):
        return self._folder / f"{step:08d}.png"


class Evaluations:
    """Evaluates the moving average during training, and keeps the best one.

    ``best/`` has one checkpoint, of the moving average alone. It is written like the others: there
    is the former best until the new one is complete.
    """

    def __init__(
        self,
        workdir: Path,
        is_due: Callable[[int], bool],
        measure: Callable[[int, Any], Any],
        record: dict[str, Any],
        guard: Callable[[], None],
    ):
        """Evaluates nothing yet.

        Args:
          workdir: of the run.
          is_due: returns whether a step is evaluated.
          measure: see `evaluation_in_training.prepare`.
          record: describes the run in the checkpoint; see `save_record`.
          guard: see `Checkpointer`.
        """
        self.is_due, self._measure, self._record = is_due, measure, record
        self._directory, self._guard = workdir / "best", guard
        self._best = None

    def run(
        self, step: int, average: Callable[[], Any], saved: Callable[[], Any]
    ) -> dict[str, Any] | None:
        """Evaluates a step, and keeps its moving average if it is the best one so far.

        Args:
          step: its number.
          average: returns the moving average for drawing samples.
          saved: returns the moving average as a checkpoint has it.

        Returns:
          The figures, numbers and lists of numbers, for the line of the step; None after a signal
          that asks to stop.
        """
        result = self._measure(step, average())
        if result is None:
            return None
        shown = {
            # JSON has no number that is not finite.
            name: None if isinstance(value, float) and not np.isfinite(value) else value
            for name, value in result.figures.items()
            if isinstance(value, float | list) and not name.startswith(_OF_THE_REFERENCE)
        }
        if result.best_by is not None and self._is_better(step, result):
            self._keep(step, saved(), result)
        if shown:
            numbers = {name: value for name, value in shown.items() if isinstance(value, float)}
            words = [f"{name} {value:.4f}" for name, value in numbers.items()]
            words += ["(the best so far)"] * (self._best is not None and self._best["step"] == step)
            logging.info("evaluation of step %d: %s", step, "  ".join(words))
        return shown

    def _is_better(self, step, result):
        """Whether a step is better than the best one.

        Only a later step can be: a resumed run repeats steps, which were compared before.
        """
        if self._best is None:
            read = lambda: read_record(self._directory, run=self._record["id"])
            self._best = (processes.broadcast_from_first(read) or {}).get("best", {"step": 0})
        (name, sign), before = result.best_by, self._best
        value = result.figures[name]
        if step <= before["step"] or not np.isfinite(value):
            return False
        # Values of other settings can't be compared.
        others = before.get("figure") != name or before["made_from"] != result.made_from
        return others or sign * value > sign * before["value"]

    def _keep(self, step, params, result):
        name, _ = result.best_by
        best = {
            "step": step,
            "figure": name,
            "value": result.figures[name],
            "made_from": result.made_from,
        }
        checkpointer = Checkpointer(self._directory, keep=1, guard=self._guard)
        # Process 0 makes the folder.
        processes.wait_for_file(self._directory)
        try:
            checkpointer.save(step, {"ema_params": params}, self._record | {"best": best})
            checkpointer.wait()
        finally:
            checkpointer.close()
        self._best = best


def stops_here(stop: signals.Stop, waits: bool) -> bool:
    """Whether to stop after this step because a signal has come.

    All processes must stop at the same step, so several processes ask each other. They do so only
    at steps where training waits for the devices anyway.

    Args:
      stop: the signals of this process.
      waits: whether training waits for the devices at this step.
    """
    asked = stop.signum is not None
    if jax.process_count() == 1:
        return asked
    return waits and any(processes.all_gather(asked))
