"""Labelled images with random access: what they are, the digits and tensorflow-datasets."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

Example = dict[str, Any]


class UnreadableImageError(OSError):
    """An image that is damaged, or not of a kind that can be read; the message names it."""


class ExampleError(RuntimeError):
    """An example that could not be read or prepared; the message names it and says why."""


class Source(Protocol):
    """Labelled images with random access."""

    @property
    def image_shape(self) -> tuple[int | None, int | None, int]:
        """(height, width, channels); None where the size varies from image to image."""
        ...

    @property
    def num_classes(self) -> int:
        """Number of labels; 0 where the images have none, and the label then is always 0."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example:
        """Returns {"image": uint8 (height, width, channels), "label": int32 ()}.

        Raises:
          UnreadableImageError: If the image is damaged.
        """
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class ArraySource:
    """A source held in memory.

    Attributes:
      name: What error messages call the source.
      images: uint8 (n, height, width, channels).
      labels: int32 (n,).
      num_classes: Number of labels.
    """

    name: str
    images: np.ndarray = dataclasses.field(repr=False)
    labels: np.ndarray = dataclasses.field(repr=False)
    num_classes: int

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels)."""
        return self.images.shape[1:]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Example:
        return {"image": self.images[index], "label": self.labels[index]}


@dataclasses.dataclass(frozen=True, eq=False)
class TfdsSource:
    """A split of a prepared tensorflow-datasets builder, read by random access.

    Attributes:
      name: What error messages call the source.
      records: The data source of the split.
      image_shape: (height, width, channels); None where the size varies.
      num_classes: Number of labels; 0 where the builder has no class label.
    """

    name: str
    records: Sequence[Example] = dataclasses.field(repr=False)
    image_shape: tuple[int | None, int | None, int]
    num_classes: int

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Example:
        record = self.records[index]
        label = record["label"] if self.num_classes else 0
        return {"image": record["image"], "label": np.int32(label)}


@functools.cache
def digits(split: str) -> ArraySource:
    """The 1797 real 8x8 digits that come with scikit-learn (Alpaydin & Kaynak, 1998).

    Their values 0..16 are scaled to 0..255. The test images are a stratified draw that depends on
    no seed of an experiment, so that all experiments hold out the same ones.

    Args:
      split: "train" (1497 images), "test" (300) or "all".

    Returns:
      Images of shape (8, 8, 1) in 10 classes.

    Raises:
      ValueError: If there is no such split.
    """
    # Imported here, as in `from_tfds`: each takes a second that users of the other need not pay.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    raw = load_digits()
    everything = np.arange(len(raw.target))
    train, test = train_test_split(
        everything, test_size=300, stratify=raw.target, shuffle=True, random_state=0
    )
    splits = {"train": np.sort(train), "test": np.sort(test), "all": everything}
    if split not in splits:
        raise ValueError(f"digits has no split {split!r}; it has {', '.join(splits)}")
    chosen = splits[split]
    images = np.round(raw.images[chosen] * (255 / 16)).astype(np.uint8)[..., None]
    labels = raw.target[chosen].astype(np.int32)
    # Everybody gets the same arrays.
    images.flags.writeable = labels.flags.writeable = False
    return ArraySource(f"digits[{split}]", images, labels, 10)


def from_tfds(builder_name: str, split: str, data_dir: str | None) -> TfdsSource:
    """Opens a split of a tensorflow-datasets builder; see `data.load`."""
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder(builder_name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError:
        # Not chained: the original lists some hundred datasets.
        raise ValueError(f"tensorflow-datasets has no builder {builder_name!r}") from None
    prepare = (
        f"tfds.builder({builder_name!r}, data_dir={data_dir!r}, file_format='array_record')"
        ".download_and_prepare()"
    )
    if not builder.is_prepared():
        raise FileNotFoundError(
            f"{builder_name!r} is not prepared in {builder.data_path}: "
            f"set data_dir, or run {prepare}"
        )
    features = dict(builder.info.features)
    image, label = features.get("image"), features.get("label")
    if not isinstance(image, tfds.features.Image) or image.np_dtype != np.uint8:
        raise ValueError(f"{builder_name!r} has no uint8 'image' feature; it has {features}")
    try:
        records = builder.as_data_source(split)
    except NotImplementedError as error:
        raise ValueError(
            f"{builder_name!r} in {builder.data_path} is not stored for random access: "
            f"in an empty data_dir, run {prepare}"
        ) from error
    except ValueError as error:
        raise ValueError(f"{builder_name!r} cannot read split {split!r}: {error}") from error
    num_classes = label.num_classes if isinstance(label, tfds.features.ClassLabel) else 0
    return TfdsSource(f"{builder_name}[{split}]", records, tuple(image.shape), num_classes)
