"""A folder of JPEG, PNG or WebP images, with or without a subfolder for each class."""

import dataclasses
import os
from pathlib import Path

import numpy as np
from PIL import Image

from ant_jax.data.sources import Example, UnreadableImageError

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
# What Pillow turns into 8 bits for each of red, green and blue without losing any.
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")


@dataclasses.dataclass(frozen=True, eq=False)
class FolderSource:
    """Image files that are read when they are asked for.

    Attributes:
      name: The folder, as error messages call it.
      paths: bytes (n,), the files' paths relative to the folder, sorted. An array of bytes takes a
        third of the memory of as many strings, in each of the workers.
      labels: int32 (n,), the index of the file's class; all 0 without classes.
      classes: Names of the class folders, sorted; empty without classes.
    """

    name: str
    paths: np.ndarray = dataclasses.field(repr=False)
    labels: np.ndarray = dataclasses.field(repr=False)
    classes: tuple[str, ...] = dataclasses.field(repr=False)

    @property
    def image_shape(self) -> tuple[None, None, int]:
        """(None, None, 3): sizes vary."""
        return None, None, 3

    @property
    def num_classes(self) -> int:
        """Number of class folders."""
        return len(self.classes)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Example:
        """Decodes an image; see `Source`.

        Grey images become RGB, an alpha channel is dropped, and the orientation that a camera noted
        is not looked at, all as in ADM, so that statistics compare.

        Raises:
          UnreadableImageError: If the file is not a whole image of 8 bits a channel.
        """
        path = os.path.join(self.name, os.fsdecode(bytes(self.paths[index])))
        try:
            with Image.open(path) as picture:
                if picture.mode not in _MODES:
                    raise ValueError(f"{picture.mode} pixels: convert it to 8 bits a channel")
                image = np.asarray(picture.convert("RGB"))
        # Damaged bytes surface as almost any type of error.
        except Exception as error:
            raise UnreadableImageError(f"{path}: {error}") from error
        return {"image": image, "label": self.labels[index]}


def folder(directory: str | os.PathLike, split: str) -> FolderSource:
    """Opens a folder of images.

    If images lie in subfolders, at any depth, each subfolder of the folder is a class; if they all
    lie in the folder itself, there are no classes. Files of other kinds, and files and folders
    whose name begins with a dot, are passed over.

    Args:
      directory: The folder.
      split: Name of a subfolder that holds the images of the split, as in DIR/train/CLASS/*.jpg;
        "" for all images of the folder.

    Returns:
      The source; files and classes are in the order of their names.

    Raises:
      FileNotFoundError: If there is no such folder.
      ValueError: If there is no image in it or in one of its classes, or if some images lie beside
        the class folders.
    """
    root = Path(directory).expanduser() / split
    if not root.is_dir():
        hint = "; use split '' if the images have no folder for the split" if split else ""
        raise FileNotFoundError(f"no folder {root}{hint}")
    top = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    classes = [name for name in top if not name.startswith(".")]
    loose = sorted(
        entry.name for entry in os.scandir(root) if entry.is_file() and _is_image(entry.name)
    )
    if not classes:
        return _source(root, [loose], ())
    found = [_images_below(root, name) for name in classes]
    if not any(found):
        return _source(root, [loose], ())
    if loose:
        raise ValueError(
            f"{root} has both images ({loose[0]}, ...) and folders of images ({classes[0]}, ...): "
            "move the former into a class folder, or all into one folder"
        )
    empty = [name for name, paths in zip(classes, found, strict=True) if not paths]
    if empty:
        raise ValueError(f"{root}: no image in the class folder(s) {', '.join(empty[:5])}")
    return _source(root, found, tuple(classes))


def _source(root, groups, classes):
    paths = [path for group in groups for path in group]
    if not paths:
        raise ValueError(f"{root} has no image; looked for {', '.join(_SUFFIXES)}")
    labels = np.repeat(np.arange(len(groups), dtype=np.int32), [len(group) for group in groups])
    return FolderSource(str(root), np.array([os.fsencode(path) for path in paths]), labels, classes)


def _images_below(root, name):
    paths = []
    for place, folders, files in os.walk(root / name, followlinks=True):
        folders[:] = [each for each in folders if not each.startswith(".")]
        relative = os.path.relpath(place, root)
        paths += [os.path.join(relative, file) for file in files if _is_image(file)]
    return sorted(paths)


def _is_image(name):
    return name.lower().endswith(_SUFFIXES) and not name.startswith(".")
