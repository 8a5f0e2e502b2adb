"""Makes stand-ins for downloaded files: ``python -m experiments.photographs --out DIR``.

Cuts scikit-learn's two sample photographs into 456 JPEG files of 64 x 64 pixels, with a class
folder for each photograph. Trains the small KL autoencoder on them, and draws random weights for
Inception. The files have the real formats, so they suffice for a rehearsal of docs/paper_row.md on
a laptop. Metrics from random weights compare with nothing else.
"""

import functools
import io
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags, logging
from PIL import Image

from ant_jax import cli, data, interop, pixels
from ant_jax.evaluation.features.inception_network import INCEPTION, InceptionV3
from ant_jax.latents.autoencoder import autoencoder
from ant_jax.latents.autoencoder_weights import AUTOENCODER
from ant_jax.runtime import signals
from ant_jax.runtime.files import user_path, write_bytes
from ant_jax.runtime.progress import duration

_OUT = flags.DEFINE_string("out", "photographs", "Folder for the images and the autoencoder.")
_STEPS = flags.DEFINE_integer("steps", 1500, "Training steps of the autoencoder.")

_SIDE, _STRIDE = 64, 32
# The autoencoder trains on windows of the images, which is a quarter of the work.
_WINDOW = 32
_BATCH = 8
_LEARNING_RATE = 2e-3
# Weight of the divergence from a standard normal distribution, per number of the latent.
_KL_WEIGHT = 1e-4


@signals.ending_the_program("start again from the beginning")
def main(argv: list[str]) -> None:
    """Makes the images, Inception's weights and the autoencoder."""
    out = user_path(_OUT.value)
    count = write_crops(out / "images")
    logging.info("%d images: %s", count, out / "images")
    inception = interop.to_torch(random_inception(), INCEPTION)
    interop.write_state(out / "inception.safetensors", inception)
    logging.info("Inception with random weights: %s", out / "inception.safetensors")
    path = out / "autoencoder.safetensors"
    params, error = train_autoencoder(data.folder(dir=str(out / "images")), _STEPS.value)
    interop.write_state(path, interop.to_torch(params, AUTOENCODER))
    logging.info("autoencoder, mean error of a pixel %.1f of 255: %s", 127.5 * error, path)


def write_crops(directory: Path) -> int:
    """Writes the crops as DIRECTORY/PHOTOGRAPH/NNN.jpg; returns their number."""
    from sklearn.datasets import load_sample_images

    samples = load_sample_images()
    count = 0
    for name, photograph in zip(samples.filenames, samples.images, strict=True):
        height, width, _ = photograph.shape
        places = [
            (top, left)
            for top in range(0, height - _SIDE + 1, _STRIDE)
            for left in range(0, width - _SIDE + 1, _STRIDE)
        ]
        for i, (top, left) in enumerate(places):
            stream = io.BytesIO()
            crop = photograph[top : top + _SIDE, left : left + _SIDE]
            Image.fromarray(crop).save(stream, format="jpeg", quality=95)
            write_bytes(directory / Path(name).stem / f"{i:03d}.jpg", stream.getvalue())
        count += len(places)
    return count


def random_inception() -> dict:
    """Random parameters of Inception whose features neither vanish nor explode."""
    image = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.uint8)
    template = jax.eval_shape(InceptionV3().init, jax.random.key(0), image)["params"]
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        kind = path[-1].key
        if kind == "kernel":
            # He et al. 2015, for networks of ReLUs.
            values = rng.standard_normal(leaf.shape, np.float32)
            return values * np.float32(np.sqrt(2 / np.prod(leaf.shape[:-1])))
        return np.full(leaf.shape, kind in ("scale", "var"), np.float32)

    return jax.tree.map_with_path(draw, template)


def train_autoencoder(source: data.Source, num_steps: int) -> tuple[dict, float]:
    """Trains the small KL autoencoder.

    Returns:
      Its parameters, and the mean absolute error of its reconstructions over the last 100 steps,
      for images in [-1, 1].
    """
    model = autoencoder("KL-f4-small")
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, _SIDE, _SIDE, 3)))["params"]
    optimizer = optax.adam(optax.cosine_decay_schedule(_LEARNING_RATE, num_steps))
    state = optimizer.init(params)
    batches = data.batches(source, batch_size=_BATCH, seed=0, crop="center", image_size=_SIDE)
    rng = np.random.default_rng(0)
    errors = []
    begin = time.perf_counter()
    for step in range(num_steps):
        top, left = rng.integers(_SIDE - _WINDOW + 1, size=2)
        window = next(batches)["image"][:, top : top + _WINDOW, left : left + _WINDOW]
        images = pixels.normalize(np.asarray(window))
        params, state, error = _step(params, state, images, step, model, optimizer.update)
        errors.append(error)
        if (step + 1) % 100 == 0 or step + 1 == num_steps:
            left = (time.perf_counter() - begin) / (step + 1) * (num_steps - step - 1)
            logging.info(
                "autoencoder, step %d/%d  error %.4f  ETA %s",
                step + 1,
                num_steps,
                np.mean(errors[-100:]),
                duration(left),
            )
    return jax.device_get(params), float(np.mean(errors[-100:]))


@functools.partial(jax.jit, static_argnums=(4, 5))
def _step(params, state, images, step, model, update):
    def loss(params):
        variables = {"params": params}
        mean, std = model.apply(variables, images, method="encode")
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(1), step), mean.shape)
        decoded = model.apply(variables, mean + std * noise, method="decode")
        error = jnp.mean(jnp.abs(decoded - images))
        divergence = 0.5 * jnp.mean(mean**2 + std**2 - 1 - 2 * jnp.log(std))
        return error + _KL_WEIGHT * divergence, error

    (_, error), grads = jax.value_and_grad(loss, has_aux=True)(params)
    updates, state = update(grads, state)
    return optax.apply_updates(params, updates), state, error


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse_flags)
