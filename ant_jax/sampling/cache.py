"""Keeps samples on disk while they are drawn, so that a killed job continues where it stopped."""

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

# These do not match the files that Finder and network disks add, such as ._00000000.npz.
_FOLDER = re.compile(r"[0-9]{8,}-[0-9a-f]{16}")
_BATCH_FILE = re.compile(r"([0-9]{8,})\.npz")


def key(made_from: dict[str, Any]) -> str:
    """A short hash of what something was made from."""
    return tree_hash(json.dumps(made_from, sort_keys=True))[:16]


@contextlib.contextmanager
def folder(workdir: Path, made_from: dict[str, Any]) -> Iterator[Path]:
    """Gives the folder for the samples of a run, and locks it against other jobs.

    The caller deletes the folder after it has used the samples.

    Args:
      workdir: of the run.
      made_from: what the samples depend on, as values that JSON can hold, among them the `step` of
        the checkpoint. Each value of `made_from` has its own folder.

    Yields:
      The folder, which may not exist yet.

    Raises:
      InUseError: if another job is drawing the same samples.
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
            "%s: other samples, of jobs that are running or were stopped; delete the folders that "
            "nobody needs",
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

    The files are not compressed: 50 000 samples of 256 x 256 pixels take 10 GB.

    Args:
      place: The folder, from `folder`, on a disk that all processes share.
      num: Number of samples.
      batch_size: Number of samples to draw and write at a time.
      draw: ``draw(first, stop)`` gives samples first .. stop - 1 in batches, as `sample_batches`
        does.
    """
    parts = processes.broadcast_from_first(lambda: _missing(place, num, batch_size))
    left = sum(stop - first for first, stop in parts)
    if left < num:
        logging.info("%d of %d samples were drawn before: %s", num - left, num, place)
    mine = parts[jax.process_index() :: jax.process_count()]

    def batches():
        for first, stop in mine:
            for images, labels in draw(first, stop):
                write_samples(_batch_file(place, first), [(images, labels)], len(images))
                first += len(images)
                yield images, labels

    total = sum(stop - first for first, stop in mine)
    for _ in with_time_left(batches(), total, "samples drawn"):
        pass
    processes.barrier()


def read(place: Path, num: int) -> Iterator[Batch]:
    """Reads the batches that `draw_missing` wrote, in order.

    Yields:
      uint8 images (B, H, W, C) and labels (B,) or None.

    Raises:
      OSError: If a batch is missing or damaged.
    """
    first = 0
    while first < num:
        path = _batch_file(place, first)
        if not processes.wait_for_file(path) or (batch := _read(path)) is None:
            raise OSError(f"{path} was drawn but can't be read: run the same command again")
        yield batch
        first += len(batch[0])


def _missing(place, num, batch_size):
    """The batches to draw, each as (first, stop): samples first .. stop - 1."""
    names = os.listdir(place) if place.is_dir() else []
    there = sorted(int(match[1]) for match in map(_BATCH_FILE.fullmatch, names) if match)
    parts, first = [], 0
    while first < num:
        batch = _read(_batch_file(place, first)) if first in there else None
        if batch is None:
            after = [other for other in there if other > first]
            parts.append((first, min(first + batch_size, num, *after)))
            first = parts[-1][1]
        else:
            first += len(batch[0])
    return parts


def _batch_file(place, first):
    return place / f"{first:08d}.npz"


def _read(path):
    try:
        images, labels = zip(*read_samples(path, 1 << 16), strict=True)
    except (ValueError, OSError) as error:
        logging.warning("these samples are drawn again: %s", error)
        return None
    return np.concatenate(images), None if labels[0] is None else np.concatenate(labels)
