"""The real images that samples are compared with: a reference batch, or the training data."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from absl import logging

from ant_jax import data
from ant_jax.evaluation import summary as summary_lib
from ant_jax.evaluation.evaluator import Evaluator
from ant_jax.evaluation.statistics import read_statistics
from ant_jax.evaluation.summary import Batch, Reference, Summary, summarise
from ant_jax.runtime import files
from ant_jax.runtime.progress import with_time_left
from ant_jax.runtime.tree_hash import tree_hash
from ant_jax.sampling.files import has_images, num_samples, read_samples

# Real images whose outputs are kept: as many as ADM's reference batches have.
_KEPT = 10_000
# Part of the cache file's name: increase it whenever the summary of the same images changes.
_VERSION = 2


class Images(NamedTuple):
    """Real images.

    Attributes:
      name: Name in logs and results.
      source: Where they come from.
      pipeline: Arguments of `data.batches`, such as the size and the crop.
      key: What determines the images, for the cache; None for no cache. If the images change but
        the key does not, the cache is out of date and nothing notices it.
    """

    name: str
    source: data.Source
    pipeline: Mapping[str, Any] = {}
    key: Mapping[str, Any] | None = None


def read_reference(
    path: str | os.PathLike, evaluator: Evaluator, batch_size: int = 512
) -> Reference:
    """Reads a reference batch as ADM has them: statistics, images, or both.

    Statistics of the file are used if there are any. Otherwise they are computed from its images.
    Outputs of single images are computed for all images of the file, as in ADM's evaluation.

    Args:
      path: An `.npz` file; see `read_statistics` and `sampling.read_samples`.
      evaluator: The extractor and the metrics.
      batch_size: Number of images to read at a time.

    Raises:
      ValueError: If the file is damaged, has neither statistics nor images, or has statistics of
        other features.
      OSError: If it cannot be opened.
    """
    statistics = read_statistics(path)
    for output, found in statistics.items():
        expected = evaluator.extractor.shapes.get(output)
        if expected is not None and found.mean.shape != expected:
            name = {"features": "mu", "spatial": "mu_s"}[output]
            raise ValueError(
                f"{os.fspath(path)} cannot be used: {name!r} has {found.mean.size} features, "
                f"but samples are evaluated by {expected[0]}"
            )
    if not has_images(path):
        return Reference(os.fspath(path), Summary(0, statistics, {}, summary_lib.NO_LABELS))
    batches = with_time_left(
        read_samples(path, batch_size), num_samples(path), "images of the reference"
    )
    moments_of = () if statistics else evaluator.moments
    found = summarise(batches, evaluator.network, moments_of, evaluator.real)
    return Reference(os.fspath(path), found._replace(gaussians=statistics or found.gaussians))


def data_reference(
    evaluator: Evaluator,
    images: Images,
    held_out: Images | None = None,
    batch_size: int = 512,
    cache_dir: Path | None = None,
) -> Reference:
    """Summarises training images, or reads their summary from the cache.

    Args:
      evaluator: The extractor and the metrics.
      images: The training images.
      held_out: Real images that no model has seen. Figures of samples can be compared with theirs.
      batch_size: Number of images to process at a time.
      cache_dir: Folder of the cache; None for `files.user_cache`.

    Raises:
      ValueError: If there are fewer than two images.
    """
    real = _summary(evaluator, images, evaluator.real, batch_size, cache_dir)
    others = None
    if held_out is not None:
        others = _summary(
            evaluator, held_out, evaluator.samples | evaluator.real, batch_size, cache_dir
        )
    return Reference(images.name, real, others)


def _summary(evaluator, images, keep, batch_size, cache_dir):
    if len(images.source) < 2:
        name, num = images.source.name, len(images.source)
        raise ValueError(f"a reference needs at least 2 images, but {name} has {num}")
    path, moments_of, keep = None, sorted(evaluator.moments), sorted(keep)
    if images.key is not None:
        key = {"images": images.key, "weights": evaluator.network.digest, "of": [moments_of, keep]}
        cache_dir = cache_dir or files.user_cache()
        path = cache_dir and cache_dir / f"reference_v{_VERSION}_{tree_hash(key)[:24]}.npz"
    if path is not None and os.path.exists(path):
        try:
            found = summary_lib.load(path, moments_of, keep)
            logging.info("statistics of %s: %s", images.name, path)
            return found
        except Exception as error:  # A damaged file can raise almost any type of error.
            logging.warning("statistics are computed again, because %s is damaged: %r", path, error)
    found = summarise(_each_once(images, batch_size), evaluator.network, moments_of, keep, _KEPT)
    if path is not None:
        with files.keeping(f"the statistics of {images.name}"):
            summary_lib.save(path, found)
            logging.info("statistics of %s, kept for the next evaluation: %s", images.name, path)
    return found


def _each_once(images: Images, batch_size: int) -> Iterator[Batch]:
    """Each image once, in random order, so that the first ones represent all."""
    num = len(images.source)
    size = min(batch_size, num)
    batches = data.batches(images.source, batch_size=size, seed=0, **images.pipeline)

    def parts():
        for first in range(0, num, size):
            # The first epoch has each image once. Its last batch may have images of the second too.
            batch = next(batches)
            yield batch["image"][: num - first], batch["label"][: num - first]

    return with_time_left(parts(), num, f"images of {images.name}")
