"""A folder of JPEG, PNG or WebP images, with or without a subfolder per class."""

import contextlib
import dataclasses
import os
from typing import Annotated, Any, get_args

import numpy as np

from ant_jax.data.decoding import Exif, decode, open_regular
from ant_jax.data.source import (
    Example,
    Source,
    UnreadableImageError,
    fingerprint,
    sampled,
)
from ant_jax.runtime.files import user_path
from ant_jax.settings import Affects, Path

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


@dataclasses.dataclass(frozen=True, eq=False)
class FolderSource(Source):
    """Image files, read on access.

    Attributes:
      name: The folder; its name in messages.
      paths: bytes (n,), the files' paths relative to the folder, sorted. An array of bytes takes a
        third of the memory of as many strings, in each worker.
      labels: int32 (n,), the index of each file's class; all 0 without classes.
      classes: Names of the class folders, sorted; empty without classes.
      exif: "apply" applies the orientation in the EXIF metadata; "ignore" does not.
      image_shape: (None, None, 3): sizes vary.
      num_classes: Number of class folders.
    """

    name: str
    paths: np.ndarray = dataclasses.field(repr=False)
    labels: np.ndarray = dataclasses.field(repr=False)
    classes: tuple[str, ...] = dataclasses.field(repr=False)
    exif: Exif = dataclasses.field(default="ignore", repr=False)
    num_classes: int = dataclasses.field(init=False, repr=False)

    image_shape = None, None, 3

    def __post_init__(self):
        object.__setattr__(self, "num_classes", len(self.classes))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Example:
        """Decodes an image; see `Source`.

        As in ADM, so that statistics are comparable: grey images become RGB, an alpha channel is
        dropped without blending, and the EXIF orientation is ignored, unless `exif` is "apply".

        Raises:
          UnreadableImageError: If the file is not a complete image of 8 bits a channel, or has more
            pixels than `decoding.MAX_PIXELS`.
        """
        path = self._path(index)
        try:
            with open_regular(path) as file:
                image = decode(file, exif=self.exif)
        # Damaged bytes can raise almost any type of error.
        except Exception as error:
            raise UnreadableImageError(f"{path}: {error}") from error
        return {"image": image, "label": self.labels[index]}

    def facts(self) -> dict[str, Any]:
        """See `Source`."""
        # The sizes, because folders of different images often have the same names.
        sizes = [self._size(index) for index in sampled(len(self))]
        found = fingerprint(self.paths.tobytes(), str(sizes).encode())
        return super().facts() | {"classes": list(self.classes), "fingerprint": found}

    def _path(self, index):
        return os.path.join(self.name, os.fsdecode(bytes(self.paths[index])))

    def _size(self, index):
        with contextlib.suppress(OSError):
            return os.path.getsize(self._path(index))
        return -1


def folder(
    split: str = "",
    dir: Annotated[Path, Affects.NOTHING] = "",
    exif: Exif = "ignore",
) -> FolderSource:
    """Opens a folder of images.

    If the images are in subfolders, at any depth, each direct subfolder is a class. If all images
    are in the folder itself, there are no classes. Other kinds of files, and files and folders
    whose name begins with a dot, are skipped. Links are followed, but no folder counts twice in a
    class, and links to the folder itself or to a folder above it are skipped.

    Args:
      split: Subfolder with the images of the split, as in DIR/train/CLASS/*.jpg; "" for all images
        of the folder.
      dir: Path of the folder.
      exif: "ignore" leaves images as they are stored, as ADM does, so that statistics are
        comparable; "apply" applies the orientation in the EXIF metadata.

    Returns:
      The source; files and classes are sorted by name.

    Raises:
      FileNotFoundError: If the folder does not exist.
      OSError: If a folder below it cannot be read.
      ValueError: If the path is empty, if the folder or one of its classes has no image, if there
        are images beside the class folders, or if exif is unknown.
    """
    if not dir:
        raise ValueError("set dir to the path of a folder of images")
    if exif not in get_args(Exif):
        raise ValueError(f"unknown exif {exif!r}; use one of {', '.join(get_args(Exif))}")
    root = user_path(dir) / split
    if not user_path(dir).is_dir():
        raise FileNotFoundError(f"there is no folder {dir}")
    if not root.is_dir():
        raise FileNotFoundError(
            f"{dir} has no subfolder {split!r}; split = '' takes all images of the folder"
        )
    top, loose = _list(root)
    classes = [name for name in top if not name.startswith(".")]
    if not classes:
        return _source(root, [loose], (), exif)
    above = {_identity(place) for place in (root, *root.resolve().parents)}
    found = [_images_below(root, name, above) for name in classes]
    if not any(found):
        return _source(root, [loose], (), exif)
    if loose:
        raise ValueError(
            f"{root} has both images ({loose[0]}, ...) and folders of images ({classes[0]}, ...): "
            "move the images into a class folder, or move all images into one folder"
        )
    empty = [name for name, paths in zip(classes, found, strict=True) if not paths]
    if empty:
        raise ValueError(f"{root} has class folders without an image: {', '.join(empty[:5])}")
    return _source(root, found, tuple(classes), exif)


def _source(root, groups, classes, exif):
    paths = [path for group in groups for path in group]
    if not paths:
        raise ValueError(f"{root} has no image with the suffix {', '.join(_SUFFIXES)}")
    labels = np.repeat(np.arange(len(groups), dtype=np.int32), [len(group) for group in groups])
    names = np.array([os.fsencode(path) for path in paths])
    return FolderSource(str(root), names, labels, classes, exif)


def _images_below(root, name, above):
    """Paths of the images of a class, relative to the root, sorted."""
    paths, seen, to_visit = [], set(above), [name]
    while to_visit:
        relative = to_visit.pop()
        identity = _identity(root / relative)
        if identity in seen:
            continue
        seen.add(identity)
        folders, images = _list(root / relative)
        # Of several links to a folder, the first by name counts.
        to_visit += [
            os.path.join(relative, each) for each in reversed(folders) if not each.startswith(".")
        ]
        paths += [os.path.join(relative, image) for image in images]
    return sorted(paths)


def _identity(place):
    status = os.stat(place)
    return status.st_dev, status.st_ino


def _list(place):
    """Names of the subfolders and of the images of a folder, sorted."""
    folders, images = [], []
    with os.scandir(place) as entries:
        for entry in entries:
            if _is(entry.is_dir):
                folders.append(entry.name)
            elif _is_image(entry.name) and (
                # A broken link counts as an image, so that it is reported as unreadable.
                _is(entry.is_file) or not os.path.exists(entry.path)
            ):
                images.append(entry.name)
    return sorted(folders), sorted(images)


def _is(test):
    # A link to itself raises an error; it is neither a file nor a folder.
    with contextlib.suppress(OSError):
        return test()
    return False


def _is_image(name):
    return name.lower().endswith(_SUFFIXES) and not name.startswith(".")
