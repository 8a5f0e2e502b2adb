"""JPEG, PNG and WebP files to pixels: no other kind is opened, and memory is bounded."""

import contextlib
import os
import stat
from collections.abc import Iterator
from typing import BinaryIO, Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

# Pillow knows some forty more; one of them starts a program.
_FORMATS = ("JPEG", "PNG", "WEBP")
# What Pillow turns into 8 bits for each of red, green and blue without losing any.
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
_CHANNELS = {1: "L", 3: "RGB", 4: "RGBA"}

MAX_PIXELS = 2**27
# Pillow itself can't handle lines much longer.
_MAX_SIDE = 2**20
# A file of so many pixels is smaller, even without compression.
_MAX_BYTES = 4 * MAX_PIXELS

Exif = Literal["ignore", "apply"]
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@contextlib.contextmanager
def open_regular(path: str) -> Iterator[BinaryIO]:
    """Opens a file, but nothing that could be waited for, such as a pipe.

    Raises:
      OSError: If it cannot be opened.
      ValueError: If it is no regular file, or larger than any image that `decode` takes.
    """
    # The flag matters to pipes and devices alone.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file")
        if status.st_size > _MAX_BYTES:
            raise ValueError(f"{status.st_size} bytes: an image may have {_MAX_BYTES}")
        yield file


def decode(file: BinaryIO, channels: int = 3, exif: Exif = "ignore") -> np.ndarray:
    """Decodes the first picture of a JPEG, PNG or WebP file.

    Takes at most 22 bytes of memory a pixel, 3 GB for the largest image, whatever the file says.

    Args:
      file: The file, at its beginning.
      channels: 1, 3 or 4, to which others are brought; an alpha channel is dropped, not blended.
      exif: "apply" turns the picture as the camera noted that it is to be shown.

    Returns:
      uint8 (height, width, channels).

    Raises:
      Exception: Of almost any type, if the bytes are damaged or of another format, if the image has
        more than `MAX_PIXELS` pixels, or more than 8 bits a channel.
    """
    try:
        # Reads the header alone. Pillow checks the size of a WebP canvas before allocating it.
        picture = Image.open(file, formats=_FORMATS)
    except UnidentifiedImageError:
        raise ValueError("damaged, or not a JPEG, PNG or WebP file") from None
    with picture:
        if max(picture.size) > _MAX_SIDE or picture.width * picture.height > MAX_PIXELS:
            raise ValueError(
                f"{picture.width}x{picture.height} pixels: an image may have {MAX_PIXELS}, and "
                f"{_MAX_SIDE} a side"
            )
        if picture.mode not in _MODES:
            raise ValueError(f"{picture.mode} pixels: convert it to 8 bits a channel")
        picture.load()
        turn = _TURNS.get(_orientation(picture)) if exif == "apply" else None
        mode = _CHANNELS[channels]
        # Converting to the same mode would copy.
        plain = picture if picture.mode == mode else picture.convert(mode)
        image = np.asarray(plain if turn is None else plain.transpose(turn))
    return image.reshape(*image.shape[:2], channels)


def _orientation(picture):
    try:
        return picture.getexif().get(_ORIENTATION)
    # A damaged note is as none; the picture itself is whole.
    except Exception:
        return None
