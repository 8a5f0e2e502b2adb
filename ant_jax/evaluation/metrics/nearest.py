"""Distances to the nearest real image."""

import numpy as np

from ant_jax.evaluation.metrics import Metric

# Bounds the memory: one block of distances, and one of either set as float64.
_BLOCK = 1024


def nearest() -> Metric:
    """``nearest_train_distance`` and ``copies``: whether samples repeat training images.

    The first is the mean Euclidean distance to the nearest real image, in pixel values scaled to
    [0, 1]. If it is below ``real_nearest_train_distance``, that of held-out images, the samples
    repeat training images (compare Meehan, Chaudhuri & Dasgupta, *A Non-Parametric Test to Detect
    Data-Copying in Generative Models*, 2020) or are too smooth. Then a low Frechet distance may not
    mean good samples.

    The second is the share of samples that are at least as near to a real image as the nearest 1 %
    of the held-out images. It is about 0.01 for a perfect generator. It is absent if there are no
    held-out images.

    Figures:
      nearest_train_distance: mean Euclidean distance from a sample to the nearest real image, of at
        most 10 000 | pixel values of 0 to 1 | 0 to the root of the number of values of an image |
        near `real_nearest_train_distance`; below it, samples repeat training images or are too
        smooth
      copies: samples that are as near to a real image as the nearest 1 % of the held-out images |
        share | 0 to 1 | about 0.01; above it, samples repeat training images or are too smooth
    """

    def measure(samples, reference):
        real, held_out = reference.summary.kept["pixels"], reference.held_out
        distances = nearest_distances(samples.kept["pixels"], real)
        figures = {"nearest_train_distance": float(distances.mean())}
        if held_out is not None:
            threshold = np.percentile(nearest_distances(held_out.kept["pixels"], real), 1)
            # Not <: if 1 % of the held-out images are exact copies, the threshold is 0.
            figures["copies"] = float(np.mean(distances <= threshold))
        return figures

    pixels = frozenset({"pixels"})
    return Metric(
        measure, samples=pixels, real=pixels, floors=frozenset({"nearest_train_distance"})
    )


def nearest_distances(images: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Returns each image's Euclidean distance to the nearest reference.

    The expansion |a - b|^2 = |a|^2 - 2 ab + |b|^2 is computed block by block. It loses no digits
    here, because pixels are integers, and float64 adds their products without rounding (below
    2^53). So the squared distances are exact, and an image that is among the references has the
    distance 0.

    Args:
      images: uint8 (n, height, width, channels).
      references: uint8 (m, height, width, channels).

    Returns:
      (n,) float64 distances, in pixel values scaled to [0, 1].

    Raises:
      ValueError: If the images are not uint8, have wrong or different shapes, or a set is empty.
    """
    for name, array in (("images", images), ("references", references)):
        if array.dtype != np.uint8 or array.ndim != 4 or array.size == 0:
            raise ValueError(
                f"{name} must be non-empty uint8 (n, height, width, channels), got {array.dtype} "
                f"{array.shape}"
            )
    if images.shape[1:] != references.shape[1:]:
        raise ValueError(
            f"images have the shape {images.shape[1:]}, but references have the shape "
            f"{references.shape[1:]}"
        )
    nearest = np.full(len(images), np.inf)
    for i in range(0, len(images), _BLOCK):
        a = _rows(images[i : i + _BLOCK])
        for j in range(0, len(references), _BLOCK):
            b = _rows(references[j : j + _BLOCK])
            squared = _squares(a)[:, None] - 2 * (a @ b.T) + _squares(b)
            nearest[i : i + _BLOCK] = np.minimum(nearest[i : i + _BLOCK], squared.min(axis=1))
    return np.sqrt(nearest) / 255


def _rows(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), -1).astype(np.float64)


def _squares(rows: np.ndarray) -> np.ndarray:
    return np.einsum("ij,ij->i", rows, rows)
