"""Latents of images on disk: ArrayRecord shards, and what they are in a JSON file beside them.

A folder of latents has `latents.json`, which is `LatentFacts`, and `00000.array_record`, ... A
record is the label, int32, and then float16 numbers (views, parts, h, w, c): the views are the
image and its mirror image, the parts the mean and the standard deviation of each number, or the
mean alone where the standard deviations are zero. Numbers are little-endian.
"""

import dataclasses
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ant_jax.data.sources import Example, UnreadableImageError
from ant_jax.files import write_bytes

_FACTS = "latents.json"
_LABEL_BYTES = 4
_SPREAD_IMAGES = 1000


class LatentFacts(NamedTuple):
    """What a folder of latents holds.

    Attributes:
      autoencoder: its name.
      digest: of its encoder's weights.
      image_size: side of the images in pixels.
      shape: (h, w, c) of a latent.
      parts: 2 for mean and standard deviation, 1 for the mean alone.
      num_images: how many.
      num_classes: number of labels; 0 where there are none.
      std: standard deviation of all numbers of the latents.
      data: `config.data.name` of the images.
      crop: how they were brought to their size.
      origin: where the images come from, for the reader.
      exif: whether they were turned as their cameras noted.
    """

    autoencoder: str
    digest: str
    image_size: int
    shape: tuple[int, int, int]
    parts: int
    num_images: int
    num_classes: int
    std: float
    data: str
    crop: str
    origin: str
    # Latents made before there was a choice.
    exif: str = "ignore"


@dataclasses.dataclass(frozen=True, eq=False)
class LatentSource:
    """Latents that are read when they are asked for, times a scale.

    Attributes:
      name: The folder, as error messages call it.
      facts: What it holds.
      scale: Factor of means and standard deviations.
      records: The records of all shards, in order.
    """

    name: str
    facts: LatentFacts = dataclasses.field(repr=False)
    scale: float
    records: Sequence[bytes] = dataclasses.field(repr=False)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(h, w, c)."""
        return self.facts.shape

    @property
    def num_classes(self) -> int:
        """Number of labels."""
        return self.facts.num_classes

    def __len__(self) -> int:
        return self.facts.num_images

    def __getitem__(self, index: int) -> Example:
        """Returns {"mean", "std": float32 (2, h, w, c), "label": int32 ()}; see the module.

        Raises:
          UnreadableImageError: If the record is damaged.
        """
        shape = (2, self.facts.parts, *self.facts.shape)
        try:
            record = self.records[index]
            numbers = np.frombuffer(record, "<f2", offset=_LABEL_BYTES).reshape(shape)
        # Damaged bytes surface as almost any type of error.
        except Exception as error:
            raise UnreadableImageError(f"latent {index} of {self.name}: {error}") from error
        mean, *std = np.moveaxis(np.float32(numbers) * np.float32(self.scale), 1, 0)
        return {
            "mean": mean,
            "std": std[0] if std else np.zeros_like(mean),
            "label": np.frombuffer(record, "<i4", count=1)[0],
        }


def latents(directory: str | os.PathLike, scale: float) -> LatentSource:
    """Opens a folder of latents.

    Args:
      directory: The folder.
      scale: Factor that brings them to about unit variance.

    Returns:
      The source.

    Raises:
      FileNotFoundError: If there are no latents, or not all of them yet.
      ValueError: If its description or a shard is damaged, or a shard is missing or one too many.
    """
    directory = Path(directory).expanduser()
    path = directory / _FACTS
    if not path.exists():
        raise FileNotFoundError(
            f"{directory} has no latents, or not all of them yet: run --mode encode"
        )
    try:
        facts = LatentFacts(**json.loads(path.read_text()))
        facts = facts._replace(shape=tuple(facts.shape))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}; --mode encode writes it anew") from error
    return _open(directory, facts, scale)


def complete(directory: Path, facts: LatentFacts) -> LatentFacts:
    """Writes what a folder holds once all its shards are there.

    Args:
      directory: The folder.
      facts: Of its latents; the standard deviation is found out here, from some of them.

    Returns:
      The facts as written.

    Raises:
      ValueError: If a shard is damaged, or they hold another number of latents.
    """
    facts = facts._replace(std=_spread(_open(directory, facts, 1.0)))
    write_bytes(directory / _FACTS, (json.dumps(facts._asdict(), indent=1) + "\n").encode())
    return facts


def _open(directory, facts, scale):
    shards = sorted(directory.glob("*.array_record"))
    records = _records(shards) if shards else []
    if len(records) != facts.num_images:
        missing = len(records) < facts.num_images
        advice = "run --mode encode, which makes missing shards" if missing else "encode them again"
        raise ValueError(
            f"{directory} has {len(records)} latents in {len(shards)} shards instead of "
            f"{facts.num_images}: {advice}{'' if missing else ' into an empty folder'}"
        )
    return LatentSource(str(directory), facts, scale, records)


def _records(shards):
    from grain.sources import ArrayRecordDataSource

    try:
        return ArrayRecordDataSource([str(shard) for shard in shards])
    except RuntimeError:
        # The message does not say which one it is.
        for shard in shards:
            try:
                ArrayRecordDataSource(str(shard))
            except RuntimeError as error:
                raise ValueError(
                    f"{shard} is damaged: remove it and run --mode encode, which makes missing "
                    f"shards ({error})"
                ) from error
        raise


def _spread(source):
    """Standard deviation of all numbers of latents, drawn anew each time, from some of them."""
    squares = total = count = 0.0
    for index in range(min(_SPREAD_IMAGES, len(source))):
        mean, std = (np.float64(source[index][part]) for part in ("mean", "std"))
        squares += np.sum(mean**2 + std**2)
        total += np.sum(mean)
        count += mean.size
    return float(np.sqrt(squares / count - (total / count) ** 2))


def shard_path(directory: Path, shard: int) -> Path:
    """Where a shard lies."""
    return directory / f"{shard:05d}.array_record"


def write_shard(
    path: Path, examples: Iterable[tuple[np.ndarray, np.ndarray | None, int | np.integer]]
) -> None:
    """Writes a shard, whole or not at all.

    Args:
      path: See `shard_path`; the folder exists.
      examples: Means (2, h, w, c), standard deviations of the same shape or None, and the label.

    Raises:
      OSError: If it cannot be written.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    # One record a group: they are read in any order.
    writer = ArrayRecordWriter(str(partial), "group_size:1")
    try:
        for mean, std, label in examples:
            numbers = np.stack([mean] if std is None else [mean, std], axis=1).astype("<f2")
            writer.write(np.array(label, "<i4").tobytes() + numbers.tobytes())
    finally:
        try:
            writer.close()
        except RuntimeError as error:
            raise OSError(f"cannot write {partial}: {error} (disk full?)") from error
    partial.replace(path)
