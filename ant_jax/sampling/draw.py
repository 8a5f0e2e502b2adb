"""Draws samples from a trained model, batch by batch."""

import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jax.tree_util import Partial

from ant_jax import pixels
from ant_jax.diffusion import Process
from ant_jax.diffusion.samplers import SampleOptions, Sampler
from ant_jax.runtime.devices import split_over

# Makes the keys of samples differ from those of the train step, which come from the seed itself.
_SAMPLE_STREAM = 1 << 30


def sample_batches(
    sampler: Sampler,
    process: Process,
    denoise: Partial,
    image_shape: tuple[int, int, int],
    num_classes: int,
    options: SampleOptions,
    *,
    seed: int,
    batch_size: int,
    num: int,
    labels: Sequence[int] = (),
    start: int = 0,
    stop: int | None = None,
    decode: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Draws samples on this process's devices.

    Sample i depends on the parameters, the seed, its class and i alone. The classes take turns.

    Args:
      sampler: the sampler.
      process: the noise process.
      denoise: the network, ``(x, t, y) -> output``, with its parameters on the devices, or several
        networks joined by `diffusion.switch_by_level`.
      image_shape: (H, W, C) of what the network sees.
      num_classes: of the network; 0 for an unconditional one.
      options: of the sampler.
      seed: of the samples; another seed gives other samples.
      batch_size: number of samples to draw at a time; see `rounded_batch_size`.
      num: number of samples in all.
      labels: of the classes to draw, each below ``num_classes``; () for all.
      start: index of the first sample to draw.
      stop: index after that of the last sample to draw; by default ``num``.
      decode: from float32 latents (B, h, w, c) to uint8 images (B, H, W, C); None where the network
        sees pixels.

    Yields:
      (images, labels): uint8 (B, H, W, C), and int32 (B,) or None for unconditional models.

    Raises:
      FloatingPointError: if samples have numbers that are not finite; the message says how many.
    """
    stop = num if stop is None else stop
    classes = np.asarray(labels or range(num_classes), np.int32)
    devices = jax.local_devices()
    stream = jax.random.fold_in(jax.random.key(seed), _SAMPLE_STREAM)
    batch = rounded_batch_size(batch_size, num)
    for first in range(start, stop, batch):
        index = np.arange(first, first + batch)
        place = lambda array: jax.device_put(array, split_over(devices))
        keys = jax.vmap(functools.partial(jax.random.fold_in, stream))(place(index))
        y = place(classes[index % len(classes)]) if num_classes else None
        x0 = sampler(process, denoise, (batch, *image_shape), keys, options, y, num_classes or None)
        keep = min(batch, stop - first)
        if decode is None:
            images, finite = (np.asarray(part)[:keep] for part in pixels.quantize(x0))
            pixels.check_finite(finite, "samples", first)
        else:
            latents = np.asarray(x0)[:keep]
            finite = np.asarray(np.isfinite(latents).all((1, 2, 3)))
            pixels.check_finite(finite, "latents of samples", first)
            images = decode(latents)
        yield images, None if y is None else np.asarray(y)[:keep]


def rounded_batch_size(batch_size: int, num: int) -> int:
    """The size of all batches: at most ``num``, then rounded up to a multiple of the devices.

    As all batches have the same size, one compiled program draws them.
    """
    batch = min(batch_size, num)
    return batch + -batch % len(jax.local_devices())
