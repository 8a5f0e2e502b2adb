"""Encodes images to latents and decodes latents, on the devices of this process."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ant_jax import interop, pixels
from ant_jax.latents.autoencoder import Autoencoder, Latent, autoencoder
from ant_jax.latents.autoencoder_weights import AUTOENCODER
from ant_jax.runtime.devices import replicated, split_over
from ant_jax.runtime.files import user_path
from ant_jax.runtime.tree_hash import tree_hash


class Codec(NamedTuple):
    """An autoencoder with its weights.

    Attributes:
      model: The network.
      params: Its parameters, on the devices of this process.
      digest: Hash of the parameters, independent of the file format.
      encoder_digest: Hash of only the parameters that make latents. A fine-tuned decoder can use
        the same latents.
    """

    model: Autoencoder
    params: Any
    digest: str
    encoder_digest: str


def load(name: str, weights: str) -> Codec:
    """Loads an autoencoder with its weights; caches the last one.

    Args:
      name: one of `ant_jax.latents.autoencoder.VARIANTS`.
      weights: path of the file of weights.

    Raises:
      OSError: if the file can't be read.
      ValueError: if the file is damaged, or its weights are those of another network.
    """
    return _load(name, str(user_path(weights)))


@functools.lru_cache(maxsize=1)
def _load(name, path):
    model = autoencoder(name)
    side = 2 * model.factor
    images = jax.ShapeDtypeStruct((1, side, side, model.channels), jnp.float32)
    # Before the network is traced, so that a missing file is reported at once.
    state = interop.read_state(path)
    template = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    params = interop.from_torch(state, template, AUTOENCODER)
    placed = jax.device_put(params, replicated(jax.local_devices()))
    encoder = {name: params[name] for name in ("encoder", "quant_conv")}
    return Codec(model, placed, tree_hash(params)[:16], tree_hash(encoder)[:16])


def latent_shape(name: str, image_size: int) -> tuple[int, int, int]:
    """The shape (h, w, c) of an autoencoder's latent for a square image.

    Raises:
      ValueError: if the autoencoder can't encode images of this size.
    """
    model = autoencoder(name)
    if image_size % model.factor:
        raise ValueError(
            f"{image_size} must be divisible by {model.factor}, the factor of the autoencoder "
            f"{name!r}"
        )
    side = image_size // model.factor
    return side, side, model.latent_channels


def encode(codec: Codec, images: np.ndarray) -> Latent:
    """Encodes uint8 images (B, H, W, C), with B divisible by the number of local devices."""
    over_devices = split_over(jax.local_devices())
    return _encode(codec.params, jax.device_put(images, over_devices), model=codec.model)


@functools.partial(jax.jit, static_argnames="model")
def _encode(params, images, *, model):
    return model.apply({"params": params}, pixels.normalize(images), method="encode")


def decode(codec: Codec, latents: jax.Array | np.ndarray, batch_size: int) -> np.ndarray:
    """Decodes latents in batches.

    Args:
      codec: from `load`.
      latents: (B, h, w, c), divided by the scale that training uses.
      batch_size: latents per batch, rounded up to a multiple of the number of local devices.

    Returns:
      uint8 (B, H, W, C).

    Raises:
      FloatingPointError: if a decoded image has numbers that are not finite.
    """
    devices = jax.local_devices()
    batch_size += -batch_size % len(devices)
    on_host = np.asarray(latents)
    images, finite = [], []
    for first in range(0, len(on_host), batch_size):
        part = on_host[first : first + batch_size]
        padded = np.pad(part, ((0, batch_size - len(part)), (0, 0), (0, 0), (0, 0)))
        decoded = _decode(
            codec.params, jax.device_put(padded, split_over(devices)), model=codec.model
        )
        for parts, values in zip((images, finite), decoded, strict=True):
            parts.append(np.asarray(values)[: len(part)])
    pixels.check_finite(
        np.concatenate(finite), "images that the autoencoder of config.autoencoder.weights decodes"
    )
    return np.concatenate(images)


@functools.partial(jax.jit, static_argnames="model")
def _decode(params, latents, *, model):
    return pixels.quantize(model.apply({"params": params}, latents, method="decode"))
