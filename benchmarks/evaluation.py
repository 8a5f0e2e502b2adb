"""Throughput of an evaluation: ``python -m benchmarks.evaluation``.

Prints the images per second of each stage alone: the sampler of a DiT with classifier-free
guidance, the decoder of the autoencoder "KL-f8", Inception, and the means and covariances of its
features for FID and sFID. The last line is all of them together, as an evaluation runs them. Each
figure is the median of some interleaved rounds after one that compiles. All weights are random, so
no file is needed.

The defaults are for 2 CPU cores; for an accelerator::

  python -m benchmarks.evaluation --model XL/2 --images 512 --batch 256 --decode 32 --steps 50
"""

import argparse
import functools

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
from ant_jax.sampling.draw import sample_batches
from benchmarks import programs
from benchmarks.processes import interleaved, table

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
    counts, calls = stages(args)
    times = interleaved(calls, args.repeats)
    seconds = {name: np.median(each) / counts[name] for name, each in times.items()}
    rows = [[name, f"{1 / each:.1f}", f"{1000 * each:.2f}"] for name, each in seconds.items()]
    table(["stage", "images/s", "ms per image"], rows)


def stages(args):
    """The number of images that each stage handles, and what it does."""
    model, shape = programs.network(args.model, attention=args.attention)
    draw = sampler(programs.Task(model, shape, diffusion.gaussian(), 5), args)
    codec, network = random_codec(), random_inception()
    decode = lambda latents: codec_lib.decode(codec, latents, args.decode)

    rng = np.random.default_rng(0)
    latents = rng.normal(size=(args.images, *shape)).astype(np.float32)
    pixels = decode(latents)
    outputs = next(network.outputs([pixels]))
    # As many as an evaluation joins.
    features = [np.resize(outputs[name], (4096, outputs[name].shape[1])) for name in MOMENTS_OF]
    calls = {
        "sampler": lambda: list(draw(None)),
        "decoder": lambda: decode(latents),
        "Inception": lambda: list(network.outputs([pixels])),
        "means and covariances": lambda: list(map(moments, features)),
        "all": lambda: summarise(draw(decode), network, MOMENTS_OF, ("logits",)),
    }
    return dict.fromkeys(calls, args.images) | {"means and covariances": len(features[0])}, calls


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


if __name__ == "__main__":
    main()
