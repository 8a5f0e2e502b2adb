"""Labelled images with random access: what they are, the digits and tensorflow-datasets."""

import dataclasses
import functools
import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ant_jax.data.decoding import decode

Example = dict[str, Any]

# One bit for each of the digits: which are held out, as scikit-learn's
# train_test_split(range(1797), test_size=300, stratify=labels, random_state=0) draws them.
_HELD_OUT = (
    "000004883524104000064100934205001a00080100200028062c12001000940a0080111204005880020110a000"
    "080a8020441504480240a00a0000004000980000800020004805c400104000a0100005404800301000020ec009"
    "000024040083a8013c00a6980a0000000308400804a01808020240414000800400448436420102160044000040"
    "40a080180a5000840981618408108008000c00c02000068a000008820081003808038008190000100e01000010"
    "a02100322829004044c08028060102030002008822a2402c24042108a840809081200c02820242100138041500"
)


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
      records: The data source of the split, with images as the bytes of their files.
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
        """Decodes an image; see `Source` and `decode`.

        Raises:
          UnreadableImageError: If the record is damaged, or its image not one that `decode` takes.
        """
        # Damaged bytes surface as almost any type of error.
        try:
            record = self.records[index]
            image = decode(io.BytesIO(record["image"]), self.image_shape[-1])
        except Exception as error:
            raise UnreadableImageError(f"image {index} of {self.name}: {error}") from error
        label = record["label"] if self.num_classes else 0
        return {"image": image, "label": np.int32(label)}


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
    table = _digits_table()
    everything = np.arange(len(table))
    held_out = np.unpackbits(np.frombuffer(bytes.fromhex(_HELD_OUT), np.uint8), count=len(table))
    train, test = np.flatnonzero(held_out == 0), np.flatnonzero(held_out)
    splits = {"train": train, "test": test, "all": everything}
    if split not in splits:
        raise ValueError(f"digits has no split {split!r}; it has {', '.join(splits)}")
    chosen = splits[split]
    images = np.round(table[chosen, :-1] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    labels = table[chosen, -1].astype(np.int32)
    # Everybody gets the same arrays.
    images.flags.writeable = labels.flags.writeable = False
    return ArraySource(f"digits[{split}]", images, labels, 10)


def _digits_table():
    """(1797, 65): the 64 pixels of each digit and its label."""
    folder = importlib.util.find_spec("sklearn").submodule_search_locations[0]
    path = Path(folder, "datasets", "data", "digits.csv.gz")
    if path.exists():
        # Importing scikit-learn takes longer than the rest of what a run does with its data.
        return np.loadtxt(path, delimiter=",")
    from sklearn.datasets import load_digits

    raw = load_digits()
    return np.column_stack([raw.data, raw.target])


def from_tfds(builder_name: str, split: str, data_dir: str | None) -> TfdsSource:
    """Opens a split of a tensorflow-datasets builder; see `data.load`."""
    # Imported here: it takes a second that users of other data need not pay.
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
        # Its own decoder would open any format that Pillow knows.
        decoders = {"image": tfds.decode.SkipDecoding()}
        records = builder.as_data_source(split, decoders=decoders)
    except NotImplementedError as error:
        raise ValueError(
            f"{builder_name!r} in {builder.data_path} is not stored for random access: "
            f"in an empty data_dir, run {prepare}"
        ) from error
    except ValueError as error:
        raise ValueError(f"{builder_name!r} cannot read split {split!r}: {error}") from error
    num_classes = label.num_classes if isinstance(label, tfds.features.ClassLabel) else 0
    return TfdsSource(f"{builder_name}[{split}]", records, tuple(image.shape), num_classes)
