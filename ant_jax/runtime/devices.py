"""Runs a step on the devices of this process."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Step = Callable[..., tuple[Any, Any]]

# pmap's axis and the mesh of replicated arrays share one name. With two names, the first output of
# pmap has another sharding than its input, and pmap compiles the step again.
_AXIS = "batch"


def parallel_step(step: Step, devices: Sequence[jax.Device]) -> Step:
    """Compiles a step for the devices of this process: `jax.jit` for one, `jax.pmap` for many.

    Args:
      step: ``(state, batch, *extra, axis_name=None) -> (state, metrics)``, such as `train_step`
        with its settings bound.
      devices: the devices of this process.

    Returns:
      ``(state, batch, *extra) -> (state, metrics)``. ``batch`` is this process's part of the global
      batch; its size is a multiple of the number of devices. ``extra`` is the same on all devices.
      The state is donated; put the first state on the devices by `replicate`. The function has a
      method ``lower`` like that of `jax.jit`; a later call reuses the program that it compiles.
      With several processes ``lower`` accepts arrays only, not `jax.ShapeDtypeStruct`.
    """
    if jax.device_count() == 1 or (jax.process_count() == 1 and len(devices) == 1):
        return jax.jit(step, donate_argnums=0, compiler_options=compiler_options(devices))
    mapped = jax.pmap(
        lambda state, batch, extra: step(state, batch, *extra, axis_name=_AXIS),
        axis_name=_AXIS,
        in_axes=(None, 0, None),
        out_axes=None,
        devices=devices if jax.process_count() == 1 else None,
        donate_argnums=0,
    )
    split = lambda leaf: leaf.reshape(len(devices), -1, *leaf.shape[1:])
    split_batch = lambda batch: jax.tree.map(split, batch)

    def run(state, batch, *extra):
        return mapped(state, split_batch(batch), extra)

    def lower(state, batch, *extra):
        abstract = jax.process_count() == 1
        parts = jax.eval_shape(split_batch, batch) if abstract else split_batch(batch)
        return mapped.lower(state, parts, extra)

    run.lower = lower
    return run


def compiler_options(devices: Sequence[jax.Device]) -> dict[str, int] | None:
    """Options for compiling large programs with `jax.jit`; pmap accepts no options.

    For CPUs it is optimization level 2 instead of 3, which compiles faster. Random parameters stay
    equal bit for bit; other results may differ by rounding. Level 1 is not faster, and level 0
    changes the random parameters.
    """
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


def replicate(tree: Any, devices: Sequence[jax.Device]) -> Any:
    """Puts a whole copy of a pytree on each device."""
    return jax.device_put(tree, replicated(devices))


def checksums(tree: Any) -> list[int]:
    """A 32-bit checksum of the copy on each device of this process, to find replicas that differ.

    Args:
      tree: arrays that each device holds whole.
    """
    return [int(shard.data) for shard in _checksum(tree).addressable_shards]


@jax.jit
def _checksum(tree):
    def of_leaf(leaf):
        if leaf.dtype == bool:
            leaf = leaf.astype(jnp.uint8)
        unsigned = jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")
        bits = jax.lax.bitcast_convert_type(jnp.ravel(leaf), unsigned)
        # Each value has another odd factor, so a changed value or a swap changes the sum.
        factors = jnp.uint32(2654435761) * jnp.arange(bits.size, dtype=jnp.uint32) | jnp.uint32(1)
        return jnp.sum(bits.astype(jnp.uint32) * factors, dtype=jnp.uint32)

    total = jnp.uint32(0)
    for leaf in jax.tree.leaves(tree):
        total = total * jnp.uint32(31) + of_leaf(leaf)
    return total
