"""Latents of images on disk: ArrayRecord shards, and what they are in a JSON file beside them.

A folder of latents has `latents.json`, which is `LatentInfo`, and `00000.array_record`, ... A
record is the label, int32, and then float16 numbers (views, parts, h, w, c): the views are the
image and its mirror image, the parts the mean and the standard deviation of each number, or the
mean alone where the standard deviations are zero. Numbers are little-endian.
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ant_jax.data.source import Example, Source, UnreadableImageError
from ant_jax.runtime.files import partial_beside, write_bytes
from ant_jax.settings import check_integer

_INFO = "latents.json"
_SHARD_NAME = re.compile(r"[0-9]{5,}\.array_record")
_LABEL_BYTES = 4
_SPREAD_IMAGES = 1000


class LatentInfo(NamedTuple):
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
class LatentSource(Source):
    """Latents that are read when they are asked for, times a scale.

    Attributes:
      name: The folder, as error messages call it.
      info: What it holds.
      scale: Factor of means and standard deviations.
      records: The records of all shards, in order.
    """

    name: str
    info: LatentInfo = dataclasses.field(repr=False)
    scale: float
    records: Sequence[bytes] = dataclasses.field(repr=False)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(h, w, c)."""
        return self.info.shape

    @property
    def num_classes(self) -> int:
        """Number of labels."""
        return self.info.num_classes

    def __len__(self) -> int:
        return self.info.num_images

    def __getitem__(self, index: int) -> Example:
        """Returns {"mean", "std": float32 (2, h, w, c), "label": int32 ()}; see the module.

        Raises:
          UnreadableImageError: If the record is damaged, its numbers are not finite, or its label
            is that of no class.
        """
        shape = (2, self.info.parts, *self.info.shape)
        try:
            record = self.records[index]
            numbers = np.frombuffer(record, "<f2", offset=_LABEL_BYTES).reshape(shape)
        # Damaged bytes surface as almost any type of error.
        except Exception as error:
            raise UnreadableImageError(f"latent {index} of {self.name}: {error}") from error
        scaled = np.float32(numbers) * np.float32(self.scale)
        label = np.frombuffer(record, "<i4", count=1)[0]
        # In training either would be a loss that is not finite, and blamed on the training.
        if not np.isfinite(scaled).all():
            raise UnreadableImageError(
                f"latent {index} of {self.name} has numbers that are not finite: encode into "
                "another folder"
            )
        if not 0 <= label < max(self.num_classes, 1):
            raise UnreadableImageError(
                f"latent {index} of {self.name} has label {label} of {self.num_classes} classes"
            )
        mean, *std = np.moveaxis(scaled, 1, 0)
        return {"mean": mean, "std": std[0] if std else np.zeros_like(mean), "label": label}

    def facts(self) -> dict[str, Any]:
        """See `Source`."""
        return super().facts() | {"encoder": self.info.digest}


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
    path = directory / _INFO
    if not path.is_file():
        raise FileNotFoundError(
            f"{directory} has no latents, or not all of them yet: run --mode encode"
        )
    try:
        info = _checked(LatentInfo(**json.loads(path.read_text())))
    # Lists in lists without end are a RecursionError.
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}; --mode encode writes it anew") from error
    return _open(directory, info, scale)


def _checked(info):
    """The description, if its values are possible ones."""
    check_integer("image_size", info.image_size, 1)
    check_integer("num_images", info.num_images, 1)
    check_integer("num_classes", info.num_classes, 0)
    check_integer("parts", info.parts, 1, 2)
    if len(info.shape) != 3:
        raise ValueError(f"shape must be three integers, got {info.shape!r}")
    for size in info.shape:
        check_integer("shape", size, 1)
    if type(info.std) not in (int, float) or not 0 < info.std < math.inf:
        raise ValueError(f"std must be a number > 0, got {info.std!r}")
    return info._replace(shape=tuple(info.shape))


def complete(directory: Path, info: LatentInfo) -> LatentInfo:
    """Writes what a folder holds once all its shards are there.

    Args:
      directory: The folder.
      info: Of its latents; the standard deviation is found out here, from some of them.

    Returns:
      The description as written.

    Raises:
      ValueError: If a shard is damaged, they hold another number of latents, or all numbers of the
        latents are the same.
      UnreadableImageError: If one of them can't be used; see `LatentSource`.
    """
    info = info._replace(std=_spread(_open(directory, info, 1.0)))
    if info.std == 0:
        raise ValueError(f"all numbers of the latents in {directory} are the same")
    write_bytes(directory / _INFO, (json.dumps(info._asdict(), indent=1) + "\n").encode())
    return info


def _open(directory, info, scale):
    # Not what Finder and network disks leave beside them, such as ._00000.array_record.
    shards = [path for path in directory.iterdir() if _SHARD_NAME.fullmatch(path.name)]
    shards.sort(key=lambda path: int(path.stem))
    records = _records(shards) if shards else []
    if len(records) != info.num_images:
        missing = len(records) < info.num_images
        advice = "run --mode encode, which makes missing shards" if missing else "encode them again"
        raise ValueError(
            f"{directory} has {len(records)} latents in {len(shards)} shards instead of "
            f"{info.num_images}: {advice}{'' if missing else ' into an empty folder'}"
        )
    return LatentSource(str(directory), info, scale, records)


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


def as_kept(mean: np.ndarray, std: np.ndarray | None) -> np.ndarray:
    """The numbers of a record.

    Args:
      mean: (2, h, w, c), of an image and its mirror image.
      std: The standard deviations of the same shape, or None where they are zero.

    Returns:
      Little-endian float16 (2, parts, h, w, c).

    Raises:
      FloatingPointError: If one is not finite, or is not in half precision.
    """
    numbers = np.stack([mean] if std is None else [mean, std], axis=1)
    with np.errstate(over="ignore"):
        kept = numbers.astype("<f2")
    wrong = numbers[~np.isfinite(kept)]
    if wrong.size:
        raise FloatingPointError(
            f"{wrong.size} of the {numbers.size} numbers of its latent can't be kept in half "
            f"precision, which ends at {np.finfo(np.float16).max:.0f}, such as {wrong[0]:.5g}"
        )
    return kept


def write_shard(path: Path, examples: Iterable[tuple[np.ndarray, int | np.integer]]) -> None:
    """Writes a shard, whole or not at all.

    Args:
      path: See `shard_path`.
      examples: Numbers by `as_kept`, and the label.

    Raises:
      OSError: If it cannot be written.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    with partial_beside(path) as partial:
        # One record a group: they are read in any order.
        writer = ArrayRecordWriter(str(partial), "group_size:1")
        try:
            for numbers, label in examples:
                writer.write(np.array(label, "<i4").tobytes() + numbers.tobytes())
        finally:
            try:
                writer.close()
            except RuntimeError as error:
                raise OSError(f"cannot write {partial}: {error} (disk full?)") from error
