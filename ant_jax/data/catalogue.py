"""Sources by name."""

from ant_jax.data.folder import folder
from ant_jax.data.sources import Source, digits, from_tfds


def load(name: str, split: str, data_dir: str | None = None, exif: str = "ignore") -> Source:
    """Opens a source by name.

    Args:
      name: "digits", "folder" for a folder of images (see `folder`), or "tfds:BUILDER" for any
        tensorflow-datasets builder with a uint8 "image" and, optionally, a class "label" (e.g.
        "tfds:cifar10"). It must have been prepared in a random-access format such as array_record;
        nothing is downloaded here.
      split: A split of that source; for tensorflow-datasets also a slice such as "train[:90%]".
      data_dir: The folder, or where tensorflow-datasets keeps its data; None is its own default.
      exif: Of a folder; see there.

    Returns:
      The source.

    Raises:
      FileNotFoundError: If there is no such folder, or the dataset is not prepared in data_dir.
      ValueError: If there is no such source, builder or split, if the dataset has no usable image
        or is not stored for random access, or if the folder has no images.
    """
    kind, _, builder_name = name.partition(":")
    if name == "digits":
        return digits(split)
    if name == "folder":
        if not data_dir:
            raise ValueError("a folder of images needs its path")
        return folder(data_dir, split, exif)
    if kind == "tfds" and builder_name:
        return from_tfds(builder_name, split, data_dir)
    raise ValueError(f"unknown source {name!r}; use 'digits', 'folder' or 'tfds:BUILDER'")
