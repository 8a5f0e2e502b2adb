"""What a source of images is."""

import abc
from typing import Any

Example = dict[str, Any]


class UnreadableImageError(OSError):
    """An image that is damaged, or not of a kind that can be read; the message names it."""


class ExampleError(RuntimeError):
    """An example that could not be read or prepared; the message names it and says why."""


class Source(abc.ABC):
    """Labelled images with random access.

    Workers get a copy by cloudpickle, so what a source holds open it must open anew there.

    Attributes:
      name: What messages call it, such as "digits[train]".
      image_shape: (height, width, channels); None where the size varies from image to image.
      num_classes: Number of labels; 0 where the images have none, and the label then is always 0.
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

        The image is the same at each call: crops and flips come after it. 1, 3 or 4 channels can be
        cropped.

        Raises:
          UnreadableImageError: If the image is damaged; others may be taken in its place.
        """

    def facts(self) -> dict[str, Any]:
        """What a run records of its data, as JSON can hold it, and looks at when it goes on.

        A run refuses to go on with another value, but only warns of another "num_images". "classes"
        are the names of the labels in their order, where they have names.
        """
        return {
            "channels": self.image_shape[-1],
            "num_classes": self.num_classes,
            "num_images": len(self),
        }
