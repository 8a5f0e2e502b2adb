"""Cost of noise processes and samplers: ``python -m benchmarks.processes``.

Prints two tables. The first compares a vanilla train step of each process with that of DDPM. The
second compares each sampler with the network's own time: as many calls of the network, one after
the other in one compiled loop. In every round each program runs once, in random order. A ratio is
the median over rounds of (program / the one compared with, of the same round), with a 95 %
bootstrap interval. The network has random parameters, no guidance, and no learned variance.

The defaults are for 2 CPU cores; for an accelerator::

  python -m benchmarks.processes --model L/2 --batch 64
"""

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from ant_jax import diffusion
from ant_jax.diffusion import samplers
from benchmarks import programs

PROCESSES = {
    "DDPM, noise": diffusion.gaussian(),
    "DDPM, v": diffusion.gaussian(prediction="v"),
    "flow, uniform": diffusion.Flow(),
    "flow, logit-normal": diffusion.Flow(density="logit_normal"),
    "EDM": diffusion.EDM(),
}
SAMPLERS = {
    "ddpm": samplers.ddpm(),
    "ddim": samplers.ddim(),
    "dpm_solver": samplers.dpm_solver(),
    "euler_maruyama": samplers.euler_maruyama(),
    "heun": samplers.heun(),
    "heun, churn": samplers.heun(churn=40.0),
}


def parse():
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--model", choices=programs.MODELS, help="a DiT of the paper, in bfloat16")
    parser.add_argument("--batch", type=int, default=40)
    parser.add_argument("--steps", type=int, default=10, help="of a sampler; Heun takes half")
    parser.add_argument("--repeats", type=int, default=15)
    return parser.parse_args()


def main():
    args = parse()
    model, shape = programs.network(args.model)
    tasks = {name: programs.Task(model, shape, each, 5) for name, each in PROCESSES.items()}
    first = next(iter(tasks.values()))
    device = jax.devices()[0]
    print(
        f"{device.device_kind}, jax {jax.__version__}; {programs.num_params(first) / 1e6:.1f} M "
        f"parameters, input {shape}, batch {args.batch}, {jnp.dtype(model.dtype).name}",
        flush=True,
    )
    steps(tasks, args)
    sampling(model, shape, args)


def steps(tasks, args):
    """Prints the table of train steps."""
    device = jax.devices()[:1]
    batch = programs.first_batch(next(iter(tasks.values())), args.batch)
    make = jax.jit(lambda: programs.first_state(next(iter(tasks.values())), "vanilla"))
    # All processes train one state, so that large models fit.
    state = make()
    calls = {}

    def take(step):
        nonlocal state
        state, _ = jax.block_until_ready(step(state, batch))

    for name, task in tasks.items():
        program = programs.compile_step(task, "vanilla", args.batch, device)
        print(f"compiled {name} in {program.compile_seconds:.1f} s", flush=True)
        calls[name] = functools.partial(take, program.compiled)
    times = interleaved(calls, args.repeats)
    rows = [
        [name, f"{1000 * np.median(each):.1f}", *ratio(each, times["DDPM, noise"])]
        for name, each in times.items()
    ]
    table(["process", "ms per step", "ratio to DDPM", "95 % interval"], rows)


def sampling(model, shape, args):
    """Prints the table of samplers."""
    task = programs.Task(model, shape, diffusion.Flow(), 5)
    params = jax.jit(lambda: programs.first_state(task, "vanilla").params)()
    labels = jnp.arange(args.batch) % model.num_classes
    denoise = Partial(model.apply, {"params": params})
    key = jax.random.key(0)
    calls, evaluations = {}, {}

    def draw(process, sampler, options):
        out = sampler(process, denoise, (args.batch, *shape), key, options, labels)
        jax.block_until_ready(out)

    for process_name, process in PROCESSES.items():
        if process_name in ("DDPM, v", "flow, logit-normal"):
            continue
        for name, sampler in SAMPLERS.items():
            if name == "ddpm" and not process_name.startswith("DDPM"):
                continue
            number = args.steps // 2 if name.startswith("heun") else args.steps
            options = samplers.SampleOptions(num_steps=number, clip_x0=False)
            label = f"{process_name.partition(',')[0]}: {name}"
            evaluations[label] = sampler.calls(number)
            calls[label] = functools.partial(draw, process, sampler, options)
    for number in sorted(set(evaluations.values())):
        alone = functools.partial(network_alone, denoise, labels, shape, number)
        calls[number] = lambda alone=alone: jax.block_until_ready(alone())
    times = interleaved(calls, args.repeats)
    rows = [
        [
            label,
            str(number),
            f"{1000 * np.median(times[label]) / args.batch:.2f}",
            *ratio(times[label], times[number]),
        ]
        for label, number in evaluations.items()
    ]
    columns = ["process: sampler", "NFE", "ms per image", "ratio to the network", "95 % interval"]
    table(columns, rows)


@functools.partial(jax.jit, static_argnums=(2, 3))
def network_alone(denoise, labels, shape, number):
    """Calls the network again and again; each call takes the result of the one before."""
    x = jax.random.normal(jax.random.key(0), (len(labels), *shape))

    def body(x, t):
        return denoise(x, jnp.full(len(labels), t), labels), None

    return jax.lax.scan(body, x, jnp.linspace(0, 1, number))[0]


def interleaved(calls, repeats):
    """Seconds of every call in each round, after one round that compiles."""
    for call in calls.values():
        call()
    names, times = list(calls), {name: [] for name in calls}
    rng = np.random.default_rng(0)
    for round_number in range(repeats):
        for i in rng.permutation(len(names)):
            begin = time.perf_counter()
            calls[names[i]]()
            times[names[i]].append(time.perf_counter() - begin)
        print(f"\rround {round_number + 1}/{repeats}", end="", flush=True)
    return times


def ratio(times, others):
    """The median ratio and its interval, as words."""
    ratios = np.array(times) / np.array(others)
    resampled = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    low, high = np.quantile(np.median(resampled, 1), [0.025, 0.975])
    return f"{np.median(ratios):.3f}", f"{low:.3f} to {high:.3f}"


def table(columns, rows):
    print("\n")
    for row in [columns, ["---"] * len(columns), *rows]:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
