"""Samples kept on disk while they are drawn, so that a killed run goes on where it was."""

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from ant_jax.runtime import processes
from ant_jax.runtime.lock import job_lock
from ant_jax.runtime.progress import with_time_left
from ant_jax.runtime.tree_hash import tree_hash
from ant_jax.sampling.files import read_samples, write_samples

Batch = tuple[np.ndarray, np.ndarray | None]

# Not what Finder and network disks leave beside them, such as ._00000000.npz.
_FOLDER = re.compile(r"[0-9]{8,}-[0-9a-f]{16}")
_PIECE = re.compile(r"([0-9]{8,})\.npz")


def key(made_from: dict[str, Any]) -> str:
    """A short name for what something was made from."""
    return tree_hash(json.dumps(made_from, sort_keys=True))[:16]


@contextlib.contextmanager
def folder(workdir: Path, made_from: dict[str, Any]) -> Iterator[Path]:
    """Where the samples of a run that are being drawn are kept, while no other job draws them.

    The caller removes the folder once the samples are used.

    Args:
      workdir: of the run.
      made_from: what the samples depend on, as JSON can hold it, with the `step` of the checkpoint;
        another gives another folder.

    Raises:
      InUseError: if another job is drawing them.
    """
    place = workdir / "drawn" / f"{made_from['step']:08d}-{key(made_from)}"
    if not processes.is_first():
        yield place
        return
    others = [
        path
        for path in (place.parent.iterdir() if place.parent.is_dir() else ())
        if path != place and _FOLDER.fullmatch(path.name) and path.is_dir()
    ]
    if others:
        logging.info(
            "%s: other samples that are being drawn, or were when their job ended; remove those "
            "that nobody needs",
            ", ".join(map(str, sorted(others))),
        )
    lock = place.with_name(f"{place.name}.lock")
    with job_lock(
        lock,
        f"is drawing the same samples, of step {made_from['step']} in {workdir}",
        "wait for it or stop it",
    ):
        try:
            yield place
        finally:
            if not place.exists():
                lock.unlink(missing_ok=True)


def draw_missing(
    place: Path, num: int, batch_size: int, draw: Callable[[int, int], Iterator[Batch]]
) -> None:
    """Draws the samples that are not on the disk yet; several processes share the work.

    Uncompressed, so 50 000 samples of 256 x 256 pixels take 10 GB.

    Args:
      place: From `folder`; on a disk that all processes share.
      num: Number of samples.
      batch_size: How many to draw and keep at a time.
      draw: From the numbers of the first sample and of the one after the last to the batches of
        those, as `sample_batches` draws them.
    """
    parts = processes.broadcast_from_first(lambda: _missing(place, num, batch_size))
    left = sum(stop - first for first, stop in parts)
    if left < num:
        logging.info("%d of %d samples were drawn before: %s", num - left, num, place)
    mine = parts[jax.process_index() :: jax.process_count()]

    def batches():
        for first, stop in mine:
            for images, labels in draw(first, stop):
                write_samples(_piece(place, first), [(images, labels)], len(images))
                first += len(images)
                yield images, labels

    total = sum(stop - first for first, stop in mine)
    for _ in with_time_left(batches(), total, "samples drawn"):
        pass
    processes.barrier()


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
        if not processes.wait_for_file(piece) or (batch := _read(piece)) is None:
            raise OSError(f"{piece} was drawn but can't be read: start again to draw it anew")
        yield batch
        first += len(batch[0])


def _missing(place, num, batch_size):
    """First sample and the one after the last of each batch to draw."""
    names = os.listdir(place) if place.is_dir() else []
    there = sorted(int(match[1]) for match in map(_PIECE.fullmatch, names) if match)
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
        images, labels = zip(*read_samples(path, 1 << 16), strict=True)
    except (ValueError, OSError) as error:
        logging.warning("to be drawn again: %s", error)
        return None
    return np.concatenate(images), None if labels[0] is None else np.concatenate(labels)
