"""Runs a step on the devices of this process."""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as Spec

Step = Callable[..., tuple[Any, Any]]

# pmap's axis and the mesh of replicated arrays share one name. With two names, the first output of
# pmap has another sharding than its input, and pmap compiles the step again.
_AXIS = "batch"


class CompiledStep(Protocol):
    """A step that is compiled at its first call, or by ``lower``; `jax.jit` returns such."""

    def __call__(self, *arguments: Any) -> tuple[Any, Any]:
        """Runs the step."""
        ...

    @property
    def lower(self) -> Callable[..., jax.stages.Lowered]:
        """Lowers the step for such arguments."""
        ...


@dataclasses.dataclass(frozen=True)
class _LowerableStep:
    run: Step
    lower: Callable[..., jax.stages.Lowered]

    def __call__(self, *arguments):
        return self.run(*arguments)


def parallel_step(
    step: Step, devices: Sequence[jax.Device], state_axes: Any = None
) -> CompiledStep:
    """Compiles a step for the devices of this process: `jax.jit` for one, `jax.pmap` for many.

    Args:
      step: ``(state, batch, *extra, axis_name=None) -> (state, metrics)``, such as `train_step`
        with its settings bound.
      devices: the devices of this process.
      state_axes: pytree like the state or its upper part: 0 where a leaf is split over the devices,
        which are then its first axis, and None where each device has it whole.

    Returns:
      ``(state, batch, *extra) -> (state, metrics)``. ``batch`` is this process's part of the global
      batch; its size is a multiple of the number of devices. ``extra`` is the same on all devices.
      The state is donated; put the first state on the devices by `replicate`, and split it by
      `parts_of`. The function has a method ``lower`` like that of `jax.jit`; a later call
      reuses the program that it compiles. With several processes ``lower`` accepts arrays only, not
      `jax.ShapeDtypeStruct`.
    """
    if alone(devices):
        return jax.jit(step, donate_argnums=0, compiler_options=compiler_options(devices))

    def on_device(whole, parts, batch, extra):
        state, metrics = step(_joined(whole, parts), batch, *extra, axis_name=_AXIS)
        return *_separated(state, state_axes), metrics

    mapped = _pmap(on_device, devices, (None, 0, 0, None), (None, 0, None), donate_argnums=(0, 1))
    split = lambda leaf: leaf.reshape(len(devices), -1, *leaf.shape[1:])
    split_batch = lambda batch: jax.tree.map(split, batch)

    def run(state, batch, *extra):
        found = mapped(*_separated(state, state_axes), split_batch(batch), extra)
        return _joined(*found[:2]), found[2]

    def lower(state, batch, *extra):
        of_shapes = jax.process_count() == 1
        batch = jax.eval_shape(split_batch, batch) if of_shapes else split_batch(batch)
        return mapped.lower(*_separated(state, state_axes), batch, extra)

    return _LowerableStep(run, lower)


def partitioned_step(
    step: Step, devices: Sequence[jax.Device], state_shardings: Any
) -> CompiledStep:
    """Compiles a step on the global batch by `jax.jit`, which partitions it over devices.

    Args:
      step: as that of `parallel_step`; it gets no ``axis_name``.
      devices: of all processes, those of one process together.
      state_shardings: pytree like the state or its upper part.

    Returns:
      As `parallel_step`; the state has ``state_shardings``.
    """
    of_batch, whole = split_over(devices), replicated(devices)

    def partitioned(state, batch, extra):
        return step(state, batch, *extra)

    compiled = jax.jit(
        partitioned,
        in_shardings=(state_shardings, of_batch, whole),
        out_shardings=(state_shardings, whole),
        donate_argnums=0,
        compiler_options=compiler_options(devices),
    )

    def placed(batch):
        if jax.process_count() == 1:
            return batch
        return jax.tree.map(
            lambda leaf: jax.make_array_from_process_local_data(of_batch, leaf), batch
        )

    def run(state, batch, *extra):
        return compiled(state, placed(batch), extra)

    return _LowerableStep(
        run, lambda state, batch, *extra: compiled.lower(state, placed(batch), extra)
    )


def parallel_map(
    function: Callable,
    devices: Sequence[jax.Device],
    in_axes: Any,
    out_axes: Any,
) -> Callable:
    """Compiles ``function(argument, axis_name)`` for the devices of all processes.

    Args:
      function: what each device does.
      devices: the devices of this process.
      in_axes: pytree like the argument or its upper part: 0 where a leaf is split over the devices,
        None where each device has it whole.
      out_axes: the same of the result.
    """

    def on_device(whole, parts, _):
        return _separated(function(_joined(whole, parts), axis_name=_AXIS), out_axes)

    mapped = _pmap(on_device, devices, (None, 0, 0), (None, 0))

    def run(argument):
        # pmap needs at least one argument that is split.
        return _joined(*mapped(*_separated(argument, in_axes), np.zeros(len(devices))))

    return run


def _separated(tree, axes):
    """Two trees, what is whole and what is split, each with None in place of the other's leaves.

    With several processes pmap takes no axes that hold dicts, as those of a state do.
    """
    pick = lambda wanted: jax.tree.map(
        lambda axis, part: part if axis == wanted else jax.tree.map(lambda _: None, part),
        axes,
        tree,
        is_leaf=lambda axis: axis is None,
    )
    return pick(None), pick(0)


def _joined(whole, parts):
    """The inverse of `_separated`."""
    choose = lambda a, b: b if a is None else a
    return jax.tree.map(choose, whole, parts, is_leaf=lambda leaf: leaf is None)


def _pmap(function, devices, in_axes, out_axes, donate_argnums=()):
    return jax.pmap(
        function,
        axis_name=_AXIS,
        in_axes=in_axes,
        out_axes=out_axes,
        devices=devices if jax.process_count() == 1 else None,
        donate_argnums=donate_argnums,
    )


def alone(devices: Sequence[jax.Device]) -> bool:
    """Whether a step runs on one device only, of one process."""
    return jax.device_count() == 1 or (jax.process_count() == 1 and len(devices) == 1)


def compiler_options(devices: Sequence[jax.Device]) -> dict[str, int | bool] | None:
    """Options for compiling large programs with `jax.jit`; pmap accepts no options.

    On GPUs cuBLAS computes all products, because it also applies biases and a GELU within them,
    unless XLA_FLAGS says whether Triton does.

    For CPUs it is optimization level 2 instead of 3, which compiles faster. Random parameters stay
    equal bit for bit; other results may differ by rounding. Level 1 is not faster, and level 0
    changes the random parameters.
    """
    if devices[0].platform == "gpu":
        said = "xla_gpu_enable_triton_gemm" in os.environ.get("XLA_FLAGS", "")
        return None if said else {"xla_gpu_enable_triton_gemm": False}
    if devices[0].platform != "cpu" or jax.config.read("jax_disable_most_optimizations"):
        return None
    return {"xla_backend_optimization_level": 2}


def replicated(devices: Sequence[jax.Device]) -> jax.sharding.NamedSharding:
    """The sharding of arrays that each device holds whole."""
    mesh = jax.sharding.Mesh(np.asarray(devices), (_AXIS,))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def split_over(devices: Sequence[jax.Device]) -> jax.sharding.NamedSharding:
    """The sharding of arrays whose leading axis is split over the devices."""
    mesh = jax.sharding.Mesh(np.asarray(devices), (_AXIS,))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(_AXIS))


def sharding_of(shape: Sequence[int], devices: Sequence[jax.Device]) -> jax.sharding.NamedSharding:
    """The sharding of an array whose largest possible axis is split over the devices.

    That is the largest axis that the number of devices divides. Without one each device holds the
    array whole.
    """
    mesh = jax.sharding.Mesh(np.asarray(devices), (_AXIS,))
    return jax.sharding.NamedSharding(mesh, spec_of(shape, len(devices), _AXIS))


def spec_of(shape: Sequence[int], count: int, names: str | tuple[str, ...]) -> Spec:
    """The spec of `sharding_of` for a number of devices, by the names of its mesh axes."""
    axes = [i for i, size in enumerate(shape) if size and size % count == 0]
    if not axes:
        return Spec()
    return Spec(*[None] * max(axes, key=lambda i: shape[i]), names)


def abstract(tree: Any, devices: Sequence[jax.Device], axes: Any = None) -> Any:
    """The shapes, types and shardings of a pytree on the devices of one process.

    Args:
      tree: arrays or shapes, each whole.
      devices: the devices of this process.
      axes: pytree like ``tree`` or its upper part: 0 where a leaf is split over the devices, see
        `mtl.shards`, and None where each device has it whole.
    """

    def of(axis, leaf):
        if axis is None:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated(devices))
        shape = len(devices), _part_size(leaf, len(devices))
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=split_over(devices))

    below = lambda axis, part: jax.tree.map(functools.partial(of, axis), part)
    return jax.tree.map(below, axes, tree, is_leaf=lambda axis: axis is None)


def parts_of(tree: Any, devices: Sequence[jax.Device], axes: Any) -> Any:
    """Leaves each device its part of the arrays that are split, as in `abstract`.

    They go through the host, which needs no compiled program.

    Args:
      tree: arrays that each device of this process holds whole.
      devices: the devices of this process.
      axes: see `abstract`.
    """
    processes, index = jax.process_count(), jax.process_index()

    def of(axis, leaf):
        if axis is None:
            return leaf
        # Of the devices of all processes.
        size = _part_size(leaf, processes * len(devices))
        parts = np.zeros((processes, len(devices), size), leaf.dtype)
        parts.reshape(-1)[: leaf.size] = np.ravel(leaf)
        return jax.device_put(parts[index], split_over(devices))

    below = lambda axis, part: jax.tree.map(functools.partial(of, axis), part)
    return jax.tree.map(below, axes, tree, is_leaf=lambda axis: axis is None)


def _part_size(leaf, devices):
    """Number of entries on each of all devices; see `mtl.shards.part_size`."""
    return max(-(-leaf.size // devices), 1)


def replicate(tree: Any, devices: Sequence[jax.Device]) -> Any:
    """Puts a whole copy of a pytree on each device."""
    return jax.device_put(tree, replicated(devices))


def shard(tree: Any, devices: Sequence[jax.Device]) -> Any:
    """Puts a pytree of host arrays, the same in all processes, on devices by `sharding_of`."""

    def of(leaf):
        part = lambda index: np.asarray(leaf)[index]
        return jax.make_array_from_callback(leaf.shape, sharding_of(leaf.shape, devices), part)

    return jax.tree.map(of, tree)


def shard_in_process(tree: Any, devices: Sequence[jax.Device]) -> Any:
    """Shards arrays over the devices of each process, instead of those of all processes.

    Args:
      tree: pytree of arrays by `sharding_of`.
      devices: of all processes, those of one process together.
    """
    if jax.process_count() == 1:
        return tree
    here = [each for each in devices if each.process_index == jax.process_index()]
    mesh = jax.sharding.Mesh(np.asarray(devices).reshape(-1, len(here)), ("process", _AXIS))
    in_process = lambda leaf: jax.sharding.NamedSharding(
        mesh, spec_of(leaf.shape, len(here), _AXIS)
    )
    leaves, structure = jax.tree.flatten(tree)
    everywhere = structure.unflatten(_resharded(tuple(map(in_process, leaves)))(leaves))

    def local(leaf):
        shards = [shard.data for shard in leaf.addressable_shards]
        sharding = sharding_of(leaf.shape, here)
        return jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards)

    return jax.tree.map(local, everywhere)


@functools.lru_cache(maxsize=8)
def _resharded(shardings):
    """A function that is traced once, of a list of arrays."""
    return jax.jit(lambda leaves: leaves, out_shardings=list(shardings))


def checksums(tree: Any) -> list[int]:
    """A 32-bit checksum from each device of this process, to find replicas that differ.

    Args:
      tree: arrays that each device holds whole, or that are split over devices. All processes call
        this together if the devices of several processes hold one array.
    """
    return [int(shard.data) for shard in _checksum(tree).addressable_shards]


@jax.jit
def _checksum(tree):
    def of_leaf(leaf):
        if leaf.dtype == bool:
            leaf = leaf.astype(jnp.uint8)
        unsigned = jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")
        bits = jax.lax.bitcast_convert_type(leaf, unsigned)
        # Of each entry in the flat array, without making it flat: sharded arrays stay sharded.
        index = jnp.zeros(leaf.shape, jnp.uint32)
        for axis, size in enumerate(leaf.shape):
            index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(
                jnp.uint32, leaf.shape, axis
            )
        # Each value has another odd factor, so a changed value or a swap changes the sum.
        factors = jnp.uint32(2654435761) * index | jnp.uint32(1)
        return jnp.sum(bits.astype(jnp.uint32) * factors, dtype=jnp.uint32)

    total = jnp.uint32(0)
    for leaf in jax.tree.leaves(tree):
        total = total * jnp.uint32(31) + of_leaf(leaf)
    return total
