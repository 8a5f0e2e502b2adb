"""Features of images by Inception, over all local devices."""

import functools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ant_jax import interop
from ant_jax.models.inception import Features, InceptionV3
from ant_jax.runtime.devices import replicated, split_over
from ant_jax.runtime.tree_hash import tree_hash

# As many as ADM's evaluation takes at once, and no more memory than a training step's.
_PER_DEVICE = 64


class Network(NamedTuple):
    """What images are measured by.

    Attributes:
      features: From batches of uint8 images (n, height, width, 1 or 3) of one size to the NumPy
        float32 features of all of them, in their order but in batches of other sizes.
      pool_width: Number of pool features, 2048 for Inception.
      spatial_width: Number of spatial features, 2023 for Inception.
      digest: Of the weights.
    """

    features: Callable[[Iterable[np.ndarray]], Iterator[Features]]
    pool_width: int
    spatial_width: int
    digest: str


def load_inception(path: str | os.PathLike) -> Network:
    """The network of the FID with its published weights, on this process's devices.

    Args:
      path: `pt_inception-2015-12-05-6726825d.pth` of the releases of pytorch-fid, or
        `weights-inception-2015-12-05-6726825d.pth` of those of torch-fidelity.

    Raises:
      ValueError: If the file is damaged or its weights are not Inception's.
      OSError: If it cannot be opened.
    """
    params = interop.from_torch(interop.read_state(path), _template(), interop.INCEPTION)
    placed = jax.device_put(params, replicated(jax.local_devices()))
    return Network(functools.partial(_features, placed), 2048, 2023, tree_hash(params))


@functools.cache
def _template():
    image = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.uint8)
    return jax.eval_shape(InceptionV3().init, jax.random.key(0), image)["params"]


# The weights are arguments: as constants of the program they would be compiled into it.
_apply = jax.jit(lambda params, images: InceptionV3().apply({"params": params}, images))


def _features(params, batches):
    devices = jax.local_devices()
    size, running = None, None
    for images in batches:
        images = _checked(images)
        if size is None:
            # The first batch says how large the one program's is.
            size = min(len(images), _PER_DEVICE * len(devices))
            size += -size % len(devices)
        for first in range(0, len(images), size):
            part = images[first : first + size]
            padded = np.pad(part, ((0, size - len(part)), *[(0, 0)] * 3))
            started = _apply(params, jax.device_put(padded, split_over(devices))), len(part)
            # While the devices are at it, the caller has those before, and prepares the next.
            if running is not None:
                yield _fetched(*running)
            running = started
    if running is not None:
        yield _fetched(*running)


def _checked(images):
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(
            f"Inception needs uint8 images (n, height, width, 1 or 3), got {images.dtype} "
            f"{images.shape}"
        )
    # A grey image is one of three equal colours.
    return np.broadcast_to(images, (*images.shape[:-1], 3))


def _fetched(features, count):
    return Features(*(np.asarray(value)[:count] for value in features))
