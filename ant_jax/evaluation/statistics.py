"""Statistics of features as `.npz` files in the layout of the field.

The layout is that of the evaluations of Dhariwal & Nichol, *Diffusion Models Beat GANs*, 2021
(github.com/openai/guided-diffusion): `mu`, `sigma`, `mu_s` and `sigma_s`. Their reference batches
hold the statistics of a whole data set, and 10 000 of its images as `sampling.read_samples` reads
them.
"""

import math
import os
import zipfile

import numpy as np

from ant_jax import npz
from ant_jax.evaluation.moments import Gaussian
from ant_jax.sampling.files import IMAGES

# By the name of the output; see `ant_jax.evaluation`.
_STATISTICS = {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
# The memory that a file can ask for is bounded.
_MOST_FEATURES = 4096  # twice Inception's


def read_statistics(path: str | os.PathLike) -> dict[str, Gaussian]:
    """Reads the statistics of a file.

    Args:
      path: An `.npz` file with `mu` (d,) and `sigma` (d, d). It may also have `mu_s` and `sigma_s`.

    Returns:
      The statistics of "features", and of "spatial" where the file has them. Empty if the file has
      only images. For Inception, "features" are the 2048 pool features of the FID, and "spatial"
      the 2023 of the sFID.

    Raises:
      ValueError: If the file is damaged, has neither statistics nor images, or the statistics are
        not finite floating-point numbers of these shapes, or are of more than 4096 features.
      OSError: If it cannot be opened.
    """
    with npz.opened(path) as archive:
        there = [
            output
            for output, pair in _STATISTICS.items()
            if any(npz.has(archive, name) for name in pair)
        ]
        if not there:
            if not npz.has(archive, IMAGES):
                raise ValueError(f"it has neither {IMAGES!r} nor 'mu' but {npz.listing(archive)}")
            return {}
        # A file with statistics must have those of "features".
        return {
            output: _gaussian(archive, _STATISTICS[output])
            for output in _STATISTICS
            if output in there or output == "features"
        }


def _gaussian(archive: zipfile.ZipFile, names: tuple[str, str]) -> Gaussian:
    with npz.member(archive, names[0]) as (_, mean), npz.member(archive, names[1]) as (_, cov):
        width = math.prod(mean.shape)
        _check_gaussian(names, mean, cov)
    if width > _MOST_FEATURES:
        raise ValueError(f"{names[0]!r} has {width} features, more than {_MOST_FEATURES}")
    arrays = []
    for name in names:
        with npz.member(archive, name) as (file, header):
            arrays.append(npz.content(file, header))
    return _checked(names, *arrays)


def _check_gaussian(names, mean, cov):
    """Checks shapes and types, of arrays or of their headers."""
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
