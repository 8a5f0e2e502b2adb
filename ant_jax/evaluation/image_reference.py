"""What samples are compared with by Inception: a file of the field, or the training data."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from ant_jax.evaluation.features.inception import Network
from ant_jax.evaluation.reference import (
    Statistics,
    has_images,
    num_samples,
    read_features,
    read_samples,
    read_statistics,
    write_statistics,
)
from ant_jax.evaluation.summary import summarise
from ant_jax.runtime import files
from ant_jax.runtime.progress import with_time_left
from ant_jax.runtime.tree_hash import tree_hash

# Of the training images; as many as the reference batches of ADM have.
_IMAGES = 10_000
# Part of the cache file's name: increase it whenever the statistics of the same images change.
_VERSION = 1


class Reference(NamedTuple):
    """Real images.

    Attributes:
      name: For the reader of a table.
      statistics: For FID and sFID.
      pool: (n, 2048) features for precision and recall; None where there are no images.
    """

    name: str
    statistics: Statistics
    pool: np.ndarray | None


def read_reference(path: str | os.PathLike, network: Network, batch_size: int) -> Reference:
    """Reads a reference batch of ADM's kind: statistics, images, or both.

    The statistics are those of the file where it has any, and else those of its images. All of its
    images count for precision and recall, as in ADM's evaluation.

    Args:
      path: An `.npz` file; see `read_statistics` and `read_samples`.
      network: What the statistics are of.
      batch_size: Images read at once.

    Raises:
      ValueError: If the file is damaged, has none of them, or statistics of other features.
      OSError: If it cannot be opened.
    """
    statistics = read_statistics(path)
    if statistics is not None:
        _check_widths(path, statistics, network)
    if not has_images(path):
        return Reference(os.fspath(path), statistics, None)
    batches = with_time_left(
        read_samples(path, batch_size), num_samples(path), "images of the reference"
    )
    summary = summarise(network.features(images for images, _ in batches))
    return Reference(os.fspath(path), statistics or summary.statistics, summary.pool)


def data_reference(
    name: str,
    batches: Callable[[], Iterable[np.ndarray]],
    network: Network,
    key: dict[str, Any],
    cache_dir: Path | None = None,
) -> Reference:
    """The statistics of a data set, from the cache or else computed, and then cached.

    Args:
      name: Of the data, for the reader.
      batches: Gives each image once, in an order where the first 10 000 stand for all: their
        features are kept for precision and recall.
      network: What computes the features.
      key: What determines the images. That their files change is not noticed where it is the same.
      cache_dir: None is `files.user_cache`.

    Raises:
      ValueError: If there are fewer than two images.
    """
    digest = tree_hash({"images": key, "weights": network.digest})
    cache_dir = cache_dir or files.user_cache()
    path = cache_dir and cache_dir / f"reference_v{_VERSION}_{digest[:24]}.npz"
    if path is not None and os.path.exists(path):
        try:
            statistics, pool = read_statistics(path), read_features(path, "pool", _IMAGES)
            _check_widths(path, statistics, network)
            logging.info("statistics of %s: %s", name, path)
            return Reference(name, statistics, pool)
        except Exception as error:  # Damaged bytes surface as almost any type of error.
            logging.warning("computed again: %s is damaged: %r", path, error)
    summary = summarise(network.features(batches()), _IMAGES)
    if path is not None:
        with files.keeping(f"the statistics of {name}"):
            write_statistics(path, summary.statistics, pool=summary.pool)
            logging.info("statistics of %s kept for the next time: %s", name, path)
    return Reference(name, summary.statistics, summary.pool)


def _check_widths(path, statistics, network):
    expected = {"mu": network.pool_width, "mu_s": network.spatial_width}
    for (name, width), found in zip(expected.items(), statistics, strict=True):
        if found is not None and found.mean.size != width:
            raise ValueError(
                f"{os.fspath(path)} cannot be used: {name!r} is of {found.mean.size} features, not "
                f"of Inception's {width}"
            )
