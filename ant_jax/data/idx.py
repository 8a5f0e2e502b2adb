"""Images in the file format of MNIST, such as MNIST, Fashion-MNIST, KMNIST and EMNIST.

The format is described at http://yann.lecun.com/exdb/mnist/: two zero bytes, a byte for the type (8
for unsigned bytes), a byte for the number of axes, the length of each axis as a big-endian 32-bit
integer, and the data.
"""

import gzip
import math
import struct
import zlib
from typing import Annotated

import numpy as np

from ant_jax.data.arrays import ArraySource
from ant_jax.runtime.files import user_path
from ant_jax.settings import Affects, Integer, Path

_SPLITS = {"train": "train", "test": "t10k"}
_UNSIGNED_BYTES = 8
# More than any set in this format; a damaged length must not take all memory.
_MOST_BYTES = 1 << 32


def idx(
    split: str = "train",
    dir: Annotated[Path, Affects.NOTHING] = "",
    pad: Annotated[int, Integer(0, 64)] = 0,
) -> ArraySource:
    """Reads one split of a folder in the file format of MNIST into memory.

    The folder has ``train-images-idx3-ubyte`` and ``train-labels-idx1-ubyte``, and the same with
    ``t10k`` for the test images; each may be compressed, with the ending ``.gz``.

    Args:
      split: "train" or "test".
      dir: the folder.
      pad: number of black pixels to add on each side: 2 makes images of 28x28 those of 32x32.

    Returns:
      The source.

    Raises:
      FileNotFoundError: If a file is missing.
      ValueError: If there is no such split, the folder is not set, or a file is damaged.
    """
    if split not in _SPLITS:
        raise ValueError(f"idx has no split {split!r}; it has {', '.join(_SPLITS)}")
    if not dir:
        raise ValueError("set dir to the folder of the files")
    images = _read(dir, f"{_SPLITS[split]}-images-idx3-ubyte", 3)
    labels = _read(dir, f"{_SPLITS[split]}-labels-idx1-ubyte", 1)
    if len(images) != len(labels):
        raise ValueError(f"{dir} has {len(images)} images and {len(labels)} labels of {split!r}")
    images = np.pad(images, ((0, 0), (pad, pad), (pad, pad)))[..., None]
    return ArraySource(images, labels, f"{dir}[{split}]")


def _read(folder, name, axes):
    """An array of unsigned bytes from a file, compressed or not."""
    plain = user_path(folder) / name
    path = plain if plain.exists() else plain.with_name(f"{name}.gz")
    if not path.exists():
        raise FileNotFoundError(f"{folder} has neither {name} nor {name}.gz")
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            shape = _shape(file.read(4 + 4 * axes), axes)
            size = math.prod(shape)
            content = file.read(size + 1)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if len(content) != size:
        more = "more" if len(content) > size else f"only {len(content)}"
        raise ValueError(f"{path} is damaged: it has {more} than the {size} bytes of {shape}")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _shape(header, axes):
    if len(header) < 4 + 4 * axes or header[:4] != bytes([0, 0, _UNSIGNED_BYTES, axes]):
        raise ValueError(f"it does not begin as unsigned bytes with {axes} axes do")
    shape = struct.unpack(f">{axes}I", header[4:])
    if math.prod(shape) > _MOST_BYTES:
        raise ValueError(f"its lengths {shape} are those of more than {_MOST_BYTES >> 30} GiB")
    return shape
