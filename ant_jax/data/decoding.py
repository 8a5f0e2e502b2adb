"""Decodes JPEG, PNG and WebP files, and no others, in bounded memory."""

import contextlib
import os
import stat
from collections.abc import Iterator
from typing import BinaryIO, Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

# Pillow opens some forty more formats; for one of them it starts an external program.
_FORMATS = ("JPEG", "PNG", "WEBP")
# Pillow converts these to 8 bits a channel without loss.
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
_CHANNELS = {1: "L", 3: "RGB", 4: "RGBA"}

MAX_PIXELS = 2**27
# Pillow fails on much longer rows.
_MAX_SIDE = 2**20
# Even uncompressed, the largest allowed image has a smaller file.
_MAX_BYTES = 4 * MAX_PIXELS

Exif = Literal["ignore", "apply"]
_ORIENTATION, _UPRIGHT = 0x0112, 1
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
    """Opens a regular file; a pipe or a device, which could block, is an error.

    Raises:
      OSError: If the file cannot be opened.
      ValueError: If it is not a regular file, or larger than any image that `decode` accepts.
    """
    # The flag keeps the opening of a pipe or a device from blocking.
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("not a regular file")
        if status.st_size > _MAX_BYTES:
            raise ValueError(f"{status.st_size} bytes: an image may have at most {_MAX_BYTES}")
        yield file


def decode(file: BinaryIO, channels: int = 3, exif: Exif = "ignore") -> np.ndarray:
    """Decodes the first image of a JPEG, PNG or WebP file.

    Uses at most 22 bytes of memory per pixel, 3 GB for the largest allowed image, whatever the
    header claims.

    Args:
      file: The file, positioned at its beginning.
      channels: Channels of the result: 1, 3 or 4. Other images are converted; an alpha channel is
        dropped, not blended.
      exif: "apply" applies the orientation in the EXIF metadata; "ignore" does not.

    Returns:
      uint8 (height, width, channels).

    Raises:
      Exception: Of almost any type, if the bytes are damaged or of another format, or if the image
        has more than `MAX_PIXELS` pixels or more than 8 bits a channel.
    """
    try:
        # Reads only the header. Pillow checks the size of a WebP canvas before allocating it.
        picture = Image.open(file, formats=_FORMATS)
    except UnidentifiedImageError:
        raise ValueError("damaged, or not a JPEG, PNG or WebP file") from None
    with picture:
        if max(picture.size) > _MAX_SIDE or picture.width * picture.height > MAX_PIXELS:
            raise ValueError(
                f"{picture.width}x{picture.height} pixels: an image may have at most {MAX_PIXELS} "
                f"pixels, and {_MAX_SIDE} on a side"
            )
        if picture.mode not in _MODES:
            raise ValueError(f"{picture.mode} pixels: convert it to 8 bits a channel")
        picture.load()
        turn = _TURNS.get(_orientation(picture)) if exif == "apply" else None
        mode = _CHANNELS[channels]
        # Pillow copies the image even if the mode is the same.
        plain = picture if picture.mode == mode else picture.convert(mode)
        image = np.asarray(plain if turn is None else plain.transpose(turn))
    return image.reshape(*image.shape[:2], channels)


def _orientation(picture: Image.Image) -> int:
    try:
        return picture.getexif().get(_ORIENTATION, _UPRIGHT)
    # Damaged metadata counts as no metadata: the pixels are intact.
    except Exception:
        return _UPRIGHT
