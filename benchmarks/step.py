"""Compares the cost of each method's train step with vanilla: ``python -m benchmarks.step``.

All variants run in one process on the same parameters, optimizer and EMA. In every round each
variant takes one step, in random order. A ratio is the median over rounds of (variant / vanilla of
the same round), with a 95 % bootstrap interval. Before that, if the device reports its peak of
memory, each variant takes two steps in a separate process, because the peak only grows within a
process.

The defaults are the reference size for 2 CPU cores. The first two commands below are for an
accelerator. The third compiles for a TPU on any machine, with libtpu installed::

  python -m benchmarks.step --model L/2
  python -m benchmarks.step --model XL/2 --batch auto --remat dots
  python -m benchmarks.step --model L/2 --compile_only --target v5p:2x2x1

GB are 10^9 bytes on one device. ``--model`` needs ml_collections; everything else needs only jax,
flax, optax and numpy.
"""

import argparse
import math
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

from ant_jax import diffusion
from ant_jax.models.attention import ATTENTION
from ant_jax.models.dit import DiT
from ant_jax.models.remat import REMAT
from ant_jax.runtime.devices import replicate, replicated
from benchmarks import flops, programs


def parse():
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument(
        "--model", choices=programs.MODELS, help="a model of the configs imagenet256_dit_*"
    )
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--patch", type=int, default=2)
    parser.add_argument("--size", type=int, default=16, help="side of the input")
    parser.add_argument("--channels", type=int, default=4)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--batch", help="default: the config's, or 40; auto: the largest that fits")
    parser.add_argument("--k", type=int, default=5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"])
    parser.add_argument("--remat", choices=REMAT)
    parser.add_argument("--attention", choices=ATTENTION)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument(
        "--variants",
        nargs="+",
        default=programs.VARIANTS,
        type=programs.variant,
        metavar="METHOD[/FORM[/MICROBATCHES]]",
    )
    parser.add_argument("--compile_only", action="store_true", help="take no step")
    parser.add_argument("--target", help="a TPU to compile for, such as v5p:2x2x1; uses one chip")
    parser.add_argument(
        "--peak_tflops", type=float, help="of one device, if ant-jax does not know it"
    )
    args = parser.parse_args()
    if args.target and not args.compile_only:
        parser.error("--target is for --compile_only")
    args.variants = ["vanilla", *(name for name in args.variants if name != "vanilla")]
    return args


def main():
    args = parse()
    task, batch_size = what(args)
    if args.batch == "auto":
        batch_size = alone(largest_batch, args)
    # Measure before this process takes the devices and their memory.
    device_bytes = {} if args.compile_only else peaks(args, batch_size)
    devices = devices_of(args)
    print(
        f"{devices[0].device_kind}, {len(devices)} device(s), jax {jax.__version__}; "
        f"{programs.num_params(task) / 1e6:.1f} M parameters, input {task.shape}, "
        f"batch {batch_size}, k = {task.k}, {jnp.dtype(task.model.dtype).name}, "
        f"remat {task.model.remat}, attention {task.model.attention}",
        flush=True,
    )
    compiled = {}
    for name in args.variants:
        compiled[name] = programs.compile_step(task, name, batch_size, devices)
        needed = programs.program_bytes(compiled[name].compiled) / 1e9
        seconds = compiled[name].compile_seconds
        print(f"compiled {name} in {seconds:.1f} s: {needed:.2f} GB", flush=True)
    first_seconds, times = {}, {}
    if not args.compile_only:
        first_seconds, times = run(task, compiled, batch_size, devices, args.repeats)
    table(args, task, batch_size, devices, compiled, device_bytes, first_seconds, times)
    limits_of(task, batch_size, compiled)


def what(args):
    """The task, and the batch size unless it is "auto"."""
    fields = {"dtype": args.dtype and jnp.dtype(args.dtype), "remat": args.remat}
    fields |= {"attention": args.attention}
    fields = {name: value for name, value in fields.items() if value}
    if args.model:
        task, size = programs.published(args.model, args.k)
    else:
        shape, size = (args.size, args.size, args.channels), 40
        model = DiT(
            width=args.width,
            depth=args.depth,
            heads=args.heads,
            patch=args.patch,
            channels=args.channels,
            num_classes=args.classes,
        )
        task = programs.Task(model, shape, diffusion.gaussian(), args.k)
    size = int(args.batch) if args.batch not in (None, "auto") else size
    # Not in the config: building attention from it queries the devices, which this process must not
    # take yet.
    return task._replace(model=task.model.clone(**fields)), size


def devices_of(args):
    if not args.target:
        return jax.local_devices()
    try:
        return programs.tpus(args.target)[:1]
    except (RuntimeError, ValueError) as error:
        sys.exit(f"--target={args.target}: {error} (is libtpu installed? pip install -e '.[tpu]')")


def alone(function, *args):
    """The result of a function in a process of its own, which frees the devices at its end."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(function, *args).result()


def largest_batch(args):
    """The largest batch for which the programs of all variants fit the device's memory."""
    task, _ = what(args)
    devices = devices_of(args)
    # A compiler for an absent device checks the memory; for a present device we must check it.
    limit = float("inf") if args.target else programs.memory_limit(devices[0])

    def fits(size):
        for name in args.variants:
            try:
                program = programs.compile_step(task, name, size, devices)
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                return False
            needed = programs.program_bytes(program.compiled)
            print(f"batch {size}, {name}: {needed / 1e9:.2f} GB", flush=True)
            if needed > limit:
                return False
        return True

    microbatches = math.lcm(*map(programs.microbatches_of, args.variants))
    return programs.largest_batch(fits, microbatches * args.k * len(devices))


def peaks(args, batch_size):
    """Peak bytes of each variant on a device; empty if devices do not report them."""
    if not alone(reports_memory):
        return {}
    return {name: alone(peak, args, batch_size, name) for name in args.variants}


def reports_memory():
    return jax.local_devices()[0].memory_stats() is not None


def peak(args, batch_size, name):
    """Peak bytes of two steps of a variant on a device."""
    task, _ = what(args)
    devices = devices_of(args)
    program = programs.compile_step(task, name, batch_size, devices)
    state, batch = new_state(task, name, devices), programs.first_batch(task, batch_size)
    for _ in range(2):
        state, _ = program.compiled(state, batch)
    jax.block_until_ready(state)
    found = [device.memory_stats() for device in devices]
    return max(stats["peak_bytes_in_use"] for stats in found if stats is not None)


def new_state(task, name, devices):
    make = jax.jit(lambda: programs.first_state(task, name), out_shardings=replicated(devices))
    return programs.place(make(), devices)


def run(task, compiled, batch_size, devices, repeats):
    """Seconds of each variant's first step, and of its steps in all rounds."""
    batch = programs.first_batch(task, batch_size)
    # All variants share one set of parameters and moments, so that large models fit.
    core = new_state(task, "vanilla", devices)
    method_states = {
        name: replicate(programs.first_method_state(task, name), devices) for name in compiled
    }
    first_seconds, times = {}, {name: [] for name in compiled}

    def take(core, name):
        begin = time.perf_counter()
        state = core._replace(method_state=method_states[name])
        state, _ = jax.block_until_ready(compiled[name].compiled(state, batch))
        method_states[name] = state.method_state
        return state, time.perf_counter() - begin

    for name in compiled:
        core, first_seconds[name] = take(core, name)
    rng = np.random.default_rng(0)
    for round_ in range(repeats):
        for name in rng.permutation(list(compiled)):
            core, seconds = take(core, name)
            times[name].append(seconds)
        print(f"\rround {round_ + 1}/{repeats}", end="", flush=True)
    return first_seconds, times


def table(args, task, batch_size, devices, compiled, device_bytes, first_seconds, times):
    work = batch_size * flops.gradient_flops(task.model, *task.shape[:2])
    peak_tflops = args.peak_tflops
    if peak_tflops is None and task.model.dtype == jnp.bfloat16:
        peak_tflops = flops.PEAK_TFLOPS.get(devices[0].device_kind)
    columns = ["variant", "ms per step", "ratio to vanilla", "95 % interval", "MFU", "TFLOP by XLA"]
    columns += ["program GB", "device GB", "trace s", "compile s", "first step s"]
    print(f"\n\nvanilla's products from the architecture: {work / 1e12:.4g} TFLOP a step\n")
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    rng = np.random.default_rng(0)
    for name, program in compiled.items():
        cells = ["-"] * 4
        if times:
            ratios = np.array(times[name]) / np.array(times["vanilla"])
            resampled = rng.choice(ratios, (2000, len(ratios)))
            low, high = np.quantile(np.median(resampled, 1), [0.025, 0.975])
            seconds = np.median(times[name])
            cells = [f"{1000 * seconds:.1f}", f"{np.median(ratios):.3f}"]
            cells.append(f"{low:.3f} to {high:.3f}")
            possible = seconds * len(devices) * (peak_tflops or 0) * 1e12
            cells.append(f"{work / possible:.1%}" if possible else "-")
        # XLA counts the body of a loop once, and cuDNN's work not at all.
        hidden = programs.has_loop(name) or task.model.attention == "cudnn"
        total = program.compiled.cost_analysis()["flops"] * len(devices) / 1e12
        cells.append("-" if hidden else f"{total:.4g}")
        cells.append(f"{programs.program_bytes(program.compiled) / 1e9:.2f}")
        cells.append(f"{device_bytes[name] / 1e9:.2f}" if device_bytes.get(name) else "-")
        cells += [f"{program.lower_seconds:.1f}", f"{program.compile_seconds:.1f}"]
        cells.append(f"{first_seconds[name]:.2f}" if first_seconds else "-")
        print(f"| {name} | {' | '.join(cells)} |")


def limits_of(task, batch_size, compiled):
    """Prints the limits of the k gradients' cost: memory and FLOPs relative to vanilla."""
    params = programs.num_params(task)
    combine = flops.combine_flops(params, task.k)
    share = combine / (batch_size * flops.gradient_flops(task.model, *task.shape[:2]))
    print(
        f"\nGram matrix and weighted sum from the architecture: {share:.2%} of vanilla's products"
    )
    vanilla = programs.program_bytes(compiled["vanilla"].compiled)
    limits = {
        "vmap": ("vanilla + (k + 1) x parameters", vanilla + (task.k + 1) * 4 * params),
        "scan": ("vanilla", vanilla),
    }
    for name, program in compiled.items():
        # Microbatches save memory themselves, and have no limit here.
        form = name.partition("/")[2]
        if form in limits:
            words, limit = limits[form]
            used = programs.program_bytes(program.compiled)
            sign = "<=" if used <= limit else ">"
            print(f"{name}: program {used / 1e9:.2f} GB {sign} {limit / 1e9:.2f} GB = {words}")


if __name__ == "__main__":
    main()
