"""Where a run's numbers go: the console, `metrics.jsonl` and TensorBoard."""

import bisect
import hashlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from logging import WARNING
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from ant_jax.runtime import processes
from ant_jax.runtime.files import naming, write_bytes


class MeanMetrics:
    """Means of the steps' metrics since the last report.

    A cluster's losses are weighted by its counts, and a cosine that is not there does not count.
    What it holds are sums, the same to the bit whether or not a run was interrupted between them.
    """

    def __init__(self, state: dict[str, list] | None = None):
        """Starts anew, or from a `state`."""
        # Of each metric the weighted sum and that of the weights.
        self._sums = {name: np.array(sums, np.float64) for name, sums in (state or {}).items()}

    def add(self, metrics: dict[str, np.ndarray]) -> None:
        """Adds one step's metrics, on the host."""
        for name, value in metrics.items():
            value = np.asarray(value, np.float64)
            weights = np.ones_like(value)
            if name == "cluster_losses":
                # An empty cluster's loss is 0 by convention, not by measurement.
                weights = np.asarray(metrics["counts"], np.float64)
            measured = ~np.isnan(value) & ~np.isnan(weights)
            weights = np.where(measured, weights, 0)
            sums = np.stack([np.where(measured, value, 0) * weights, weights])
            self._sums[name] = self._sums.get(name, 0) + sums

    def state(self) -> dict[str, list]:
        """What another `MeanMetrics` can go on from, as JSON can hold it."""
        return {name: sums.tolist() for name, sums in self._sums.items()}

    def report(self) -> dict[str, Any]:
        """The means as floats and lists, None where nothing was measured; starts anew."""
        sums, self._sums = self._sums, {}
        with np.errstate(invalid="ignore"):
            means = {name: total / weight for name, (total, weight) in sums.items()}
        return {
            name: np.where(np.isnan(mean), None, mean.astype(object)).tolist()
            for name, mean in means.items()
        }


class MetricWriter:
    """Appends to ``metrics.jsonl`` and, where TensorFlow is installed, to TensorBoard.

    TensorBoard lives in a thread of its own: importing it takes seconds, and nothing waits for it.
    It is opened for the first numbers, when the step has been compiled.
    """

    def __init__(
        self,
        workdir: Path,
        start_step: int,
        tensorboard: bool,
        written: dict[str, Any] | None = None,
    ):
        """Opens the files.

        Lines of a killed run beyond ``start_step`` are dropped, for they will be written again.
        Lines that can't be read, or are not in the order of their steps, go into
        ``metrics-damaged.jsonl``. So do the dropped lines where the lines up to ``start_step`` are
        not those that were written.

        Args:
          workdir: where the files are.
          start_step: the step to go on from.
          tensorboard: whether to write for it.
          written: what `written` gave at that step; what is missing or changed is said.
        """
        self._executor = self._board = self._file = self._path = None
        if not processes.is_first():
            return
        self._path = workdir / "metrics.jsonl"
        content = self._path.read_bytes() if self._path.exists() else b""
        kept, beyond, doubtful = _sorted_lines(content, start_step)
        self._lines, self._digest = len(kept), hashlib.sha256(b"".join(kept))
        if written not in (None, self.written()):
            logging.warning(
                "%s is not as it was written: %d lines up to step %d instead of %d%s",
                self._path,
                len(kept),
                start_step,
                written["lines"],
                "" if len(kept) != written["lines"] else ", of which some have changed",
            )
            # One of these may be one of those.
            doubtful += beyond
        elif beyond and not start_step:
            logging.warning(
                "%s: %d lines are dropped, for there is no checkpoint", self._path, len(beyond)
            )
        if doubtful:
            aside = self._path.with_name("metrics-damaged.jsonl")
            with naming(aside), aside.open("ab") as file:
                file.writelines(doubtful)
            logging.warning("%d lines of %s are now in %s", len(doubtful), self._path, aside)
        if beyond or doubtful:
            write_bytes(self._path, b"".join(kept))
        self._file = self._path.open("ab")
        if tensorboard and importlib.util.find_spec("tensorflow") is None:
            logging.info("TensorFlow is not installed: metrics go to %s alone", self._path)
        elif tensorboard:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="tensorboard")

    def written(self) -> dict[str, Any] | None:
        """The number and the digest of the lines so far, which are on the disk then.

        In processes other than the first it is None.
        """
        if self._path is None:
            return None
        if self._file is not None:
            with naming(self._path):
                os.fsync(self._file.fileno())
        return {"lines": self._lines, "sha256": self._digest.hexdigest()}

    def scalars(self, step: int, values: dict[str, Any]) -> None:
        """Writes numbers and lists of numbers of a step."""
        if self._file is None:
            return
        line = json.dumps({"step": step, **values}).encode() + b"\n"
        with naming(self._path):
            self._file.write(line)
            self._file.flush()
        self._lines += 1
        self._digest.update(line)
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


def _sorted_lines(content: bytes, start_step: int) -> tuple[list[bytes], list[bytes], list[bytes]]:
    """The lines up to a step, those beyond it, and those that can't be read or are out of order."""
    *lines, torn = (line + b"\n" for line in content.split(b"\n"))
    steps = [step_of(line) for line in lines]
    good = _ascending(steps)
    kept = [lines[i] for i in good if steps[i] <= start_step]
    beyond = [lines[i] for i in good if steps[i] > start_step]
    doubtful = [lines[i] for i in sorted(set(range(len(lines))) - set(good))]
    return kept, beyond, doubtful + [torn] * (torn != b"\n")


def step_of(line: bytes) -> int | None:
    """The step of a line; None if it can't be read."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    # Neither are as we write them, and readers would split such a line.
    return step if type(step) is int and line.isascii() and b"\r" not in line else None


def _ascending(steps: list[int | None]) -> list[int]:
    """Indices of as many steps as can be that ascend: one damaged number costs one line."""
    ends: list[int] = []
    before: dict[int, int | None] = {}
    for i, step in enumerate(steps):
        if step is not None:
            place = bisect.bisect_left(ends, step, key=steps.__getitem__)
            before[i] = ends[place - 1] if place else None
            ends[place : place + 1] = [i]
    chain, last = [], ends[-1] if ends else None
    while last is not None:
        chain.append(last)
        last = before[last]
    return chain[::-1]


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``; those that can't be read are said and left out."""
    kept, _, doubtful = _sorted_lines(path.read_bytes(), sys.maxsize)
    if doubtful:
        logging.warning("%d lines of %s can't be read", len(doubtful), path)
    return [json.loads(line) for line in kept]


def _open_board(workdir: str):
    from clu.metric_writers import SummaryWriter

    return SummaryWriter(workdir)


def quiet_console() -> None:
    """Plain lines of our own on the console; of the libraries', warnings and errors only."""
    handler = logging.get_absl_handler()
    handler.setFormatter(None)
    root = Path(__file__).parents[2]
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
