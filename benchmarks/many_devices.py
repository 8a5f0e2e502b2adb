"""What a step costs each of n devices: ``python -m benchmarks.many_devices``.

The table has three forms of one step. "vanilla" is plain training. "own tasks" is any method with a
Gram matrix: a device computes the gradients of its own tasks, and updates its part of the
parameters. "all tasks" is the form before that: each device computed all k gradients, of its share
of each task, and updated all parameters.

  python -m benchmarks.many_devices
  python -m benchmarks.many_devices --devices 8 --compile
  python -m benchmarks.many_devices --devices 64 256 --model S/2 --depth 1 --compile

The formulas follow from the architecture. ``--compile`` also compiles vanilla and Nash-MTL for that
many virtual CPU devices and compares; nothing runs. ``--target`` compiles for TPUs instead, with
libtpu installed. GB are 10^9 bytes; the sum is without activations. All commands need
ml_collections.
"""

import argparse
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ant_jax.models.remat import REMAT
from ant_jax.mtl.blocks import blocks
from benchmarks import flops, programs

# The name of each form, and the variant that has it.
FORMS = {"vanilla": "vanilla", "own tasks": "nash", "all tasks": None}


class Costs(NamedTuple):
    """What one step costs a device.

    Attributes:
      sent: bytes that it sends in collectives, by the ring algorithm.
      parameters: bytes of the parameters.
      state: bytes of Adam's moments and the moving average.
      gradients: bytes of the most gradients that it holds at once.
      network: FLOPs of the network, forward and backward.
      combine: FLOPs of the Gram matrix and the weighted sum.
    """

    sent: float
    parameters: float
    state: float
    gradients: float
    network: float
    combine: float


def costs(form: str, num_params: int, k: int, n: int, network: float) -> Costs:
    """The costs of a form on each of n devices; ``network`` is the network's FLOPs on all."""
    one = 4 * num_params
    held = {"vanilla": 1, "own tasks": blocks(k, n).slots, "all tasks": k}[form]
    return Costs(
        # The gradients out, by an all-to-all or a reduce-scatter, and one gradient or the new
        # parameters back.
        sent=(held + 1) * one * (n - 1) / n,
        parameters=one,
        state=3 * one / (1 if form == "all tasks" else n),
        gradients=held * one,
        network=network / n,
        combine=0 if form == "vanilla" else flops.combine_flops(num_params, k) / n,
    )


def nearest_batch(size: int, k: int, n: int) -> int:
    """The batch size nearest to ``size`` that `train_step.check_step` accepts."""
    unit = math.lcm(k, n)
    return max(round(size / unit), 1) * unit


def parse():
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--model", choices=programs.MODELS, default="XL/2")
    parser.add_argument("--depth", type=int, help="number of blocks, instead of the model's")
    parser.add_argument("--remat", choices=REMAT)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"])
    parser.add_argument("--k", type=int, nargs="+", default=[5, 8])
    parser.add_argument("--devices", type=int, nargs="+", default=[8, 64, 256])
    parser.add_argument("--batch", type=int, default=256, help="or the nearest size that fits")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--target", help="TPUs to compile for, such as v5p:2x2x2 for 8")
    return parser.parse_args()


def main():
    args = parse()
    # Before JAX has devices. A program for TPUs needs them too: the step asks how many there are.
    jax.config.update("jax_num_cpu_devices", max(args.devices))
    fields = {"depth": args.depth, "remat": args.remat}
    fields |= {"dtype": args.dtype and jnp.dtype(args.dtype)}
    fields = {name: value for name, value in fields.items() if value}
    columns = ["k", "devices", "batch", "form", "sent GB", "parameters GB", "optimizer and EMA GB"]
    columns += ["gradients GB", "sum GB", "network TFLOP", "combining TFLOP"]
    if args.compile or args.target:
        columns += ["sent, compiled / formula", "arguments, compiled / formula"]
        columns += ["FLOPs, compiled / formula", "temporaries GB, compiled", "compile s"]
    task, _ = programs.published(args.model, 1)
    task = task._replace(model=task.model.clone(**fields))
    num_params = programs.num_params(task)
    print(
        f"jax {jax.__version__}; {args.model}, {task.model.depth} blocks, {num_params / 1e6:.1f} M "
        f"parameters, {jnp.dtype(task.model.dtype).name}, remat {task.model.remat}\n"
    )
    print(f"| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    for k in args.k:
        for n in args.devices:
            batch = nearest_batch(args.batch, k, n)
            network = batch * flops.step_flops(task.model, *task.shape[:2])
            for form, variant in FORMS.items():
                found = costs(form, num_params, k, n, network)
                cells = [k, n, batch, form]
                cells += [f"{each / 1e9:.3f}" for each in (*found[:4], sum(found[1:4]))]
                cells += [f"{each / 1e12:.4g}" for each in found[4:]]
                if (args.compile or args.target) and variant:
                    cells += compiled(task._replace(k=k), variant, batch, n, args.target, found)
                print(f"| {' | '.join(map(str, cells))} |", flush=True)


def compiled(task, variant, batch, n, target, formula):
    """The cells of a compiled program."""
    devices = programs.tpus(target) if target else jax.devices()[:n]
    program = programs.compile_step(task, variant, batch, devices)
    memory, cost = programs.memory_of(program.compiled), program.compiled.cost_analysis()
    assert cost is not None
    sent = "-" if target else f"{programs.sent_bytes(program.compiled, n) / formula.sent:.4f}"
    arguments = memory.argument_size_in_bytes / (formula.parameters + formula.state)
    layout = blocks(task.k, n)
    # XLA counts the body of a loop once: here the loop over groups.
    once = 1 if variant == "vanilla" or layout.one_each else layout.groups
    work = cost["flops"]
    return [
        sent,
        f"{arguments:.4f}",
        f"{work / (formula.network / once + formula.combine):.4f}",
        f"{memory.temp_size_in_bytes / 1e9:.3f}",
        f"{program.lower_seconds + program.compile_seconds:.0f}",
    ]


if __name__ == "__main__":
    main()
