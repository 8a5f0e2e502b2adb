"""Throughput of an evaluation: ``python -m benchmarks.evaluation``.

Prints the images per second of each stage alone: the sampler of a DiT with classifier-free
guidance, the decoder of the autoencoder "KL-f8", Inception, and the means and covariances of its
features for FID and sFID. The last line is all of them together, as an evaluation runs them. Each
figure is the median of some rounds after one that compiles. All weights are random, because no time
depends on them.

The defaults are for 2 CPU cores; for an accelerator::

  python -m benchmarks.evaluation --model XL/2 --images 512 --batch 256 --decode 32 --steps 50
"""

import argparse
import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from ant_jax import diffusion
from ant_jax.diffusion import samplers
from ant_jax.evaluation.features import Network
from ant_jax.evaluation.features import inception as inception_lib
from ant_jax.evaluation.features.inception_network import InceptionV3
from ant_jax.evaluation.moments import moments
from ant_jax.evaluation.summary import summarise
from ant_jax.latents import codec as codec_lib
from ant_jax.latents.autoencoder import autoencoder
from ant_jax.models.attention import ATTENTION
from ant_jax.models.dit import SIZES, DiT
from ant_jax.sampling.draw import sample_batches
from benchmarks import programs

GUIDANCE = 1.5
MOMENTS_OF = ("features", "spatial")


def parse():
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--model", choices=programs.MODELS, help="a DiT of the paper, in bfloat16")
    parser.add_argument("--attention", choices=ATTENTION, default="xla")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4, help="samples that are drawn at a time")
    parser.add_argument("--decode", type=int, default=4, help="latents that are decoded at a time")
    parser.add_argument("--steps", type=int, default=4, help="of the sampler")
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args()


def main():
    args = parse()
    print(
        f"{jax.devices()[0].device_kind}, jax {jax.__version__}; {args.images} images, sampled "
        f"{args.batch} at a time in {args.steps} steps with guidance",
        flush=True,
    )
    table(stages(args), args.repeats)


def stages(args):
    """For each stage the number of images that it handles, and what it does."""
    if args.model:
        size: dict[str, Any] = dict(SIZES[args.model.partition("/")[0]], dtype=jnp.bfloat16)
        shape = 32, 32, 4
    else:
        size, shape = dict(width=384, depth=4, heads=6), (16, 16, 4)
    model = DiT(channels=4, patch=2, num_classes=1000, attention=args.attention, **size)
    draw = sampler(programs.Task(model, shape, diffusion.gaussian(), 5), args)
    codec, network = random_codec(), random_inception()
    decode = lambda latents: codec_lib.decode(codec, latents, args.decode)

    rng = np.random.default_rng(0)
    latents = rng.normal(size=(args.images, *shape)).astype(np.float32)
    pixels = decode(latents)
    outputs = next(network.outputs([pixels]))
    # As many as an evaluation joins.
    features = [np.resize(outputs[name], (4096, outputs[name].shape[1])) for name in MOMENTS_OF]
    return {
        "sampler": (args.images, lambda: list(draw(None))),
        "decoder": (args.images, lambda: decode(latents)),
        "Inception": (args.images, lambda: list(network.outputs([pixels]))),
        "means and covariances": (4096, lambda: list(map(moments, features))),
        "all": (args.images, lambda: summarise(draw(decode), network, MOMENTS_OF, ("logits",))),
    }


def table(stages, repeats):
    """Measures and prints."""
    print("\n| stage | images/s | ms per image |\n| --- | --- | --- |", flush=True)
    for name, (count, stage) in stages.items():
        seconds = np.median(timed(stage, repeats)) / count
        print(f"| {name} | {1 / seconds:.1f} | {1000 * seconds:.2f} |", flush=True)


def sampler(task, args):
    """From a decoder or None to the batches of samples."""
    params = jax.jit(lambda: programs.first_state(task, "vanilla").params)()
    return lambda decode: sample_batches(
        samplers.ddpm(),
        task.process,
        Partial(task.model.apply, {"params": params}),
        task.shape,
        task.model.num_classes,
        samplers.SampleOptions(num_steps=args.steps, guidance=GUIDANCE, clip_x0=False),
        seed=0,
        batch_size=args.batch,
        num=args.images,
        decode=decode,
    )


def random_codec():
    model = autoencoder("KL-f8")
    images = jnp.zeros((1, 2 * model.factor, 2 * model.factor, model.channels))
    params = jax.jit(model.init)(jax.random.key(0), images)["params"]
    return codec_lib.Codec(model, params, "", "")


def random_inception():
    params = jax.jit(InceptionV3().init)(jax.random.key(0), np.zeros((1, 8, 8, 3), np.uint8))
    return Network(functools.partial(inception_lib.outputs, params["params"]), "")


def timed(function, repeats):
    """Seconds of each call, after one that compiles."""
    function()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return times


if __name__ == "__main__":
    main()
