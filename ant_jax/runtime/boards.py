"""Shows metrics and pictures in TensorBoard and in Weights & Biases."""

import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from absl import logging

from ant_jax.runtime import extras, processes

NAMES = ("tensorboard", "wandb")


class Writer(Protocol):
    """What writes to a board; the writers of clu are such."""

    def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes the metrics of a step."""

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Writes batches of uint8 images (n, H, W, 3)."""

    def close(self) -> None:
        """Writes what is left to write."""


class Board:
    """Writes to a board in a thread of its own. A failure is a warning."""

    def __init__(self, name: str, opened: Callable[[], Writer]):
        """Writes nothing yet.

        Args:
          name: of the board, for warnings.
          opened: opens the writer, in the thread. It is called at the first metrics.
        """
        self._name, self._opened = name, opened
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._writer: Future[Writer] | None = None

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the metrics of a step."""
        self._submit(lambda writer: writer.write_scalars(step, values))

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Writes one uint8 (H, W, 3) image."""
        self._submit(lambda writer: writer.write_images(step, {name: image[None]}))

    def close(self) -> None:
        """Waits until all is written."""
        if self._writer is not None:
            self._submit(lambda writer: writer.close())
        self._executor.shutdown()

    def _submit(self, write):
        if self._writer is None:
            self._writer = self._executor.submit(self._opened)
        self._executor.submit(self._write, self._writer, write)

    def _write(self, writer, write):
        try:
            write(writer.result())
        except Exception as error:
            logging.log_first_n(logging.WARNING, f"{self._name} is off: %s", 1, error)


def check(names: Sequence[str]) -> None:
    """Raises a MissingExtraError if a board can't be opened that must be installed."""
    if "wandb" in names and (error := extras.missing("wandb")):
        raise error


def opened(
    names: Sequence[str], workdir: Path, run: str, settings: Mapping[str, Any]
) -> list[Board]:
    """The boards with these names; none in all processes but the first.

    Args:
      names: "tensorboard", which is left out if TensorFlow is not installed, and "wandb".
      workdir: of the run.
      run: the id of the run. A resumed run goes on in the same run of Weights & Biases.
      settings: of the run, which Weights & Biases shows.

    Raises:
      ConnectionError: if Weights & Biases does not start.
    """
    found = []
    if not processes.is_first():
        return found
    if "tensorboard" in names and importlib.util.find_spec("tensorflow") is None:
        logging.info("metrics go to metrics.jsonl; with TensorFlow installed, to TensorBoard too")
    elif "tensorboard" in names:
        # Importing it takes seconds, which the thread spends.
        found.append(Board("TensorBoard", lambda: _tensorboard(workdir)))
    if "wandb" in names:
        # Here and not in the thread, because it may ask for a login.
        writer = _WeightsAndBiases(workdir, run, settings)
        found.append(Board("Weights & Biases", lambda: writer))
    return found


def _tensorboard(workdir):
    # TensorFlow only writes files here. These keep its notes on the processor off the console.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    from clu.metric_writers import SummaryWriter

    return SummaryWriter(str(workdir))


class _WeightsAndBiases:
    def __init__(self, workdir, run, settings):
        import wandb

        self._image = wandb.Image
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "ant-jax"),
                id=run,
                name=workdir.absolute().name,
                dir=str(workdir),
                config=dict(settings),
                resume="allow",
            )
            # Its own count of steps can't go back, as a run does that was killed.
            self._run.define_metric("*", step_metric="step")
        except Exception as error:
            raise ConnectionError(
                f"Weights & Biases does not start ({error}): WANDB_MODE=offline writes to the "
                "disk, and config.log_to without 'wandb' does without"
            ) from error

    def write_scalars(self, step, scalars):
        self._run.log({"step": step, **scalars})

    def write_images(self, step, images):
        pictures = {name: [self._image(each) for each in batch] for name, batch in images.items()}
        self._run.log({"step": step, **pictures})

    def close(self):
        self._run.finish()
