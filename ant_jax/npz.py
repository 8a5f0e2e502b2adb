"""Reads arrays of `.npz` files from others, in parts.

The caller gets the shape and type of an array before any of it is unpacked, because a few
compressed bytes can stand for any number of zeros. Python objects are refused, so no code in a file
is run.
"""

import contextlib
import io
import math
import os
import zipfile
from collections.abc import Iterator
from typing import IO, NamedTuple

import numpy as np

_MOST_HEADER = 10_000  # bytes, NumPy's own limit


class Header(NamedTuple):
    """The header of an array in NumPy's format."""

    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype

    def __str__(self):
        return f"{self.dtype} {self.shape}"


@contextlib.contextmanager
def opened(path: str | os.PathLike) -> Iterator[zipfile.ZipFile]:
    """Opens an archive; an error inside the ``with`` block becomes a ValueError naming the file.

    Raises:
      ValueError: If the block raises an error, or the file is not an archive.
      OSError: If the file can't be opened.
    """
    with open(path, "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                yield archive
        except Exception as error:  # Damaged bytes cause almost any type of error.
            foreign = "not a zip file" in str(error)
            said = "it is damaged, or not an .npz file" if foreign else error
            raise ValueError(f"{os.fspath(path)} cannot be used: {said}") from error


def has(archive: zipfile.ZipFile, name: str) -> bool:
    """Whether an archive has an array of this name."""
    return f"{name}.npy" in archive.namelist()


def listing(archive: zipfile.ZipFile) -> str:
    """The first names in an archive, for error messages."""
    names = archive.namelist()
    return f"{names[:5]}{' ...' if len(names) > 5 else ''}"


@contextlib.contextmanager
def member(archive: zipfile.ZipFile, name: str) -> Iterator[tuple[IO[bytes], Header]]:
    """Opens an array at its first number, and gives its header.

    The size of the array has been checked against its header, so a caller that accepts the shape
    may read it.

    Raises:
      ValueError: If there is no such array, or it is not in NumPy's format.
    """
    if not has(archive, name):
        raise ValueError(f"it has no {name!r} but {listing(archive)}")
    info = archive.getinfo(f"{name}.npy")
    # NumPy writes only these two. Others may need any amount of memory to unpack.
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name!r} is not compressed as NumPy does it")
    with archive.open(info) as file:
        header = _header(file, name)
        size, there = math.prod(header.shape) * header.dtype.itemsize, info.file_size - file.tell()
        if size != there:
            raise ValueError(f"{name!r} has {there} bytes instead of the {size} of {header}")
        yield file, header


def content(file: IO[bytes], header: Header) -> np.ndarray:
    """Reads the next numbers of an array, as many as the header's shape has.

    Returns:
      A read-only array.

    Raises:
      ValueError: If fewer numbers are left.
    """
    size = math.prod(header.shape) * header.dtype.itemsize
    numbers = file.read(size)
    if len(numbers) < size:
        raise ValueError("it ends too early")
    array = np.frombuffer(numbers, header.dtype)
    return array.reshape(header.shape, order="F" if header.fortran_order else "C")


def _header(file, name):
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"{name!r} has the unknown format {version}")
    length = file.read(2 if version == (1, 0) else 4)
    text = file.read(min(int.from_bytes(length, "little"), _MOST_HEADER))
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }[version]
    header = Header(*read(io.BytesIO(length + text)))
    if header.dtype.hasobject:
        raise ValueError(f"{name!r} has objects of Python, {header}, which are not read")
    return header
