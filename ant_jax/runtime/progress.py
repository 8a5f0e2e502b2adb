"""Logs the progress of a job: how far it is, its speed, and the time left."""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from absl import logging

Batch = TypeVar("Batch", bound=tuple)

_REPORT_SECONDS = 10.0  # between two lines


class Progress:
    """Logs a line with the step, the loss, the speed and the time left."""

    def __init__(self, start_step: int, num_steps: int, batch_size: int):
        self._num_steps, self._batch_size = num_steps, batch_size
        self._mark = start_step, time.perf_counter()

    def restart(self, step: int) -> None:
        """Restarts the clock, so that the speed leaves out time that was not spent on steps."""
        self._mark = step, time.perf_counter()

    def line(self, step: int, loss: float | None) -> float:
        """Logs the line of a step; returns the steps per second since the last line.

        Args:
          step: its number.
          loss: the mean loss since the last line; None if it is unknown.
        """
        last_step, last_time = self._mark
        self.restart(step)
        speed = (step - last_step) / (self._mark[1] - last_time)
        logging.info(
            "step %*d/%d  loss %.4f  %.1f steps/s  %.0f examples/s  ETA %s",
            len(str(self._num_steps)),
            step,
            self._num_steps,
            math.nan if loss is None else loss,
            speed,
            speed * self._batch_size,
            duration((self._num_steps - step) / speed),
        )
        return speed


def is_due(step: int, every: int, num_steps: int) -> bool:
    """Whether training does after a step what it does regularly, such as drawing a grid.

    It does so at multiples of ``every`` and after the last step; never if ``every`` is 0.
    """
    return bool(every) and (step % every == 0 or step == num_steps)


def with_time_left(
    batches: Iterable[Batch],
    total: int,
    what: str,
    count: Callable[[Batch], int] = lambda batch: len(batch[0]),
) -> Iterator[Batch]:
    """Passes batches on, and logs the progress and the time left every 10 s.

    Args:
      batches: tuples of arrays whose first axis is that of the examples.
      total: the count of all batches.
      what: the unit of the count in the log, such as "samples drawn".
      count: counts a batch; by default its examples.
    """
    done = first = 0
    begin, mark = None, 0.0
    for batch in batches:
        done += count(batch)
        now = time.perf_counter()
        if begin is None:
            # The clock starts after the first batch, which includes the compilation.
            begin = mark = now
            first = done
        elif now - mark >= _REPORT_SECONDS:
            mark = now
            left = (now - begin) * (total - done) / (done - first)
            logging.info("%d/%d %s  ETA %s", done, total, what, duration(left))
        yield batch


def duration(seconds: float) -> str:
    """Formats seconds as 5s, 2m05s or 3h07m."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
