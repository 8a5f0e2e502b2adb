"""Data sets of tensorflow-datasets, read without TensorFlow.

They need an optional package: `pip install 'ant-jax[tfds]'`.
"""

import dataclasses
import io
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np

from ant_jax.data.decoding import decode
from ant_jax.data.source import Example, Source, UnreadableImageError
from ant_jax.runtime import extras
from ant_jax.runtime.files import user_path
from ant_jax.settings import Affects, Path


@dataclasses.dataclass(frozen=True, eq=False)
class TfdsSource(Source):
    """A split of a prepared tensorflow-datasets builder, read by random access.

    Attributes:
      name: Name in messages.
      records: The data source of the split; its images are the bytes of image files.
      image_shape: (height, width, channels); height and width are None if the size varies.
      num_classes: Number of classes; 0 if the builder has no class label.
      classes: Names of the classes, in the order of the labels; () if there are none.
    """

    name: str
    records: Sequence[Example] = dataclasses.field(repr=False)
    image_shape: tuple[int | None, int | None, int]
    num_classes: int
    classes: tuple[str, ...] = dataclasses.field(default=(), repr=False)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Example:
        """Decodes an image; see `Source` and `decode`.

        Raises:
          UnreadableImageError: If the record is damaged, or `decode` does not accept its image.
        """
        # Damaged bytes can raise almost any type of error.
        try:
            record = self.records[index]
            image = decode(io.BytesIO(record["image"]), self.image_shape[-1])
        except Exception as error:
            raise UnreadableImageError(f"image {index} of {self.name}: {error}") from error
        label = record["label"] if self.num_classes else 0
        return {"image": image, "label": np.int32(label)}

    def facts(self) -> dict[str, Any]:
        """See `Source`."""
        return super().facts() | ({"classes": list(self.classes)} if self.classes else {})


def tfds(
    split: str = "train", builder: str = "", dir: Annotated[Path, Affects.NOTHING] = ""
) -> TfdsSource:
    """A split of a tensorflow-datasets builder. Needs `pip install 'ant-jax[tfds]'`.

    Opens a builder that is prepared; downloads nothing.

    Args:
      split: A split of the builder, or a slice of one, such as "train[:90%]".
      builder: Name of the builder, such as "cifar10" or "imagenet_resized/64x64". It must have a
        uint8 "image" and may have a class "label". It must be prepared in a format with random
        access, such as array_record.
      dir: Folder in which tensorflow-datasets keeps its data; "" for its default.

    Returns:
      The source.

    Raises:
      FileNotFoundError: If the builder is not prepared in `dir`.
      MissingExtraError: If tensorflow-datasets is not installed.
      ValueError: If the builder or the split does not exist, if the builder has no usable image, or
        if it is not stored for random access.
    """
    if not builder:
        raise ValueError("set builder to the name of a tensorflow-datasets builder, as 'cifar10'")
    if error := extras.missing("tfds"):
        raise error
    # The import takes a second; users of other data need not pay it.
    import tensorflow_datasets as library

    data_dir = str(user_path(dir)) if dir else None
    try:
        # Any, because its annotations allow less than it does.
        opened: Any = library.builder(builder, data_dir=data_dir)
    except library.core.DatasetNotFoundError:
        # Not chained: the original message lists some hundred data sets.
        raise ValueError(f"tensorflow-datasets has no builder {builder!r}") from None
    prepare = (
        f"tfds.builder({builder!r}, data_dir={data_dir!r}, file_format='array_record')"
        ".download_and_prepare()"
    )
    if not opened.is_prepared():
        raise FileNotFoundError(
            f"{builder!r} is not prepared in {opened.data_path}: set dir to another folder, or run "
            f"{prepare}"
        )
    features = dict(opened.info.features)
    image = features.get("image")
    if not isinstance(image, library.features.Image) or image.np_dtype != np.uint8:
        raise ValueError(f"{builder!r} has no uint8 'image' feature, only {features}")
    try:
        # The decoder of tensorflow-datasets would open any format that Pillow supports.
        decoders = {"image": library.decode.SkipDecoding()}
        records = opened.as_data_source(split, decoders=decoders)
    except NotImplementedError as error:
        raise ValueError(
            f"{builder!r} in {opened.data_path} is not stored for random access: "
            f"set dir to an empty folder and run {prepare}"
        ) from error
    except ValueError as error:
        raise ValueError(f"{builder!r} cannot read split {split!r}: {error}") from error
    labelled = isinstance(features.get("label"), library.features.ClassLabel)
    num_classes = features["label"].num_classes if labelled else 0
    classes = tuple(features["label"].names) if labelled else ()
    shape = tuple(features["image"].shape)
    return TfdsSource(f"{builder}[{split}]", records, shape, num_classes, classes)
