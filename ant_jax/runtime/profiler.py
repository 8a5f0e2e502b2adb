"""Traces some steps with JAX's profiler, for TensorBoard or Perfetto."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from absl import logging

from ant_jax.runtime import processes


@contextlib.contextmanager
def profiler(folder: Path, first: int, num_steps: int) -> Iterator[Callable[[int], None]]:
    """Traces some steps in process 0.

    Args:
      folder: gets the trace.
      first: the first step to trace.
      num_steps: number of steps to trace; 0 for no trace.

    Yields:
      A function to call before each step, with the number of the step.
    """
    running = False

    def before_step(step):
        nonlocal running
        if num_steps and step == first and processes.is_first():
            jax.profiler.start_trace(str(folder))
            running = True
        elif running and step == first + num_steps:
            jax.profiler.stop_trace()
            running = False
            logging.info("profile: %s", folder)

    try:
        yield before_step
    finally:
        if running:
            jax.profiler.stop_trace()
