"""Samples kept on disk while they are drawn, so that a killed run goes on where it was."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from ant_jax import autoencoding, evaluation
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
        if not name.startswith(_NO_MATTER)
    }
    # The weights may be others under the same name, or the same under another.
    decoder = autoencoding.load(config).digest if config.autoencoder.name else ""
    key = fingerprint({"settings": settings, "params": params, "decoder": decoder})
    # Processes that share a disk don't write into each other's files.
    place = workdir / "drawn" / f"{step:08d}-{key[:16]}-{jax.process_index()}"
    others = [other for other in place.parent.glob(f"*-{jax.process_index()}") if other != place]
    if others:
        logging.info(
            "%s: left by drawings with other settings; remove what is not to go on",
            ", ".join(map(str, sorted(others))),
        )
    return place


def resume(place: Path, num: int, draw: Callable[[int], Iterator[Batch]]) -> Iterator[Batch]:
    """Gives the batches that were drawn before, then draws the others and keeps them.

    Uncompressed, so 50 000 samples of 256 x 256 pixels take 10 GB. Who has used the last batch
    removes the folder.

    Args:
      place: from `folder`.
      num: Number of samples.
      draw: From the number of the first sample to the batches from there on, such as
        `sampling.sample_batches`.

    Yields:
      uint8 images (B, H, W, C) and labels (B,) or None.
    """
    first = 0
    while first < num and (batch := _read(_piece(place, first))) is not None:
        yield batch
        first += len(batch[0])
    if first:
        logging.info("%d of %d samples were drawn before: %s", first, num, place)
    if first >= num:
        return
    for images, labels in with_time_left(draw(first), num, "samples drawn", first):
        evaluation.write_samples(_piece(place, first), [(images, labels)], len(images))
        first += len(images)
        yield images, labels


def _piece(place, first):
    return place / f"{first:08d}.npz"


def _read(path):
    if not path.exists():
        return None
    try:
        images, labels = zip(*evaluation.read_samples(path, 1 << 16), strict=True)
    except (ValueError, OSError) as error:
        logging.warning("drawn again from here on: %s", error)
        return None
    return np.concatenate(images), None if labels[0] is None else np.concatenate(labels)
