"""Logs the metrics of a run: on the console, in ``metrics.jsonl`` and on boards."""

import bisect
import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from logging import WARNING
from logging import root as root_logger
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from absl import flags, logging

from ant_jax.runtime import processes
from ant_jax.runtime.boards import Board
from ant_jax.runtime.files import naming, write_bytes


class MeanMetrics:
    """Means of the metrics of all steps since the last report.

    The loss of a task is weighted by its number of examples, and NaN, such as a cosine that a
    step did not measure, is left out. It holds sums, which are equal bit for bit whether or not the
    run was interrupted.
    """

    def __init__(self, state: dict[str, list] | None = None):
        """Starts from a `state`; by default from nothing."""
        # For each metric the weighted sum and the sum of the weights.
        self._sums = {name: np.array(sums, np.float64) for name, sums in (state or {}).items()}

    def add(self, metrics: dict[str, np.ndarray]) -> None:
        """Adds the metrics of one step, arrays on the host."""
        for name, value in metrics.items():
            value = np.asarray(value, np.float64)
            weights = np.ones_like(value)
            if name == "cluster_losses":
                # The loss of a task without examples is 0 by convention, not by measurement.
                weights = np.asarray(metrics["counts"], np.float64)
            measured = ~np.isnan(value) & ~np.isnan(weights)
            weights = np.where(measured, weights, 0)
            sums = np.stack([np.where(measured, value, 0) * weights, weights])
            self._sums[name] = self._sums.get(name, 0) + sums

    def state(self) -> dict[str, list]:
        """The sums so far, as values of JSON, for another `MeanMetrics` to go on from."""
        return {name: sums.tolist() for name, sums in self._sums.items()}

    def report(self) -> dict[str, Any]:
        """Returns the means and resets them: floats and lists, None where nothing was measured."""
        sums, self._sums = self._sums, {}
        with np.errstate(invalid="ignore"):
            means = {name: total / weight for name, (total, weight) in sums.items()}
        return {
            name: np.where(np.isnan(mean), np.array(None), mean.astype(object)).tolist()
            for name, mean in means.items()
        }


class MetricWriter:
    """Appends to ``metrics.jsonl``, and writes to boards."""

    def __init__(
        self,
        workdir: Path,
        start_step: int,
        boards: Sequence[Board] = (),
        written: dict[str, Any] | None = None,
        waited: bool = False,
    ):
        """Opens the files.

        A killed run may have written lines after ``start_step``. They are removed, because the run
        writes them again. Lines that can't be read, or whose steps are out of order, move to
        ``metrics-damaged.jsonl``. If the lines up to ``start_step`` differ from what was written,
        the removed lines move there too.

        Args:
          workdir: the folder of the files.
          start_step: the step to go on from.
          boards: see `boards.opened`. They are closed with the file.
          written: what `written` returned at that step; if lines are missing or have changed, a
            warning says so. None if unknown.
          waited: whether the line of ``start_step`` was still to be written then.
        """
        self._boards, self._path = boards, workdir / "metrics.jsonl"
        self._file: BinaryIO | None = None
        if not processes.is_first():
            return
        content = self._path.read_bytes() if self._path.exists() else b""
        kept, beyond, doubtful = _sorted_lines(content, start_step)
        later = kept[-1:] if waited and kept and step_of(kept[-1]) == start_step else []
        kept = kept[: len(kept) - len(later)]
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
            # Lines that are missing before `start_step` may be among those after it.
            doubtful += beyond
        elif beyond and not start_step and written is None:
            logging.warning(
                "%s: %d lines are removed, for there is no checkpoint", self._path, len(beyond)
            )
        if doubtful:
            aside = self._path.with_name("metrics-damaged.jsonl")
            with naming(aside), aside.open("ab") as file:
                file.writelines(doubtful)
            logging.warning("%d lines of %s are now in %s", len(doubtful), self._path, aside)
        if beyond or doubtful:
            write_bytes(self._path, b"".join(kept + later))
        self._lines += len(later)
        self._digest.update(b"".join(later))
        self._file = self._path.open("ab")

    def written(self) -> dict[str, Any] | None:
        """The number and the digest of the lines so far; first waits until they are on the disk.

        None in all processes but the first.
        """
        if not processes.is_first():
            return None
        if self._file is not None:
            with naming(self._path):
                os.fsync(self._file.fileno())
        return {"lines": self._lines, "sha256": self._digest.hexdigest()}

    def scalars(self, step: int, values: dict[str, Any]) -> None:
        """Writes the metrics of a step: numbers and lists of numbers."""
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
        for board in self._boards:
            board.scalars(step, flat)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Writes one uint8 (H, W, 3) image to the boards."""
        for board in self._boards:
            board.image(step, name, image)

    def close(self) -> None:
        """Writes what is left to write and closes the file and the boards."""
        for board in self._boards:
            board.close()
        if self._file is not None:
            with naming(self._path):
                self._file.close()


def _sorted_lines(content: bytes, start_step: int) -> tuple[list[bytes], list[bytes], list[bytes]]:
    """The lines up to a step, the lines after it, and those that are unreadable or out of order."""
    *lines, torn = (line + b"\n" for line in content.split(b"\n"))
    found = ((i, step_of(line)) for i, line in enumerate(lines))
    steps = {i: step for i, step in found if step is not None}
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
    # We write only ASCII, and readers would split a line at other line breaks.
    return step if type(step) is int and line.isascii() and b"\r" not in line else None


def _ascending(steps: dict[int, int]) -> list[int]:
    """Keys of the longest ascending subsequence, so that one damaged number costs one line."""
    ends: list[int] = []
    before: dict[int, int | None] = {}
    for i, step in steps.items():
        place = bisect.bisect_left(ends, step, key=steps.__getitem__)
        before[i] = ends[place - 1] if place else None
        ends[place : place + 1] = [i]
    chain, last = [], ends[-1] if ends else None
    while last is not None:
        chain.append(last)
        last = before[last]
    return chain[::-1]


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``; unreadable ones are left out, with a warning."""
    kept, _, doubtful = _sorted_lines(path.read_bytes(), sys.maxsize)
    if doubtful:
        logging.warning("%d lines of %s can't be read", len(doubtful), path)
    return [json.loads(line) for line in kept]


def columns(path: Path) -> dict[str, np.ndarray]:
    """The content of a ``metrics.jsonl``: an array of shape (lines, ...) for each name.

    Steps are integers. The others are floats, NaN where a line has no value.
    """
    rows = read(path)
    found = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        shapes = [np.shape(value) for value in values if value is not None]
        nothing = np.full(shapes[0] if shapes else (), np.nan)
        filled = [nothing if value is None else value for value in values]
        found[name] = np.array(filled, np.int64 if name == "step" else np.float64)
    return found


def seconds(logged: Mapping[str, np.ndarray]) -> np.ndarray:
    """(lines,) seconds of training steps until each line of `columns`; NaN without a speed."""
    steps = logged.get("step", np.zeros(0))
    speed = logged.get("steps_per_second", np.full(len(steps), np.nan))
    return np.cumsum(np.diff(steps, prepend=0) / speed)


def show_progress() -> None:
    """Shows the log where no program has decided what to show: in Python and in notebooks."""
    if flags.FLAGS.is_parsed() or not flags.FLAGS["verbosity"].using_default_value:
        return
    if not root_logger.handlers:
        logging.use_absl_handler()
        quiet_console()
        # That there are no flags is no news here. The name is missing in the stubs of absl.
        logging._warn_preinit_stderr = False  # pyright: ignore[reportAttributeAccessIssue]
    logging.set_verbosity(logging.INFO)


def quiet_console() -> None:
    """Logs plain lines on the console; of other libraries only warnings and errors."""
    handler = logging.get_absl_handler()
    handler.setFormatter(None)
    root = Path(__file__).parents[2]
    folders = (str(root / "ant_jax"), str(root / "experiments"))

    def worth_reading(record):
        # If a save fails, our error says so; orbax's threads would log it again for every array.
        twice = "/orbax/" in record.pathname or record.name == "asyncio"
        return (record.levelno >= WARNING and not twice) or record.pathname.startswith(folders)

    handler.addFilter(worth_reading)
    # The arrays that orbax has not written yet would report the same failure.
    hook = sys.unraisablehook
    sys.unraisablehook = lambda failure: (
        str(failure.exc_value) == "Event loop is closed" or hook(failure)
    )
