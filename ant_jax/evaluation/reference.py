"""Batches of images, and statistics of features, as `.npz` files that others read and write too.

The layout is that of the evaluations of Dhariwal & Nichol, *Diffusion Models Beat GANs*, 2021
(github.com/openai/guided-diffusion): images `arr_0` and perhaps labels `arr_1`, statistics `mu`,
`sigma`, `mu_s`, `sigma_s`. Their reference batches hold statistics of a whole data set, and 10 000
of its images.
"""

import contextlib
import io
import math
import os
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from ant_jax.evaluation.moments import Gaussian
from ant_jax.runtime import files

_IMAGES = "arr_0"
_LABELS = "arr_1"
# By the name of the output; see `ant_jax.evaluation`.
_STATISTICS = {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
# What a file may ask for is bounded, whatever it claims: a few compressed bytes can stand for any
# number of zeros.
_MOST_FEATURES = 4096  # twice Inception's
_MOST_HEADER = 10_000  # bytes; NumPy itself reads no longer ones
_AT_ONCE = 1 << 28  # bytes of images


def read_statistics(path: str | os.PathLike) -> dict[str, Gaussian]:
    """Reads the statistics of a file.

    Args:
      path: An `.npz` file with `mu` (d,) and `sigma` (d, d), perhaps also `mu_s` and `sigma_s`.

    Returns:
      The statistics of the "features" and perhaps the "spatial" ones; none where the file has only
      images. Of Inception these are the 2048 pool features, for the FID, and 2023 for the sFID.

    Raises:
      ValueError: If the file is damaged, has neither statistics nor images, or the statistics are
        not finite floating-point numbers of these shapes, or of more than 4096 features.
      OSError: If it cannot be opened.
    """
    with _open(path) as archive:
        names = archive.namelist()
        has = lambda pair: any(f"{name}.npy" in names for name in pair)
        there = [output for output, pair in _STATISTICS.items() if has(pair)]
        if not there:
            if f"{_IMAGES}.npy" not in names:
                raise ValueError(f"it has neither {_IMAGES!r} nor 'mu' but {_shortened(names)}")
            return {}
        # Without those of the features a file is no reference of anybody's.
        return {
            output: _gaussian(archive, _STATISTICS[output])
            for output in _STATISTICS
            if output in there or output == "features"
        }


def num_samples(path: str | os.PathLike) -> int:
    """How many images `read_samples` finds in a file.

    Raises:
      ValueError: If the file is damaged or has no such images.
      OSError: If it cannot be opened.
    """
    with _open(path) as archive, _member(archive, _IMAGES) as (_, header):
        return _checked_images(header)[0]


def has_images(path: str | os.PathLike) -> bool:
    """Whether a file has what `read_samples` reads, or what is meant to be that.

    Raises:
      ValueError: If the file is damaged.
      OSError: If it cannot be opened.
    """
    with _open(path) as archive:
        return f"{_IMAGES}.npy" in archive.namelist()


def read_samples(
    path: str | os.PathLike, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Reads images batch by batch: no more than a few batches of a file are ever in memory.

    Args:
      path: An `.npz` file, compressed or not, with uint8 images `arr_0` (n, height, width,
        channels), and perhaps their integer labels `arr_1` (n,).
      batch_size: Images of a batch; the last one may have fewer, and all where they are so large
        that as many would take more than 256 MB.

    Yields:
      Images, read-only, and their labels or None.

    Raises:
      ValueError: If the batch size is not positive, or the file is damaged or has no such images.
        Shapes and types are checked before the first batch; damage further on shows on the way.
      OSError: If it cannot be opened.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be positive, got {batch_size}")
    with _open(path) as archive, contextlib.ExitStack() as stack:
        file, header = stack.enter_context(_member(archive, _IMAGES))
        shape = _checked_images(header)
        labels = None
        if f"{_LABELS}.npy" in archive.namelist():
            labels, label_header = stack.enter_context(_member(archive, _LABELS))
            _check_labels(label_header, shape[0])
        count = min(batch_size, max(1, _AT_ONCE // math.prod(shape[1:])))
        for start in range(0, shape[0], count):
            part = min(count, shape[0] - start)
            images = _content(file, header._replace(shape=(part, *shape[1:])))
            if labels is None:
                yield images, None
            else:
                some = _content(labels, label_header._replace(shape=(part,)))
                yield images, some.astype(np.int64)


def write_samples(
    path: str | os.PathLike,
    batches: Iterable[tuple[np.ndarray, np.ndarray | None]],
    num_samples: int,
) -> None:
    """Writes images as `read_samples` reads them, one batch in memory at a time.

    The file is whole or not there. It is not compressed: images hardly shrink.

    Args:
      path: Where to; an `.npz` file.
      batches: Pairs of uint8 images (n, height, width, channels) and integer labels (n,), or None
        in every pair.
      num_samples: Number of images of all batches; it stands at the start of the file.

    Raises:
      ValueError: If the images or labels have other types or shapes, or are not so many.
      OSError: If the file cannot be written.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be positive, got {num_samples}")
    labels = []
    shape = None
    count = 0
    with files.writing(Path(path)) as file, zipfile.ZipFile(file, "w") as archive:
        with archive.open(f"{_IMAGES}.npy", "w", force_zip64=True) as member:
            for images, batch_labels in batches:
                images = np.ascontiguousarray(images)
                if images.dtype != np.uint8 or images.ndim != 4 or images.size == 0:
                    raise ValueError(
                        "images must be non-empty uint8 (n, height, width, channels), got "
                        f"{images.dtype} {images.shape}"
                    )
                if shape is None:
                    shape = images.shape[1:]
                    _write_header(member, (num_samples, *shape))
                if images.shape[1:] != shape:
                    raise ValueError(f"images of shape {images.shape[1:]} came after {shape}")
                count += len(images)
                if count > num_samples:
                    raise ValueError(f"the batches have more than {num_samples} images")
                member.write(images.data)
                if batch_labels is not None:
                    labels.append(np.asarray(batch_labels))
                    _check_labels(labels[-1], len(images))
        if count < num_samples:
            raise ValueError(f"the batches have only {count} of {num_samples} images")
        if labels:
            every = np.concatenate(labels).astype(np.int64)
            _check_labels(every, count)
            with archive.open(f"{_LABELS}.npy", "w") as member:
                np.lib.format.write_array(member, every, allow_pickle=False)


@contextlib.contextmanager
def _open(path: str | os.PathLike) -> Iterator[zipfile.ZipFile]:
    with open(path, "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                yield archive
        except Exception as error:  # Damaged bytes surface as almost any type of error.
            raise ValueError(f"{os.fspath(path)} cannot be used: {error}") from error


class _Header(NamedTuple):
    shape: tuple[int, ...]
    fortran_order: bool
    dtype: np.dtype

    def __str__(self):
        return f"{self.dtype} {self.shape}"


@contextlib.contextmanager
def _member(archive: zipfile.ZipFile, name: str) -> Iterator[tuple[BinaryIO, _Header]]:
    """The file of an array, at the first of its numbers, and what its header says.

    Its shape fits the size that the archive states: whoever has checked the shape may read.
    """
    if f"{name}.npy" not in archive.namelist():
        raise ValueError(f"it has no {name!r} but {_shortened(archive.namelist())}")
    info = archive.getinfo(f"{name}.npy")
    # What NumPy writes. Others may ask for any memory to be unpacked.
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name!r} is compressed in another way than NumPy does")
    with archive.open(info) as file:
        header = _header(file, name)
        size, there = math.prod(header.shape) * header.dtype.itemsize, info.file_size - file.tell()
        if size != there:
            raise ValueError(f"{name!r} has {there} bytes instead of the {size} of {header}")
        yield file, header


def _header(file, name):
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"{name!r} has the unknown format {version}")
    length = file.read(2 if version == (1, 0) else 4)
    content = file.read(min(int.from_bytes(length, "little"), _MOST_HEADER))
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }[version]
    header = _Header(*read(io.BytesIO(length + content)))
    if header.dtype.hasobject:
        raise ValueError(f"{name!r} has objects of Python, {header}, which are not read")
    return header


def _content(file, header):
    """The next numbers of an array's file, as many as a shape needs."""
    size = math.prod(header.shape) * header.dtype.itemsize
    content = file.read(size)
    if len(content) < size:
        raise ValueError("it ends too early")
    array = np.frombuffer(content, header.dtype)
    return array.reshape(header.shape, order="F" if header.fortran_order else "C")


def _gaussian(archive: zipfile.ZipFile, names: tuple[str, str]) -> Gaussian:
    with _member(archive, names[0]) as (_, mean), _member(archive, names[1]) as (_, cov):
        width = math.prod(mean.shape)
        _check_gaussian(names, mean, cov)
    if width > _MOST_FEATURES:
        raise ValueError(f"{names[0]!r} is of {width} features, more than {_MOST_FEATURES}")
    arrays = []
    for name in names:
        with _member(archive, name) as (file, header):
            arrays.append(_content(file, header))
    return _checked(names, *arrays)


def _check_gaussian(names, mean, cov):
    """Checks shapes and types, of arrays or of what headers say."""
    size = math.prod(mean.shape)
    if size == 0 or mean.shape != (size,) or cov.shape != (size, size):
        raise ValueError(
            f"{names[0]!r} and {names[1]!r} must be (d,) and (d, d), got {mean.shape} and "
            f"{cov.shape}"
        )
    for name, array in zip(names, (mean, cov), strict=True):
        if array.dtype.kind != "f":
            raise ValueError(f"{name!r} must be floating-point numbers, got {array.dtype}")


def _checked(names: tuple[str, str], mean: np.ndarray, cov: np.ndarray) -> Gaussian:
    _check_gaussian(names, mean, cov)
    for name, array in zip(names, (mean, cov), strict=True):
        if not np.isfinite(array).all():
            raise ValueError(f"{name!r} has numbers that are not finite")
    return Gaussian(mean.astype(np.float64), cov.astype(np.float64))


def _check_labels(labels, count):
    """Checks shape and type, of an array or of what a header says."""
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        raise ValueError(
            f"{count} images need as many integer labels, got {labels.dtype} {labels.shape}"
        )


def _checked_images(header: _Header) -> tuple[int, ...]:
    shape = header.shape
    if header.dtype != np.uint8 or len(shape) != 4 or min(shape) < 1:
        raise ValueError(
            f"{_IMAGES!r} must be uint8 images (n, height, width, channels), got {header}"
        )
    if header.fortran_order:
        raise ValueError(f"{_IMAGES!r} is in Fortran order; save np.ascontiguousarray of it")
    if math.prod(shape[1:]) > _AT_ONCE:
        raise ValueError(f"{_IMAGES!r} has images of {math.prod(shape[1:])} bytes each")
    return shape


def _shortened(names):
    return f"{names[:5]}{' ...' if len(names) > 5 else ''}"


def _write_header(file: BinaryIO, shape: tuple[int, ...]) -> None:
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
