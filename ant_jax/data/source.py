"""The interface of an image source."""

import abc
import hashlib
from typing import Any

import numpy as np

Example = dict[str, Any]


class UnreadableImageError(OSError):
    """An image is damaged or of an unsupported kind; the message names it."""


class ExampleError(RuntimeError):
    """An example could not be read or prepared; the message names it and the cause."""


_SAMPLED = 8


def sampled(size: int) -> np.ndarray:
    """Indices of a few images, spread over all, whose content a `fingerprint` has."""
    return np.unique(np.linspace(0, size - 1, _SAMPLED, dtype=int)) if size else np.zeros(0, int)


def fingerprint(*parts: bytes) -> str:
    """A short hash by which a run notices that its images are others than before."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:16]


class Source(abc.ABC):
    """Labelled images with random access.

    Each worker gets a copy by cloudpickle, so a source with open files must be able to reopen them
    after unpickling.

    Attributes:
      name: Name in messages, such as "digits[train]".
      image_shape: (height, width, channels); height and width are None if the size varies.
      num_classes: Number of classes; 0 for images without labels, whose label is then always 0.
    """

    name: str
    image_shape: tuple[int | None, int | None, int]
    num_classes: int

    @abc.abstractmethod
    def __len__(self) -> int:
        """Number of images."""

    @abc.abstractmethod
    def __getitem__(self, index: int) -> Example:
        """Returns {"image": uint8 (height, width, channels), "label": int32 ()}.

        The image must be the same on every call: the pipeline crops and flips it afterwards. It can
        crop images of 1, 3 or 4 channels.

        Raises:
          UnreadableImageError: If the image is damaged; the pipeline may replace it by another.
        """

    def facts(self) -> dict[str, Any]:
        """Facts that a run records of its data, as values for JSON, and compares when it resumes.

        If a fact has changed, the run does not resume; for "num_images" and "fingerprint" it only
        warns. "classes", optional, are the names of the classes in the order of the labels.
        "fingerprint", optional, tells two sets of images apart; see `fingerprint`.
        """
        return {
            "channels": self.image_shape[-1],
            "num_classes": self.num_classes,
            "num_images": len(self),
        }
