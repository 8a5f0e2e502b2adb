"""Where a run's numbers go: the console, `metrics.jsonl` and TensorBoard."""

import importlib.util
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from logging import WARNING
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from absl import logging

from ant_jax import processes
from ant_jax.files import naming, write_bytes

Batch = TypeVar("Batch", bound=tuple)

_REPORT_SECONDS = 10.0  # between lines on how far something is


class Interval:
    """Means of the steps' metrics since the last report.

    A cluster's losses are weighted by its counts, and a cosine that is not there does not count.
    """

    def __init__(self):
        self._steps: list[dict[str, np.ndarray]] = []

    def add(self, metrics: dict[str, np.ndarray]) -> None:
        """Adds one step's metrics, on the host."""
        self._steps.append(metrics)

    def report(self) -> dict[str, Any]:
        """The means as floats and lists, None where nothing was seen; starts anew."""
        steps, self._steps = self._steps, []
        values = {
            name: np.stack([np.asarray(step[name], np.float64) for step in steps])
            for name in steps[0]
        }
        # An empty cluster's loss is 0 by convention, not by measurement.
        values["cluster_losses"][values["counts"] == 0] = np.nan
        weights = {"cluster_losses": values["counts"]}
        return {
            name: _mean(value, weights.get(name, np.ones_like(value)))
            for name, value in values.items()
        }


def _mean(values, weights):
    """Weighted mean over the first axis of what is not NaN, as a float, a list or None."""
    seen = np.where(np.isnan(values), 0, weights)
    with np.errstate(invalid="ignore"):
        means = np.nansum(values * seen, 0) / seen.sum(0)
    return np.where(np.isnan(means), None, means.astype(object)).tolist()


class Writer:
    """Appends to ``metrics.jsonl`` and, where TensorFlow is installed, to TensorBoard.

    TensorBoard lives in a thread of its own: importing it takes seconds, and nothing waits for it.
    It is opened for the first numbers, when the step has been compiled.
    """

    def __init__(self, workdir: Path, start_step: int, tensorboard: bool):
        """Opens the files; lines of a killed run beyond ``start_step`` are dropped."""
        self._executor = self._board = None
        if not processes.is_first():
            self._file = None
            return
        path = workdir / "metrics.jsonl"
        if path.exists():
            kept = itertools.takewhile(
                lambda line: _step_of(line) <= start_step, path.read_bytes().splitlines(True)
            )
            write_bytes(path, b"".join(kept))
        self._path = path
        self._file = path.open("a")
        if tensorboard and importlib.util.find_spec("tensorflow") is None:
            logging.info("TensorFlow is not installed: metrics go to %s alone", path)
        elif tensorboard:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="tensorboard")

    def scalars(self, step: int, values: dict[str, Any]) -> None:
        """Writes numbers and lists of numbers of a step."""
        if self._file is None:
            return
        with naming(self._path):
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        flat = {}
        for name, value in values.items():
            for i, leaf in enumerate(value) if isinstance(value, list) else [(None, value)]:
                if leaf is not None:
                    flat[name if i is None else f"{name}/{i}"] = leaf
        self._submit(lambda board: board.write_scalars(step, flat))

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Writes one uint8 (H, W, 3) image to TensorBoard."""
        self._submit(lambda board: board.write_images(step, {name: image[None]}))

    def close(self) -> None:
        """Writes what is outstanding."""
        if self._board is not None:
            self._submit(lambda board: board.close())
        if self._executor is not None:
            self._executor.shutdown()
        if self._file is not None:
            with naming(self._path):
                self._file.close()

    def _submit(self, write: Callable[[Any], None]):
        if self._executor is None:
            return
        if self._board is None:
            self._board = self._executor.submit(_open_board, str(self._path.parent))
        self._executor.submit(self._write, write)

    def _write(self, write):
        try:
            write(self._board.result())
        except Exception as error:
            logging.log_first_n(logging.WARNING, "TensorBoard is off: %s", 1, error)


def _step_of(line: bytes) -> float:
    """The step of a line; infinity if the line was not written to its end."""
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else math.inf
    except ValueError:
        return math.inf


def _open_board(workdir: str):
    from clu.metric_writers import SummaryWriter

    return SummaryWriter(workdir)


class Progress:
    """Console lines: step, loss, speed and the time left."""

    def __init__(self, start_step: int, num_steps: int, batch_size: int):
        self._num_steps, self._batch_size = num_steps, batch_size
        self._mark = start_step, time.perf_counter()

    def restart(self, step: int) -> None:
        """Leaves the time since the last line, not spent on steps, out of the speed."""
        self._mark = step, time.perf_counter()

    def line(self, step: int, loss: float) -> float:
        """Logs the line of a step; returns the steps a second since the last one."""
        last_step, last_time = self._mark
        self.restart(step)
        speed = (step - last_step) / (self._mark[1] - last_time)
        logging.info(
            "step %*d/%d  loss %.4f  %.1f steps/s  %.0f examples/s  ETA %s",
            len(str(self._num_steps)),
            step,
            self._num_steps,
            loss,
            speed,
            speed * self._batch_size,
            duration((self._num_steps - step) / speed),
        )
        return speed


def with_time_left(batches: Iterable[Batch], total: int, what: str) -> Iterator[Batch]:
    """Passes batches on and logs, every 10 s, how far it is and the time left.

    Args:
      batches: tuples of arrays whose first axis is that of the examples.
      total: number of examples in the end.
      what: is counted, for the log.
    """
    done, begin = 0, None
    for batch in batches:
        done += len(batch[0])
        now = time.perf_counter()
        if begin is None:
            # The first one compiled what the others use.
            begin = mark = now
            first = done
        elif now - mark >= _REPORT_SECONDS:
            mark = now
            left = (now - begin) * (total - done) / (done - first)
            logging.info("%d/%d %s  ETA %s", done, total, what, duration(left))
        yield batch


def quiet_console() -> None:
    """Plain lines of our own on the console; of the libraries', warnings and errors only."""
    handler = logging.get_absl_handler()
    handler.setFormatter(None)
    root = Path(__file__).parent.parent
    folders = (str(root / "ant_jax"), str(root / "experiments"))

    def worth_reading(record):
        # A save that fails says so in our error, and in orbax's threads once for every array.
        twice = "/orbax/" in record.pathname or record.name == "asyncio"
        return (record.levelno >= WARNING and not twice) or record.pathname.startswith(folders)

    handler.addFilter(worth_reading)
    # So do arrays that were still to be written.
    sys.unraisablehook = lambda failure: (
        str(failure.exc_value) == "Event loop is closed" or sys.__unraisablehook__(failure)
    )


def duration(seconds: float) -> str:
    """Seconds as 5s, 2m05s or 3h07m."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
