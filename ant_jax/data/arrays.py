"""Images in memory: NumPy arrays, or an .npz file of them."""

import dataclasses
import zipfile
from typing import Annotated, Any

import numpy as np

from ant_jax.data.source import Example, Source, fingerprint, sampled
from ant_jax.runtime.files import user_path
from ant_jax.settings import Affects, Path


@dataclasses.dataclass(frozen=True, eq=False)
class ArraySource(Source):
    """Images that are NumPy arrays.

    Attributes:
      images: uint8 (n, height, width, channels).
      labels: Integers (n,) from 0; None if the images have no labels.
      name: Name of the source in messages.
      num_classes: Number of classes; by default one more than the largest label.
      classes: Names of the classes, in the order of the labels; () if they are not known.

    Raises:
      ValueError: If the arrays have other types or shapes, or a label is out of range.
    """

    images: np.ndarray = dataclasses.field(repr=False)
    # The two that are None by default are not None once the source is made.
    labels: np.ndarray = dataclasses.field(default=None, repr=False)  # pyright: ignore[reportAssignmentType]
    name: str = "arrays"
    num_classes: int = None  # pyright: ignore[reportAssignmentType]
    classes: tuple[str, ...] = ()

    def __post_init__(self):
        images = np.asarray(self.images)
        labels: np.ndarray | None = self.labels
        num_classes: int | None = self.num_classes
        if images.dtype != np.uint8 or images.ndim != 4:
            raise ValueError(
                f"images of {self.name} must be uint8 (n, height, width, channels), got "
                f"{images.dtype} {images.shape}"
            )
        unlabelled = labels is None
        labels = np.zeros(len(images), np.int32) if labels is None else np.asarray(labels)
        if not np.issubdtype(labels.dtype, np.integer) or labels.shape != (len(images),):
            raise ValueError(
                f"labels of {self.name} must be {len(images)} integers, one for each image, got "
                f"{labels.dtype} {labels.shape}"
            )
        # Unsigned types have no -1, the maximum of no labels.
        labels = labels.astype(np.int64)
        if num_classes is None:
            num_classes = 0 if unlabelled else int(labels.max(initial=-1)) + 1
        wrong = np.flatnonzero((labels < 0) | (labels >= max(num_classes, 1)))
        if wrong.size:
            raise ValueError(
                f"labels of {self.name} must be 0 .. {num_classes - 1}, got {labels[wrong[0]]} for "
                f"image {wrong[0]}"
            )
        if self.classes and len(self.classes) != num_classes:
            raise ValueError(
                f"classes of {self.name} must be {num_classes} names, got {len(self.classes)}"
            )
        for name, value in (
            ("images", images),
            ("labels", labels.astype(np.int32)),
            ("num_classes", num_classes),
        ):
            object.__setattr__(self, name, value)

    @property
    def image_shape(self):  # pyright: ignore[reportIncompatibleVariableOverride]
        """(height, width, channels)."""
        return self.images.shape[1:]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Example:
        """An image and its label; see `Source`."""
        return {"image": self.images[index], "label": self.labels[index]}

    def facts(self) -> dict[str, Any]:
        """See `Source`."""
        some = self.images[sampled(len(self))]
        found = fingerprint(self.labels.tobytes(), some.tobytes())
        classes = {"classes": list(self.classes)} if self.classes else {}
        return super().facts() | {"fingerprint": found} | classes


def arrays(split: str = "train", file: Annotated[Path, Affects.NOTHING] = "") -> ArraySource:
    """Reads one split of an .npz file of images into memory.

    Args:
      split: Which arrays to read. Split "train" is the arrays "train_images", uint8 (n, height,
        width, channels) or (n, height, width), and, optional, "train_labels", integers (n,) or
        (n, 1), as in the files of MedMNIST. Split "" is the arrays "images" and "labels".
      file: Path of the .npz file.

    Returns:
      The source.

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: If the path is empty, the file is damaged or lacks the split, or its arrays are
        not images and labels as above.
    """
    if not file:
        raise ValueError("set file to the path of an .npz file")
    with user_path(file).open("rb") as content:
        if not zipfile.is_zipfile(content):
            raise ValueError(f"{file} is damaged, or not an .npz file, which numpy.savez writes")
    try:
        with np.load(user_path(file), allow_pickle=False) as stored:
            found = {name: stored[name] for name in _names(split) if name in stored}
            others = list(stored)
    # Damaged bytes can raise almost any type of error.
    except Exception as error:
        objects = "allow_pickle" in str(error)
        said = "it has objects of Python; save arrays of numbers" if objects else error
        raise ValueError(f"{file} can't be read: {said}") from error
    images, labels = map(found.get, _names(split))
    if images is None:
        raise ValueError(
            f"{file} has no array {_names(split)[0]!r}, only: {', '.join(others) or 'none'}"
        )
    if images.ndim == 3:
        images = images[..., None]
    if labels is not None and labels.shape[1:] == (1,):
        labels = labels[:, 0]
    return ArraySource(images, labels, f"{file}[{split}]")  # pyright: ignore[reportArgumentType]


def _names(split):
    prefix = f"{split}_" if split else ""
    return f"{prefix}images", f"{prefix}labels"
