"""Time of a train step of each method as a ratio to vanilla: ``python -m benchmarks.step``.

All variants run in one process, one step each in turn and in a new order every round, on the same
parameters, optimizer and EMA. A ratio is the median over rounds of (variant / vanilla of the same
round), with a 95 % bootstrap interval. Needs jax, flax, optax and numpy alone.

The defaults are the reference size for 2 CPU cores. On an accelerator, for instance::

  python -m benchmarks.step --width 1024 --depth 24 --heads 16 --size 32 --classes 1000 \
    --batch 240 --dtype bfloat16
"""

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ant_jax import clustering, diffusion, mtl
from ant_jax.models.dit import DiT
from ant_jax.parallel import parallel_step, replicate
from ant_jax.train_step import init_state, train_step

METHODS = {
    "vanilla": lambda k: None,
    "linear": mtl.linear,
    "uncertainty": mtl.uncertainty,
    "pcgrad": mtl.pcgrad,
    "nash": mtl.nash,
}
VARIANTS = [
    "vanilla",
    "linear",
    "uncertainty",
    *(f"{method}/{form}" for method in ("pcgrad", "nash") for form in ("vmap", "scan", "masked")),
]


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--patch", type=int, default=2)
    parser.add_argument("--size", type=int, default=16, help="side of the input")
    parser.add_argument("--channels", type=int, default=4)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--batch", type=int, default=40)
    parser.add_argument("--k", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--remat", action="store_true")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS)
    return parser.parse_args()


def main():
    args = parse()
    variants = ["vanilla", *(name for name in args.variants if name != "vanilla")]
    model = DiT(
        width=args.width,
        depth=args.depth,
        heads=args.heads,
        patch=args.patch,
        channels=args.channels,
        num_classes=args.classes,
        dtype=jnp.dtype(args.dtype),
        remat=args.remat,
    )
    process = diffusion.GaussianDiffusion(diffusion.alphas_bar("cosine", 1000))
    boundaries = clustering.interval_clusters(clustering.snr_costs(process.log_snr), args.k)
    optimizer = optax.adamw(1e-4)
    devices = jax.local_devices()
    shape = (args.size, args.size, args.channels)
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.normal(size=(args.batch, *shape)).astype(np.float32),
        "label": rng.integers(0, args.classes, args.batch).astype(np.int32),
    }
    zero = jnp.zeros(1, jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *shape)), zero, zero)["params"]
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    # Off adaLN-Zero's start, where gradients are zero and Nash has nothing to solve.
    params = jax.tree.map(lambda leaf: leaf + 0.02, params)
    print(
        f"{jax.devices()[0].device_kind}, {len(devices)} device(s), jax {jax.__version__}; "
        f"{count / 1e6:.1f} M parameters, input {shape}, batch {args.batch}, k = {args.k}, "
        f"{args.dtype}",
        flush=True,
    )

    steps, method_states, compile_seconds = {}, {}, {}
    # One set of parameters and moments serves all variants, so that large models fit.
    core = None
    for name in variants:
        method, _, form = name.partition("/")
        weighting = METHODS[method](args.k)
        state = init_state(params, optimizer, weighting, args.k) if core is None else None
        if core is None:
            core = replicate(state, devices)
            params = None
        fresh = mtl.CombineState((), jnp.zeros(args.k), None)
        method_states[name] = replicate(
            fresh if weighting is None else mtl.init_combine(weighting), devices
        )
        steps[name] = parallel_step(
            functools.partial(
                train_step,
                apply_fn=lambda p, x, t, y: model.apply({"params": p}, x, t, y),
                diffusion=process,
                boundaries=boundaries,
                weighting=weighting,
                optimizer=optimizer,
                seed=0,
                timesteps="uniform" if weighting is None else "stratified",
                gradient_form=form or "vmap",
                num_classes=args.classes,
                label_dropout=0.1,
            ),
            devices,
        )
        begin = time.perf_counter()
        core, _ = take(steps[name], core, method_states, name, batch)
        compile_seconds[name] = time.perf_counter() - begin
        print(f"compiled {name} in {compile_seconds[name]:.1f} s", flush=True)

    times = {name: [] for name in variants}
    for round_ in range(args.repeats):
        for name in rng.permutation(variants):
            core, seconds = take(steps[name], core, method_states, name, batch)
            times[name].append(seconds)
        print(f"\rround {round_ + 1}/{args.repeats}", end="", flush=True)

    print("\n\n| variant | ms per step | ratio to vanilla | 95 % interval | compile s |")
    print("| --- | --- | --- | --- | --- |")
    for name in variants:
        ratios = np.array(times[name]) / np.array(times["vanilla"])
        resampled = rng.choice(ratios, (2000, args.repeats))
        low, high = np.quantile(np.median(resampled, 1), [0.025, 0.975])
        print(
            f"| {name} | {1000 * np.median(times[name]):.1f} | {np.median(ratios):.3f} | "
            f"{low:.3f} to {high:.3f} | {compile_seconds[name]:.1f} |"
        )


def take(step, core, method_states, name, batch):
    """One step of a variant on the common parameters; returns them and the seconds it took."""
    begin = time.perf_counter()
    state, _ = step(core._replace(method_state=method_states[name]), batch)
    jax.block_until_ready(state)
    seconds = time.perf_counter() - begin
    method_states[name] = state.method_state
    return state, seconds


if __name__ == "__main__":
    main()
