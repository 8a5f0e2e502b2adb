"""A small classifier of the run's own images, whose features evaluate samples.

Inception was not trained for images as small as 14x14 or 32x32. This network is trained once on the
training split alone, so its accuracy on the held-out images is unbiased.
"""

import functools
import itertools
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from flax import linen as nn
from flax import traverse_util

from ant_jax import data
from ant_jax.evaluation.features import Extractor, Network
from ant_jax.evaluation.real_images import Images
from ant_jax.runtime import files, signals
from ant_jax.runtime.progress import with_time_left
from ant_jax.runtime.tree_hash import tree_hash

# Part of the cache file's name: increase it whenever the recipe changes.
_VERSION = 2
_FEATURES = 64
_SIDES = (8, 64)
# Larger images are folded to this side, so that they cost no more.
_SIDE = 16
# Training: AdamW with a rate that rises and falls once (Smith & Topin, 2018), and smoothed labels
# (Szegedy et al., 2016), which overfit less.
_STEPS, _BATCH = 2400, 250
_RATE, _WEIGHT_DECAY, _SMOOTHING = 1e-2, 1e-2, 0.1

Variables = dict[str, Any]


def classifier(training: Callable[[], Images]) -> Extractor:
    """A network that is trained once to classify the images of ``config.data``.

    It learns from the training images with their labels, at the size of the samples and mirrored as
    ``config.data.flip`` says. That takes 2 minutes on 2 cores. Then the weights are read from
    ``classifier_*.npz`` in `files.user_cache`. Training on another kind of device gives slightly
    other weights, and figures can be compared only if their weights are the same: copy this file to
    the other machine. The results name the hash of the weights.

    Its outputs: "features", the 64 float32 of the last hidden layer; "labels", the class that it
    predicts.

    Args:
      training: Opens the training images, cropped and mirrored as for the run.
    """

    def check(height, width, channels):
        low, high = _SIDES
        if height != width or not low <= height <= high:
            allowed = f"{low}x{low} to {high}x{high}"
            raise ValueError(f"evaluates images of {allowed} pixels, not of {height}x{width}")
        source = training().source
        if source.num_classes < 2:
            raise ValueError(f"needs labelled images, and {source.name} has no labels")
        if channels not in (None, source.image_shape[-1]):
            raise ValueError(
                f"evaluates images with the {source.image_shape[-1]} channels of {source.name}, "
                f"not with {channels}"
            )

    return Extractor({"features": (_FEATURES,), "labels": ()}, check, lambda: _network(training()))


class _Layers(nn.Module):
    """uint8 images (n, side, side, channels) to float32 features (n, 64) and logits."""

    classes: int

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> tuple[jax.Array, jax.Array]:
        def activated(layer, x):
            return nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(layer(x)))

        # The same on every device: without this, GPUs round the factors to 10 bits.
        conv = functools.partial(nn.Conv, kernel_size=(3, 3), precision="highest")
        dense = functools.partial(nn.Dense, precision="highest")
        x = _folded(images.astype(jnp.float32) / 255)
        x = activated(conv(16), x)
        x = _pooled(activated(conv(32), x))
        x = _pooled(activated(conv(64), x))
        x = activated(dense(_FEATURES), x.reshape(len(x), -1))
        return x, dense(self.classes)(x)


def _folded(images):
    """Moves blocks of pixels to the channels, so that no side is longer than `_SIDE`."""
    n, side, _, channels = images.shape
    block = -(-side // _SIDE)
    images = jnp.pad(images, ((0, 0), (0, -side % block), (0, -side % block), (0, 0)))
    count = images.shape[1] // block
    images = images.reshape(n, count, block, count, block, channels)
    return images.transpose(0, 1, 3, 2, 4, 5).reshape(n, count, count, block * block * channels)


def _pooled(x):
    """The maximum of each 2x2 values; on CPUs the gradient of `nn.max_pool` is slow."""
    n, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return x.reshape(n, height // 2, 2, width // 2, 2, channels).max((2, 4))


# If no file can be written, the classifier is trained once in each process.
_trained: dict[str, Variables] = {}


def _network(images):
    source = images.source
    size = images.pipeline["image_size"]
    shape = (size, size, source.image_shape[-1])
    layers = _Layers(source.num_classes)
    name = tree_hash([images.key, shape, source.num_classes])[:24]
    if name not in _trained:
        _trained[name] = _load(images, layers, shape, name)
    variables = _trained[name]

    def outputs(batches):
        for batch in batches:
            if batch.dtype != np.uint8 or batch.shape[1:] != shape:
                raise ValueError(f"need uint8 {('n', *shape)}, got {batch.dtype} {batch.shape}")
            for first in range(0, len(batch), _BATCH):
                part = batch[first : first + _BATCH]
                # Padded, so that there is one program, and an image's outputs are always equal.
                padded = np.pad(part, ((0, _BATCH - len(part)), *[(0, 0)] * 3))
                found, logits = _apply(layers, variables, padded)
                labels = np.asarray(logits).argmax(-1)
                yield {"features": np.asarray(found)[: len(part)], "labels": labels[: len(part)]}

    return Network(outputs, tree_hash(variables))


def _load(images: Images, layers: _Layers, shape: tuple[int, int, int], name: str) -> Variables:
    """The variables of the cache file, or newly trained ones."""
    path = files.user_cache()
    if path is not None:
        path /= f"classifier_v{_VERSION}_{name}.npz"
        if os.path.exists(path):
            try:
                return _read(path, layers, shape)
            except Exception as error:  # A damaged file can raise almost any type of error.
                logging.warning("Training the classifier again: %s is damaged: %r", path, error)
    logging.info("training a classifier of %s, once; its step compiles first ...", images.name)
    variables = _train(images, layers, shape)
    if path is not None:
        with files.keeping("the classifier"), files.writing(path) as file:
            flat: dict[str, Any] = traverse_util.flatten_dict(variables, sep="/")
            np.savez(file, **flat)
            logging.info("the classifier is kept for the next evaluation: %s", path)
    return variables


def _read(path: pathlib.Path, layers: _Layers, shape: tuple[int, int, int]) -> Variables:
    with np.load(path, allow_pickle=False) as stored:
        found = traverse_util.unflatten_dict(dict(stored), sep="/")
    described = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, str(leaf.dtype)), tree)
    if described(found) != described(jax.eval_shape(lambda: _first(layers, shape))):
        raise ValueError("it holds another network")
    return found


def _first(layers, shape):
    return layers.init(jax.random.key(0), jnp.zeros((1, *shape), jnp.uint8), train=False)


def _train(images: Images, layers: _Layers, shape: tuple[int, int, int]) -> Variables:
    variables = _first(layers, shape)
    state = variables, _optimizer().init(variables["params"])
    stream = data.batches(images.source, batch_size=_BATCH, seed=0, **images.pipeline)
    pairs = ((each["image"], each["label"]) for each in itertools.islice(stream, _STEPS))
    with signals.losing("the classifier is trained again from its beginning"):
        for batch in with_time_left(pairs, _STEPS, "steps of the classifier", lambda batch: 1):
            state = _step(layers, state, batch)
    return jax.tree.map(np.asarray, state[0])


def _optimizer():
    schedule = optax.cosine_onecycle_schedule(_STEPS, _RATE, 0.2, 25, 1000)
    return optax.adamw(schedule, weight_decay=_WEIGHT_DECAY)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _step(layers, state, batch):
    variables, optimizer_state = state
    images, labels = batch

    def loss(params):
        (_, logits), changed = layers.apply(
            {**variables, "params": params}, images, train=True, mutable="batch_stats"
        )
        wanted = optax.smooth_labels(jax.nn.one_hot(labels, layers.classes), _SMOOTHING)
        return optax.softmax_cross_entropy(logits, wanted).mean(), changed

    gradient, changed = jax.grad(loss, has_aux=True)(variables["params"])
    update, optimizer_state = _optimizer().update(gradient, optimizer_state, variables["params"])
    return {"params": optax.apply_updates(variables["params"], update), **changed}, optimizer_state


# The weights are arguments: as constants of the program they would be compiled into it.
@functools.partial(jax.jit, static_argnums=0)
def _apply(layers, variables, images):
    return layers.apply(variables, images, train=False)
