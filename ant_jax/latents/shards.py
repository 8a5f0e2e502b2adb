"""Latents of images on disk: ArrayRecord shards, and a JSON file that describes them.

A folder of latents has `latents.json`, which is `LatentInfo`, and `00000.array_record`, ... A
record is the label, int32, followed by a float16 array (views, parts, h, w, c), all little-endian.
The two views are the image and its mirror image. The two parts are the mean and the standard
deviation of each number; there is only the mean if the standard deviations are zero.
"""

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from ant_jax.data.source import Example, Source, UnreadableImageError
from ant_jax.runtime.files import partial_beside, write_bytes
from ant_jax.settings import check_integer

_INFO = "latents.json"
_SHARD_NAME = re.compile(r"[0-9]{5,}\.array_record")
_LABEL_BYTES = 4
_SPREAD_IMAGES = 1000


class LatentInfo(NamedTuple):
    """The description of a folder of latents.

    Attributes:
      autoencoder: name of the autoencoder.
      digest: hash of the encoder's weights.
      image_size: side of the images in pixels.
      shape: (h, w, c) of a latent.
      parts: 2 for mean and standard deviation, 1 for the mean only.
      num_images: number of images.
      num_classes: number of classes; 0 for images without labels.
      std: standard deviation over all numbers of sampled latents.
      data: `config.data.name` of the images.
      crop: `config.data.crop` of the images.
      origin: where the images come from, as information for people.
      exif: `config.data.exif` of the images.
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
    # Older folders of latents have no such entry.
    exif: str = "ignore"


@dataclasses.dataclass(frozen=True, eq=False)
class LatentSource(Source):
    """Latents, read on access and multiplied by a scale.

    Attributes:
      name: The folder; its name in messages.
      info: Its description.
      scale: Factor of the means and standard deviations.
      records: The records of all shards, in order.
      image_shape: (h, w, c).
      num_classes: Number of classes.
    """

    name: str
    info: LatentInfo = dataclasses.field(repr=False)
    scale: float
    records: Sequence[bytes] = dataclasses.field(repr=False)
    image_shape: tuple[int | None, int | None, int] = dataclasses.field(init=False, repr=False)
    num_classes: int = dataclasses.field(init=False, repr=False)

    def __post_init__(self):
        object.__setattr__(self, "image_shape", self.info.shape)
        object.__setattr__(self, "num_classes", self.info.num_classes)

    def __len__(self) -> int:
        return self.info.num_images

    def __getitem__(self, index: int) -> Example:
        """Returns {"mean", "std": float32 (2, h, w, c), "label": int32 ()}; axis 0 is the views.

        Raises:
          UnreadableImageError: If the record is damaged, its numbers are not finite, or its label
            is not the index of a class.
        """
        shape = (2, self.info.parts, *self.info.shape)
        try:
            record = self.records[index]
            numbers = np.frombuffer(record, "<f2", offset=_LABEL_BYTES).reshape(shape)
        # Damaged bytes can raise almost any type of error.
        except Exception as error:
            raise UnreadableImageError(f"latent {index} of {self.name}: {error}") from error
        scaled = numbers.astype(np.float32) * np.float32(self.scale)
        label = np.frombuffer(record, "<i4", count=1)[0]
        # Without these checks the loss would not be finite, and would look like a training problem.
        if not np.isfinite(scaled).all():
            raise UnreadableImageError(
                f"latent {index} of {self.name} has numbers that are not finite: encode into "
                "another folder"
            )
        if not 0 <= label < max(self.num_classes, 1):
            raise UnreadableImageError(
                f"latent {index} of {self.name} has label {label}, but there are "
                f"{self.num_classes} classes"
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
      scale: Factor that gives the latents about unit variance.

    Returns:
      The source.

    Raises:
      FileNotFoundError: If the folder has no latents, or is not complete yet.
      ValueError: If the description or a shard is damaged, or if there are too few or too many
        shards.
    """
    directory = Path(directory).expanduser()
    path = directory / _INFO
    if not path.is_file():
        raise FileNotFoundError(
            f"{directory} has no latents, or is not complete yet: run --mode encode"
        )
    try:
        info = _checked(LatentInfo(**json.loads(path.read_text())))
    # Deeply nested JSON raises a RecursionError.
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}; run --mode encode to rewrite it") from error
    return _open(directory, info, scale)


def _checked(info):
    """The description, if its values are valid."""
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
    """Writes the description of a folder that has all its shards.

    Args:
      directory: The folder.
      info: The description; its `std` is ignored and estimated from the first latents.

    Returns:
      The description as written.

    Raises:
      ValueError: If a shard is damaged, if the shards hold another number of latents, or if all
        numbers of the latents are equal.
      UnreadableImageError: If a latent can't be used; see `LatentSource`.
    """
    info = info._replace(std=_spread(_open(directory, info, 1.0)))
    if info.std == 0:
        raise ValueError(f"all numbers of the latents in {directory} are equal")
    write_bytes(directory / _INFO, (json.dumps(info._asdict(), indent=1) + "\n").encode())
    return info


def _open(directory, info, scale):
    # Skips files that Finder and network disks add, such as ._00000.array_record.
    shards = [path for path in directory.iterdir() if _SHARD_NAME.fullmatch(path.name)]
    shards.sort(key=lambda path: int(path.stem))
    records = _records(shards) if shards else []
    if len(records) != info.num_images:
        missing = len(records) < info.num_images
        add = "run --mode encode to add the missing shards"
        again = "encode again into an empty folder"
        raise ValueError(
            f"{directory} has {len(records)} latents in {len(shards)} shards instead of "
            f"{info.num_images}: {add if missing else again}"
        )
    return LatentSource(str(directory), info, scale, records)


def _records(shards) -> Sequence[bytes]:
    from grain.sources import ArrayRecordDataSource

    try:
        # Its base class has no types.
        return cast("Sequence[bytes]", ArrayRecordDataSource([str(shard) for shard in shards]))
    except RuntimeError:
        # The message does not name the damaged shard.
        for shard in shards:
            try:
                ArrayRecordDataSource(str(shard))
            except RuntimeError as error:
                raise ValueError(
                    f"{shard} is damaged: remove it and run --mode encode to make it again "
                    f"({error})"
                ) from error
        raise


def _spread(source):
    """Standard deviation of all numbers of sampled latents, from the first latents."""
    squares = total = count = 0.0
    for index in range(min(_SPREAD_IMAGES, len(source))):
        mean, std = (np.float64(source[index][part]) for part in ("mean", "std"))
        squares += np.sum(mean**2 + std**2)
        total += np.sum(mean)
        count += mean.size
    return float(np.sqrt(squares / count - (total / count) ** 2))


def shard_path(directory: Path, shard: int) -> Path:
    """The path of a shard."""
    return directory / f"{shard:05d}.array_record"


def as_kept(mean: np.ndarray, std: np.ndarray | None) -> np.ndarray:
    """The array of a record.

    Args:
      mean: (2, h, w, c), of an image and its mirror image.
      std: Standard deviations of the same shape, or None if they are zero.

    Returns:
      Little-endian float16 (2, parts, h, w, c).

    Raises:
      FloatingPointError: If a number is not finite, or too large for float16.
    """
    numbers = np.stack([mean] if std is None else [mean, std], axis=1)
    with np.errstate(over="ignore"):
        kept = numbers.astype("<f2")
    wrong = numbers[~np.isfinite(kept)]
    if wrong.size:
        raise FloatingPointError(
            f"{wrong.size} of the {numbers.size} numbers of its latent, such as {wrong[0]:.5g}, "
            f"are not finite in float16 (largest number {np.finfo(np.float16).max:.0f})"
        )
    return kept


def write_shard(path: Path, examples: Iterable[tuple[np.ndarray, int | np.integer]]) -> None:
    """Writes a shard; if that fails, no partial shard remains.

    Args:
      path: See `shard_path`.
      examples: For each image the array from `as_kept` and the label.

    Raises:
      OSError: If the shard cannot be written.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    with partial_beside(path) as partial:
        # One record per group, because records are read in random order.
        writer = ArrayRecordWriter(str(partial), "group_size:1")
        try:
            for numbers, label in examples:
                writer.write(np.array(label, "<i4").tobytes() + numbers.tobytes())
        finally:
            try:
                writer.close()
            except RuntimeError as error:
                raise OSError(f"cannot write {partial}: {error} (disk full?)") from error
