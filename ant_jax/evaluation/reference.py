"""Batches of images and statistics of features, as `.npz` files that others read and write too.

The layout is that of the evaluations of Dhariwal & Nichol, *Diffusion Models Beat GANs*, 2021
(github.com/openai/guided-diffusion): images `arr_0` and perhaps labels `arr_1`, statistics `mu`,
`sigma`, `mu_s`, `sigma_s`. Their reference batches hold statistics of a whole data set, and 10 000
of its images.
"""

import contextlib
import math
import os
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from ant_jax import files

_IMAGES = "arr_0"
_LABELS = "arr_1"
_POOL = ("mu", "sigma")
_SPATIAL = ("mu_s", "sigma_s")


class Gaussian(NamedTuple):
    """What `frechet_distance` compares: `frechet_distance(*a, *b)`.

    Attributes:
      mean: (d,) float64.
      cov: (d, d) float64, the unbiased covariance, as `covariance` gives it.
    """

    mean: np.ndarray
    cov: np.ndarray


class Statistics(NamedTuple):
    """The statistics of a set of images.

    Attributes:
      pool: Of Inception's 2048 pool features, for the FID.
      spatial: Of the 2023 spatial features for the sFID (Nash et al., *Generating Images with
        Sparse Representations*, 2021): the first 7 channels of the 17 x 17 positions of the layer
        `mixed_6/conv`, in the order height, width, channel. None where they are not known.
    """

    pool: Gaussian
    spatial: Gaussian | None = None


def read_statistics(path: str | os.PathLike) -> Statistics | None:
    """Reads the statistics of a file.

    Args:
      path: An `.npz` file with `mu` (d,) and `sigma` (d, d), perhaps also `mu_s` and `sigma_s`.

    Returns:
      The statistics; None where the file has only images.

    Raises:
      ValueError: If the file is damaged, has neither statistics nor images, or the statistics are
        not finite floating-point numbers of these shapes.
      OSError: If it cannot be opened.
    """
    with _open(path) as archive:
        names = archive.namelist()
        if not any(f"{name}.npy" in names for name in (*_POOL, *_SPATIAL)):
            if f"{_IMAGES}.npy" not in names:
                raise ValueError(f"it has neither {_IMAGES!r} nor 'mu' but {names}")
            return None
        spatial = any(f"{name}.npy" in names for name in _SPATIAL)
        return Statistics(
            _checked(_POOL, *(_array(archive, name) for name in _POOL)),
            _checked(_SPATIAL, *(_array(archive, name) for name in _SPATIAL)) if spatial else None,
        )


def write_statistics(path: str | os.PathLike, statistics: Statistics, **others: np.ndarray) -> None:
    """Writes statistics as `read_statistics` reads them; the file is whole or not there.

    Args:
      path: Where to; an `.npz` file.
      statistics: Of a set of images.
      **others: Further arrays of the file by name.

    Raises:
      ValueError: If they are not finite floating-point numbers of fitting shapes.
      OSError: If the file cannot be written.
    """
    arrays = dict(zip(_POOL, _checked(_POOL, *statistics.pool), strict=True))
    if statistics.spatial is not None:
        arrays |= dict(zip(_SPATIAL, _checked(_SPATIAL, *statistics.spatial), strict=True))
    with files.writing(Path(path)) as file:
        np.savez(file, **arrays, **others)


def num_samples(path: str | os.PathLike) -> int:
    """How many images `read_samples` finds in a file.

    Raises:
      ValueError: If the file is damaged or has no such images.
      OSError: If it cannot be opened.
    """
    with _open(path) as archive, _member(archive, _IMAGES) as file:
        return _image_shape(file)[0]


def read_samples(
    path: str | os.PathLike, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Reads images batch by batch: no more than a few batches of a file are ever in memory.

    Args:
      path: An `.npz` file, compressed or not, with uint8 images `arr_0` (n, height, width,
        channels), and perhaps their integer labels `arr_1` (n,).
      batch_size: Images of a batch; the last one may have fewer.

    Yields:
      Images, read-only, and their labels or None.

    Raises:
      ValueError: If the batch size is not positive, or the file is damaged or has no such images.
        Shapes and types are checked before the first batch; damage further on shows on the way.
      OSError: If it cannot be opened.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be positive, got {batch_size}")
    with _open(path) as archive:
        labels = _array(archive, _LABELS) if f"{_LABELS}.npy" in archive.namelist() else None
        with _member(archive, _IMAGES) as file:
            shape = _image_shape(file)
            if labels is not None:
                labels = _checked_labels(labels, shape[0])
            for start in range(0, shape[0], batch_size):
                count = min(batch_size, shape[0] - start)
                size = count * math.prod(shape[1:])
                content = file.read(size)
                if len(content) < size:
                    raise ValueError(f"{_IMAGES!r} ends before its {shape[0]} images do")
                images = np.frombuffer(content, np.uint8).reshape(count, *shape[1:])
                yield images, None if labels is None else labels[start : start + count]
            # The checksum is verified only here.
            if file.read(1):
                raise ValueError(f"{_IMAGES!r} goes on after its {shape[0]} images")


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
                    labels.append(_checked_labels(np.asarray(batch_labels), len(images)))
        if count < num_samples:
            raise ValueError(f"the batches have only {count} of {num_samples} images")
        if labels:
            with archive.open(f"{_LABELS}.npy", "w") as member:
                np.lib.format.write_array(
                    member, _checked_labels(np.concatenate(labels), count), allow_pickle=False
                )


@contextlib.contextmanager
def _open(path: str | os.PathLike) -> Iterator[zipfile.ZipFile]:
    with open(path, "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                yield archive
        except Exception as error:  # Damaged bytes surface as almost any type of error.
            raise ValueError(f"{os.fspath(path)} cannot be used: {error}") from error


def _member(archive: zipfile.ZipFile, name: str) -> zipfile.ZipExtFile:
    if f"{name}.npy" not in archive.namelist():
        raise ValueError(f"it has no {name!r} but {archive.namelist()}")
    return archive.open(f"{name}.npy")


def _array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with _member(archive, name) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def _checked(names: tuple[str, str], mean: np.ndarray, cov: np.ndarray) -> Gaussian:
    if mean.size == 0 or mean.shape != (mean.size,) or cov.shape != (mean.size, mean.size):
        raise ValueError(
            f"{names[0]!r} and {names[1]!r} must be (d,) and (d, d), got {mean.shape} and "
            f"{cov.shape}"
        )
    for name, array in zip(names, (mean, cov), strict=True):
        if array.dtype.kind != "f":
            raise ValueError(f"{name!r} must be floating-point numbers, got {array.dtype}")
        if not np.isfinite(array).all():
            raise ValueError(f"{name!r} has numbers that are not finite")
    return Gaussian(mean.astype(np.float64), cov.astype(np.float64))


def _checked_labels(labels: np.ndarray, count: int) -> np.ndarray:
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        raise ValueError(
            f"{count} images need as many integer labels, got {labels.dtype} {labels.shape}"
        )
    return labels.astype(np.int64)


def _image_shape(file: BinaryIO) -> tuple[int, ...]:
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        header = np.lib.format.read_array_header_1_0(file)
    elif version == (2, 0):
        header = np.lib.format.read_array_header_2_0(file)
    else:
        raise ValueError(f"{_IMAGES!r} has the unknown format {version}")
    shape, fortran_order, dtype = header
    if dtype != np.uint8 or len(shape) != 4 or min(shape) < 1:
        raise ValueError(
            f"{_IMAGES!r} must be uint8 images (n, height, width, channels), got {dtype} {shape}"
        )
    if fortran_order:
        raise ValueError(f"{_IMAGES!r} is in Fortran order; save np.ascontiguousarray of it")
    return shape


def _write_header(file: BinaryIO, shape: tuple[int, ...]) -> None:
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
