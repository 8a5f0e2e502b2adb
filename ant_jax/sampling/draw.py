"""Drawing samples from a trained model, a batch at a time."""

import functools
from collections.abc import Iterator

import jax
import numpy as np
from jax.tree_util import Partial
from ml_collections import ConfigDict

from ant_jax import diffusion, models, pixels
from ant_jax.experiment import Experiment
from ant_jax.latents import codec as codec_lib
from ant_jax.latents import dataset
from ant_jax.runtime.devices import split_over

# Keeps the keys of samples apart from those of the train step, which start from the bare seed.
_SAMPLE_STREAM = 1 << 30


def sample_batches(
    config: ConfigDict,
    pieces: Experiment,
    apply_fn: Partial,
    num: int,
    start: int = 0,
    stop: int | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Draws samples, `config.sample.batch_size` at a time, over this process's devices.

    Sample i is a function of the parameters, the seed and i alone, and is of class i mod classes.

    Args:
      config: the run's config; ``sample`` says how.
      pieces: what it describes.
      apply_fn: the network, ``(x, t, y) -> output``, with its parameters on the devices: an
        `experiment.denoiser`, or several by `diffusion.switch_by_timestep`.
      num: how many samples there are in all.
      start: number i of the first sample to draw.
      stop: number of the one after the last; default all.

    Yields:
      (images, labels): uint8 (B, H, W, C), and int32 (B,) or None for unconditional models.

    Raises:
      FloatingPointError: if samples have numbers that are not finite; the message says how many.
    """
    settings, num_classes = config.sample, models.num_classes(pieces.model)
    stop = num if stop is None else stop
    sampler = diffusion.ddpm_sample
    if settings.sampler == "ddim":
        sampler = functools.partial(diffusion.ddim_sample, eta=settings.eta)
    devices = jax.local_devices()
    codec = dataset.open_codec(config) if config.autoencoder.name else None
    stream = jax.random.fold_in(jax.random.key(settings.seed), _SAMPLE_STREAM)
    batch = batch_size(config, num)
    for first in range(start, stop, batch):
        index = jax.device_put(np.arange(first, first + batch), split_over(devices))
        keys = jax.vmap(functools.partial(jax.random.fold_in, stream))(index)
        labels = index % num_classes if num_classes else None
        x0 = sampler(
            apply_fn,
            (batch, *pieces.image_shape),
            keys,
            diffusion=pieces.process,
            num_steps=settings.num_steps,
            spacing=settings.spacing,
            y=labels,
            null_label=num_classes or None,
            guidance=settings.guidance,
            guidance_channels=settings.guidance_channels or None,
            clip_x0=config.diffusion.clip_x0,
        )
        keep = min(batch, stop - first)
        if codec is None:
            images, finite = (np.asarray(part)[:keep] for part in pixels.quantize(x0))
            pixels.check_finite(finite, "samples", first)
        else:
            latents = np.asarray(x0)[:keep]
            finite = np.isfinite(latents).all((1, 2, 3))
            pixels.check_finite(finite, "latents of samples", first)
            latents = latents / np.float32(config.autoencoder.scale)
            images = codec_lib.decode(codec, latents, config.autoencoder.batch_size)
        yield images, None if labels is None else np.asarray(labels)[:keep]


def batch_size(config: ConfigDict, num: int) -> int:
    """How many of `num` samples are drawn at a time: always as many, so one program serves all."""
    batch = min(config.sample.batch_size, num)
    return batch + -batch % len(jax.local_devices())
