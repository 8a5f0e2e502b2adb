"""Features of images by Inception, on all local devices."""

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from ant_jax import interop
from ant_jax.evaluation.features import Extractor, Network, Outputs
from ant_jax.evaluation.features.inception_network import INCEPTION, InceptionV3
from ant_jax.runtime import files
from ant_jax.runtime.devices import replicated, split_over
from ant_jax.runtime.tree_hash import tree_hash
from ant_jax.settings import Path

# The batch size of ADM's evaluation. It needs no more memory than a training step.
_PER_DEVICE = 64

_SHAPES = {"features": (2048,), "spatial": (2023,), "logits": (1008,)}

_WEIGHTS = (
    "the weights: pt_inception-2015-12-05-6726825d.pth of the release fid_weights of "
    "github.com/mseitzer/pytorch-fid, or weights-inception-2015-12-05-6726825d.pth of the release "
    "v0.2.0 of github.com/toshas/torch-fidelity"
)


def inception(weights: Path = "") -> Extractor:
    """The network of the FID, on this process's devices.

    Its outputs, float32: "features", the 2048 of the last pooling, for FID, precision and recall;
    "spatial", 2023, for the sFID; "logits", 1008 without the bias, for the Inception score.

    Args:
      weights: Path of `pt_inception-2015-12-05-6726825d.pth` of the releases of pytorch-fid, or of
        `weights-inception-2015-12-05-6726825d.pth` of those of torch-fidelity.
    """

    def check(height, width, channels):
        if not weights:
            raise ValueError(f"needs the path of {_WEIGHTS}")
        if not files.user_path(weights).is_file():
            raise ValueError(f"finds no weights: there is no such file as {weights!r}")
        if channels not in (None, 1, 3):
            raise ValueError(f"evaluates images of 1 or 3 channels, not of {channels}")

    return Extractor(
        _SHAPES,
        check,
        lambda: _load(files.user_path(weights)),
        {"frechet_distance": "fid", "group_frechet_distance": "group_fid"},
    )


def _load(path):
    params = interop.from_torch(interop.read_state(path), _template(), INCEPTION)
    placed = jax.device_put(params, replicated(jax.local_devices()))
    return Network(functools.partial(outputs, placed), tree_hash(params))


@functools.cache
def _template():
    image = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.uint8)
    return jax.eval_shape(InceptionV3().init, jax.random.key(0), image)["params"]


# The weights are arguments: as constants of the program they would be compiled into it.
_apply = jax.jit(lambda params, images: InceptionV3().apply({"params": params}, images))


def outputs(params: Any, batches: Iterable[np.ndarray]) -> Iterator[Outputs]:
    """The outputs of `inception`, from its parameters on the devices: see `Network.outputs`."""
    devices = jax.local_devices()
    size, running = None, None
    for images in batches:
        images = _checked(images)
        if size is None:
            # The first batch sets the batch size of the only program.
            size = min(len(images), _PER_DEVICE * len(devices))
            size += -size % len(devices)
            _say_what_compiles(size, images.shape[1:])
        for first in range(0, len(images), size):
            part = images[first : first + size]
            padded = np.pad(part, ((0, size - len(part)), *[(0, 0)] * 3))
            started = _apply(params, jax.device_put(padded, split_over(devices))), len(part)
            # While the devices compute, the caller gets the previous outputs and prepares a batch.
            if running is not None:
                yield _fetched(*running)
            running = started
    if running is not None:
        yield _fetched(*running)


# Cached, because each shape compiles once.
@functools.cache
def _say_what_compiles(size, shape):
    logging.info("compiling Inception for %d images of %s ...", size, "x".join(map(str, shape)))


def _checked(images):
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(
            f"Inception needs uint8 images (n, height, width, 1 or 3), got {images.dtype} "
            f"{images.shape}"
        )
    # A grey image has three equal channels.
    return np.broadcast_to(images, (*images.shape[:-1], 3))


def _fetched(features, count):
    pool, spatial, logits = (np.asarray(value)[:count] for value in features)
    return {"features": pool, "spatial": spatial, "logits": logits}
