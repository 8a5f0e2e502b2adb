"""Samples kept on disk while they are drawn, so that a killed run goes on where it was."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from ant_jax import autoencoding, evaluation, processes
from ant_jax import config as config_lib
from ant_jax.fingerprint import fingerprint
from ant_jax.metrics import with_time_left

Batch = tuple[np.ndarray, np.ndarray | None]

# What samples don't depend on. Batches say themselves how large they are.
_NO_MATTER = ("log_every", "tensorboard", "profile_steps", "checkpoint.", "evaluation.")
_NO_MATTER += ("data.num_workers", "data.dir", "sample.every", "sample.batch_size")
_NO_MATTER += ("autoencoder.latents", "autoencoder.weights", "autoencoder.batch_size", "init_from")


def folder(workdir: Path, config: ConfigDict, step: int, params: Any) -> Path:
    """Where the samples of a run that are being drawn are kept.

    Args:
      workdir: of the run.
      config: its config; another setting that samples depend on gives another folder.
      step: of the checkpoint.
      params: those the samples are drawn with; others, or an autoencoder with others, give another
        folder.
    """
    settings = {
        name: value
        for name, value in config_lib.flatten(config).items()
        if not config_lib.is_among(name, _NO_MATTER)
    }
    # The weights may be others under the same name, or the same under another.
    decoder = autoencoding.load(config).digest if config.autoencoder.name else ""
    key = fingerprint({"settings": settings, "params": params, "decoder": decoder})
    place = workdir / "drawn" / f"{step:08d}-{key[:16]}"
    others = [other for other in place.parent.glob("*") if other != place]
    if others and processes.is_first():
        logging.info(
            "%s: left by drawings with other settings; remove what is not to go on",
            ", ".join(map(str, sorted(others))),
        )
    return place


def draw_missing(
    place: Path, num: int, batch_size: int, draw: Callable[[int, int], Iterator[Batch]]
) -> None:
    """Draws the samples that are not on the disk yet; several processes share the work.

    Uncompressed, so 50 000 samples of 256 x 256 pixels take 10 GB. Who has used the last batch
    removes the folder.

    Args:
      place: From `folder`; on a disk that all processes share.
      num: Number of samples.
      batch_size: How many to draw and keep at a time.
      draw: From the numbers of the first sample and of the one after the last to the batches of
        those, such as `sampling.sample_batches`.
    """
    parts = processes.decide(lambda: _missing(place, num, batch_size))
    left = sum(stop - first for first, stop in parts)
    if left < num:
        logging.info("%d of %d samples were drawn before: %s", num - left, num, place)
    mine = parts[jax.process_index() :: jax.process_count()]

    def batches():
        for first, stop in mine:
            for images, labels in draw(first, stop):
                evaluation.write_samples(_piece(place, first), [(images, labels)], len(images))
                first += len(images)
                yield images, labels

    total = sum(stop - first for first, stop in mine)
    for _ in with_time_left(batches(), total, "samples drawn"):
        pass
    processes.wait()


def read(place: Path, num: int) -> Iterator[Batch]:
    """Reads the batches that `draw_missing` has left, in order.

    Yields:
      uint8 images (B, H, W, C) and labels (B,) or None.

    Raises:
      OSError: If a batch is not there or damaged.
    """
    first = 0
    while first < num:
        piece = _piece(place, first)
        if not processes.seen(piece) or (batch := _read(piece)) is None:
            raise OSError(f"{piece} was drawn but can't be read: start again to draw it anew")
        yield batch
        first += len(batch[0])


def _missing(place, num, batch_size):
    """First sample and the one after the last of each batch to draw."""
    there = sorted(int(path.stem) for path in place.glob("*.npz"))
    parts, first = [], 0
    while first < num:
        batch = _read(_piece(place, first)) if first in there else None
        if batch is None:
            after = [other for other in there if other > first]
            parts.append((first, min(first + batch_size, num, *after)))
            first = parts[-1][1]
        else:
            first += len(batch[0])
    return parts


def _piece(place, first):
    return place / f"{first:08d}.npz"


def _read(path):
    try:
        images, labels = zip(*evaluation.read_samples(path, 1 << 16), strict=True)
    except (ValueError, OSError) as error:
        logging.warning("to be drawn again: %s", error)
        return None
    return np.concatenate(images), None if labels[0] is None else np.concatenate(labels)
