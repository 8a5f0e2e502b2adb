"""Images as `.npz` files in the layout of the field.

The layout is that of the evaluations of Dhariwal & Nichol, *Diffusion Models Beat GANs*, 2021
(github.com/openai/guided-diffusion): images `arr_0`, and labels `arr_1` where there are some. The
reference batches there also hold statistics; see `evaluation.read_statistics`.
"""

import contextlib
import math
import os
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import numpy as np

from ant_jax import npz
from ant_jax.runtime import files

IMAGES = "arr_0"
_LABELS = "arr_1"
_AT_ONCE = 1 << 28  # bytes of images


def num_samples(path: str | os.PathLike) -> int:
    """How many images `read_samples` finds in a file.

    Raises:
      ValueError: If the file is damaged or has no such images.
      OSError: If it cannot be opened.
    """
    with npz.opened(path) as archive, npz.member(archive, IMAGES) as (_, header):
        return _checked_images(header)[0]


def has_images(path: str | os.PathLike) -> bool:
    """Whether a file has an array `arr_0`, whatever is in it.

    Raises:
      ValueError: If the file is damaged.
      OSError: If it cannot be opened.
    """
    with npz.opened(path) as archive:
        return npz.has(archive, IMAGES)


def read_samples(
    path: str | os.PathLike, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Reads images batch by batch, with no more than a few batches in memory.

    Args:
      path: An `.npz` file, compressed or not, with uint8 images `arr_0` (n, height, width,
        channels). It may have integer labels `arr_1` (n,).
      batch_size: Images of a batch. The last batch may have fewer. So may all batches, if the
        images are so large that a batch would take more than 256 MB.

    Yields:
      Images, read-only, and their int64 labels or None.

    Raises:
      ValueError: If the batch size is not positive, or the file is damaged or has no such images.
        Shapes and types are checked before the first batch. Damage to the images is found when
        their batch is read.
      OSError: If it cannot be opened.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be positive, got {batch_size}")
    with npz.opened(path) as archive, contextlib.ExitStack() as stack:
        file, header = stack.enter_context(npz.member(archive, IMAGES))
        shape = _checked_images(header)
        labels = None
        if npz.has(archive, _LABELS):
            labels = stack.enter_context(npz.member(archive, _LABELS))
            _check_labels(labels[1], shape[0])
        count = min(batch_size, max(1, _AT_ONCE // math.prod(shape[1:])))
        for start in range(0, shape[0], count):
            part = min(count, shape[0] - start)
            images = npz.content(file, header._replace(shape=(part, *shape[1:])))
            if labels is None:
                yield images, None
            else:
                label_file, label_header = labels
                some = npz.content(label_file, label_header._replace(shape=(part,)))
                yield images, some.astype(np.int64)


def write_samples(
    path: str | os.PathLike,
    batches: Iterable[tuple[np.ndarray, np.ndarray | None]],
    num_samples: int,
) -> None:
    """Writes images as `read_samples` reads them, with one batch in memory at a time.

    The file appears only when it is complete. It is not compressed, because images hardly shrink.

    Args:
      path: Of the `.npz` file to write.
      batches: Pairs of uint8 images (n, height, width, channels) and integer labels (n,), or None
        in every pair.
      num_samples: Number of images of all batches. The file states it before the images.

    Raises:
      ValueError: If the images or labels have other types or shapes, or there are more or fewer
        images than `num_samples`.
      OSError: If the file cannot be written.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be positive, got {num_samples}")
    labels = []
    shape = None
    count = 0
    with files.writing(Path(path)) as file, zipfile.ZipFile(file, "w") as archive:
        with archive.open(f"{IMAGES}.npy", "w", force_zip64=True) as member:
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


def _check_labels(labels, count):
    """Checks shape and type of labels: an array, or the header of one."""
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        raise ValueError(
            f"{count} images need as many integer labels, got {labels.dtype} {labels.shape}"
        )


def _checked_images(header: npz.Header) -> tuple[int, ...]:
    shape = header.shape
    if header.dtype != np.uint8 or len(shape) != 4 or min(shape) < 1:
        raise ValueError(
            f"{IMAGES!r} must be uint8 images (n, height, width, channels), got {header}"
        )
    if header.fortran_order:
        raise ValueError(f"{IMAGES!r} is in Fortran order: save np.ascontiguousarray of it")
    if math.prod(shape[1:]) > _AT_ONCE:
        raise ValueError(
            f"{IMAGES!r} has images of {math.prod(shape[1:])} bytes each, more than {_AT_ONCE}"
        )
    return shape


def _write_header(file: IO[bytes], shape: tuple[int, ...]) -> None:
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
