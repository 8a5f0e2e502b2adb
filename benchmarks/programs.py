"""Train steps compiled ahead of time, for the devices of this machine or for an absent TPU."""

import importlib
import math
import os
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies

from ant_jax import mtl, settings
from ant_jax.diffusion import Process
from ant_jax.models.dit import SIZES, DiT
from ant_jax.mtl.backward import FORMS
from ant_jax.platforms import making_for
from ant_jax.runtime.devices import abstract, parallel_step, parts_of, replicate
from ant_jax.tasks import clustering, clusters
from ant_jax.train_step import (
    Setup,
    TrainState,
    init_state,
    split_axes,
    train_step,
)

# METHOD, METHOD/FORM of the k gradients or METHOD/FORM/MICROBATCHES: each method by its fastest
# form, and the forms of Nash.
_METHODS = [name for name in settings.names_in(mtl, mtl.Weighting) if name != "vanilla"]
VARIANTS = [
    "vanilla",
    *_METHODS,
    *(f"nash/{form}" for form in ("scan", "masked")),
]
MODELS = ("S/2", "B/2", "L/2", "XL/2")


def variant(text: str) -> str:
    """Returns the text; raises a ValueError if it is no METHOD[/FORM[/MICROBATCHES]]."""
    method, form, microbatches = _parts(text)
    if method not in ("vanilla", *_METHODS) or form not in FORMS or microbatches < 1:
        raise ValueError(f"no such variant: {text!r}")
    return text


def microbatches_of(variant: str) -> int:
    """The number of microbatches of a variant."""
    return _parts(variant)[2]


def has_loop(variant: str) -> bool:
    """Whether its step computes gradients in a loop."""
    _, form, microbatches = _parts(variant)
    return form in ("scan", "masked") or microbatches > 1


def _parts(variant):
    method, form, microbatches = (*variant.split("/"), *[""] * (2 - variant.count("/")))
    return method, form or "vmap", int(microbatches or 1)


class Task(NamedTuple):
    """What a step trains.

    Attributes:
      model: the network, with the call signature of `ant_jax.models.dit.DiT`.
      shape: (H, W, C) of its input.
      process: the noise process.
      k: number of tasks.
    """

    model: DiT
    shape: tuple[int, int, int]
    process: Process
    k: int


class Program(NamedTuple):
    """A compiled step ``(state, batch) -> (state, metrics)``; it donates the state.

    Attributes:
      compiled: the step.
      lower_seconds: time to trace and lower it.
      compile_seconds: XLA's time to compile it.
    """

    compiled: jax.stages.Compiled
    lower_seconds: float
    compile_seconds: float


def published(name: str, k: int) -> tuple[Task, int]:
    """The task and the batch size of one of the configs imagenet256_dit_*; needs ml_collections."""
    from ant_jax import config as config_lib
    from ant_jax import experiment

    module = f"configs.imagenet256_dit_{name.lower().replace('/', '')}"
    config = importlib.import_module(module).get_config()
    model = experiment.build_model(config, channels=4, num_classes=1000)
    assert isinstance(model, DiT)
    task = Task(model, (32, 32, 4), config_lib.build_process(config), k)
    return task, config.data.batch_size


def network(name: str | None, **fields: Any) -> tuple[DiT, tuple[int, int, int]]:
    """A DiT of the paper in bfloat16, or by default one for 2 CPU cores; and its input's shape."""
    if name:
        size: dict[str, Any] = dict(SIZES[name.partition("/")[0]], dtype=jnp.bfloat16)
        return DiT(channels=4, patch=2, num_classes=1000, **size, **fields), (32, 32, 4)
    size = dict(width=384, depth=4, heads=6)
    return DiT(channels=4, patch=2, num_classes=10, **size, **fields), (16, 16, 4)


def first_state(task: Task, variant: str) -> TrainState:
    """The state before the first step; variants differ only in its `method_state`."""
    classes = task.model.num_classes
    labels = jnp.zeros(1, jnp.int32) if classes else None
    x, t = jnp.zeros((1, *task.shape)), jnp.zeros(1, jnp.int32)
    params = task.model.init(jax.random.key(0), x, t, labels)["params"]
    # Move away from adaLN-Zero's initial values, where gradients are zero and Nash has nothing to
    # solve. By random numbers: products of equal ones take less power, so GPUs compute them faster.
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    move = lambda leaf, key: leaf + 0.02 * jax.random.normal(key, leaf.shape)
    params = jax.tree.unflatten(structure, map(move, leaves, keys))
    return init_state(params, _OPTIMIZER, _weighting(task, variant))


def first_method_state(task: Task, variant: str) -> mtl.CombineState:
    """The `method_state` of `first_state`, without its large arrays."""
    return mtl.init_combine(_weighting(task, variant))


def place(state: TrainState, devices: Sequence[jax.Device]) -> TrainState:
    """The state on the devices, as a compiled step takes it."""
    state = replicate(state, devices)
    if len(devices) == 1:
        return state
    return parts_of(state, devices, split_axes(_OPTIMIZER, state.params))


def first_batch(task: Task, size: int) -> dict[str, np.ndarray]:
    """A batch of random examples."""
    rng = np.random.default_rng(0)
    batch: dict[str, np.ndarray] = {
        "image": rng.normal(size=(size, *task.shape)).astype(np.float32)
    }
    if task.model.num_classes:
        batch["label"] = rng.integers(0, task.model.num_classes, size).astype(np.int32)
    return batch


def step_of(task: Task, variant: str) -> Callable:
    """The train step of a variant, not compiled, as an argument of `parallel_step`."""
    method, form, microbatches = _parts(variant)
    costs = clustering.snr_costs(task.process.log_snr(clusters.levels(task.process)))
    positions = clustering.interval_clusters(costs, task.k)

    def apply_fn(params, x, t, y) -> Any:
        return task.model.apply({"params": params}, x, t, y)

    setup = Setup(
        apply_fn=apply_fn,
        process=task.process,
        boundaries=clusters.level_boundaries(task.process, positions),
        weighting=_weighting(task, variant),
        optimizer=_OPTIMIZER,
        seed=0,
        draw="uniform" if method == "vanilla" else "stratified",
        form=form,
        microbatches=microbatches,
        num_classes=task.model.num_classes,
        label_dropout=0.1 if task.model.num_classes else 0.0,
        split=True,
    )
    return lambda state, batch, axis_name=None: train_step(state, batch, setup, axis_name)


def compile_step(task: Task, variant: str, size: int, devices: Sequence[jax.Device]) -> Program:
    """Compiles the step of a variant for a batch size; puts no data on the devices."""
    state = jax.eval_shape(lambda: first_state(task, variant))
    axes = None if len(devices) == 1 else split_axes(_OPTIMIZER, state.params)
    state = abstract(state, devices, axes)
    batch = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, first_batch(task, size)))
    step = mapped = parallel_step(step_of(task, variant), devices, axes)
    if len(devices) > 1:
        # A program of pmap takes a batch that is already split over the devices.
        step = jax.jit(lambda state, batch: mapped(state, batch), donate_argnums=0)
    begin = time.perf_counter()
    with making_for(devices[0].platform):
        lowered = step.lower(state, batch)
    middle = time.perf_counter()
    compiled = lowered.compile()
    return Program(compiled, middle - begin, time.perf_counter() - middle)


def memory_of(compiled: jax.stages.Compiled) -> Any:
    """XLA's `CompiledMemoryStats` of a program."""
    found = compiled.memory_analysis()
    assert found is not None  # CPUs, GPUs and TPUs have it
    return found


def program_bytes(compiled: jax.stages.Compiled) -> int:
    """Peak bytes of a program on a device: arguments, results and temporaries."""
    memory = memory_of(compiled)
    return (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )


def sent_bytes(compiled: jax.stages.Compiled, num_devices: int) -> float:
    """Bytes that each device sends in a program's collectives, by the ring algorithm.

    They are counted in the text of the program. It must be compiled for CPUs: compilers for
    accelerators write some collectives in other forms. A collective inside a loop counts once.
    """
    pattern = r"= (.*?) (all-[\w-]+|reduce-scatter|collective-permute)\("
    total = 0
    for line in str(compiled.as_text()).splitlines():
        found = re.search(pattern, line)
        if not found:
            continue
        types, kind = found.groups()
        elements = sum(
            math.prod(map(int, filter(None, shape.split(","))))
            for shape in re.findall(r"[fs]32\[([\d,]*)\]", types)
        )
        n = _group_size(line, num_devices)
        # By the shape of the result, of which a reduce-scatter gives 1 / n.
        times = {"all-reduce": 2, "reduce-scatter": n, "collective-permute": n / (n - 1)}
        total += 4 * elements * times.get(kind, 1) * (n - 1) / n
    return total


def _group_size(line, num_devices):
    """Number of the devices that one collective joins."""
    if found := re.search(r"replica_groups=mesh\[(.*?)\].*?{(.*?)}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[name]) for name in re.findall(r"'(\w+)'", found[2]))
    found = re.search(r"replica_groups=\[\d+,(\d+)\]", line)
    return int(found[1]) if found else num_devices


def num_params(task: Task) -> int:
    """The number of parameters of the network."""
    state = jax.eval_shape(lambda: first_state(task, "vanilla"))
    return sum(leaf.size for leaf in jax.tree.leaves(state.params))


def memory_limit(device: jax.Device) -> int:
    """Bytes that programs may use on a device; for a CPU the memory of the machine."""
    stats = device.memory_stats()
    if stats is None:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGESIZE")
    return stats["bytes_limit"]


def largest_batch(fits: Callable[[int], bool], unit: int) -> int:
    """The largest multiple of ``unit`` that fits, by doubling and then by bisection.

    Raises:
      ValueError: if one unit does not fit.
    """
    low, high = 0, 1
    while fits(high * unit):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * unit) else (low, middle)
    if low == 0:
        raise ValueError(f"not even a batch of {unit} fits")
    return low * unit


def tpus(topology: str) -> list[jax.Device]:
    """TPUs to compile for, such as "v5e:2x2"; needs libtpu, but no TPU."""
    # Do not query the metadata of a TPU machine, and do not lock a TPU.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices


_OPTIMIZER = optax.adamw(1e-4)


def _weighting(task, variant):
    method = settings.resolve(mtl, _parts(variant)[0], mtl.Weighting)
    return method(task.k)
