"""Summaries of sets of images: moments of features, and the features of some images."""

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ant_jax.evaluation.features import Network
from ant_jax.evaluation.moments import Gaussian, Moments, gaussian, merge, moments
from ant_jax.runtime import files

# uint8 images (n, height, width, channels) and their labels (n,) or None.
Batch = tuple[np.ndarray, np.ndarray | None]

# Images whose moments are computed together: few merges of large matrices, but little memory.
_TOGETHER = 4096
_NO_LABEL = -1
NO_LABELS = np.zeros(0, np.int64)


class Summary(NamedTuple):
    """A summary of a set of images.

    Attributes:
      count: Number of images; 0 if unknown, because a file of statistics does not have it.
      gaussians: Mean and covariance of outputs over all images, by name of the output.
      kept: Outputs of the first m images, (m, *shape) by name.
      labels: (m,) int64 labels of these images; -1 for an image without a label.
    """

    count: int  # pyright: ignore[reportIncompatibleMethodOverride]  # not that of a tuple
    gaussians: dict[str, Gaussian]
    kept: dict[str, np.ndarray]
    labels: np.ndarray


class Reference(NamedTuple):
    """What samples are compared with.

    Attributes:
      name: Name in logs and results.
      summary: Of real images: those of a file, or the training images.
      held_out: Of real images that no model has seen; None if there are none.
    """

    name: str
    summary: Summary
    held_out: Summary | None = None


def summarise(
    batches: Iterable[Batch],
    network: Network,
    moments_of: Collection[str],
    keep: Collection[str],
    most: int | None = None,
) -> Summary:
    """Summarises images batch by batch.

    Args:
      batches: Pairs of images and labels.
      network: The loaded extractor.
      moments_of: Names of outputs (n, d) whose mean and covariance are computed.
      keep: Names of outputs that are kept.
      most: Number of images, from the first, whose outputs are kept; None for all.

    Raises:
      ValueError: If there are no images, or only one and a covariance is needed; if features are
        not finite, labels don't match their images, or the network can't evaluate such images.
    """
    labels: list[np.ndarray] = []
    kept: dict[str, list[np.ndarray]] = {name: [] for name in keep}
    waiting: dict[str, list[np.ndarray]] = {name: [] for name in moments_of}
    sums: dict[str, Moments] = {}
    count = added = 0
    for outputs in network.outputs(_without_labels(batches, labels)):
        (size,) = {len(value) for value in outputs.values()}
        room = size if most is None else max(0, min(size, most - count))
        for name, parts in kept.items():
            parts.append(outputs[name][:room])
        for name, parts in waiting.items():
            parts.append(outputs[name])
        count += size
        if count - added >= _TOGETHER:
            _add(sums, waiting)
            added = count
    if not count:
        raise ValueError("there are no images to evaluate: give at least 2")
    if added < count:
        _add(sums, waiting)
    return Summary(
        count,
        {name: gaussian(each) for name, each in sums.items()},
        {name: np.concatenate(parts) for name, parts in kept.items()},
        np.concatenate(labels)[:most],
    )


def save(path: Path, summary: Summary) -> None:
    """Writes a summary as `load` reads it. The file appears only when it is complete.

    Raises:
      OSError: If the file cannot be written.
    """
    arrays = {"count": np.int64(summary.count), "labels": summary.labels}
    for name, each in summary.gaussians.items():
        arrays |= {f"mean/{name}": each.mean, f"cov/{name}": each.cov}
    arrays |= {f"kept/{name}": value for name, value in summary.kept.items()}
    with files.writing(path) as file:
        np.savez(file, **arrays)


def load(path: Path, moments_of: Collection[str], keep: Collection[str]) -> Summary:
    """Reads what `save` wrote. A damaged file can raise almost any type of error."""
    with np.load(path, allow_pickle=False) as stored:
        return Summary(
            int(stored["count"]),
            {name: Gaussian(stored[f"mean/{name}"], stored[f"cov/{name}"]) for name in moments_of},
            {name: stored[f"kept/{name}"] for name in keep},
            stored["labels"],
        )


def _without_labels(batches, every_label):
    """Yields the images of batches, and appends their labels to a list."""
    for images, labels in batches:
        if labels is None:
            labels = np.full(len(images), _NO_LABEL)
        labels = np.asarray(labels)
        if labels.shape != (len(images),):
            raise ValueError(f"{len(images)} images came with labels of shape {labels.shape}")
        every_label.append(labels.astype(np.int64))
        yield images


def _add(sums, waiting):
    for name, parts in waiting.items():
        new = moments(np.concatenate(parts))
        sums[name] = merge(sums[name], new) if name in sums else new
        parts.clear()
