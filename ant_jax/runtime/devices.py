"""Running a step on this process's devices."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Step = Callable[..., tuple[Any, Any]]

# One name for pmap's axis and for the mesh of replicated arrays: with two, pmap takes its own first
# output for something new and compiles the step again.
_AXIS = "batch"


def parallel_step(step: Step, devices: Sequence[jax.Device]) -> Step:
    """Compiles a step for this process's devices: `jax.jit` on one, `jax.pmap` on many.

    Args:
      step: ``(state, batch, *extra, axis_name=None) -> (state, metrics)``, such as `train_step`
        with its settings bound.
      devices: this process's devices.

    Returns:
      ``(state, batch, *extra) -> (state, metrics)``, where ``batch`` is this process's part of the
      global batch, its size divisible by the number of devices, and ``extra`` the same on all
      devices. The state is donated; put the first one on the devices with `replicate`. Its
      ``lower`` is that of `jax.jit`; what it compiles, a later call finds. Of one of several
      processes it takes arrays alone.
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
    """How large programs are compiled: for CPUs as by -O2 instead of -O3, which is quicker.

    For `jax.jit` alone: pmap takes no options.

    Parameters are drawn the same to the bit; other results may differ by rounding. At -O1 there is
    nothing more to gain, and -O0 draws other parameters.
    """
    if devices[0].platform != "cpu" or jax.config.read("jax_disable_most_optimizations"):
        return None
    return {"xla_backend_optimization_level": 2}


def replicated(devices: Sequence[jax.Device]) -> jax.sharding.NamedSharding:
    """The sharding of arrays that every one of these devices holds whole."""
    mesh = jax.sharding.Mesh(np.asarray(devices), (_AXIS,))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def split_over(devices: Sequence[jax.Device]) -> jax.sharding.NamedSharding:
    """The sharding of arrays of which each of these devices holds a part of the leading axis."""
    mesh = jax.sharding.Mesh(np.asarray(devices), (_AXIS,))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(_AXIS))


def replicate(tree: Any, devices: Sequence[jax.Device]) -> Any:
    """Puts a pytree on every one of these devices, unstacked."""
    return jax.device_put(tree, replicated(devices))


def checksums(tree: Any) -> list[int]:
    """What tells replicas apart: of each of this process's devices 32 bits, of all bits it holds.

    Args:
      tree: arrays that every one of the devices holds whole.
    """
    return [int(shard.data) for shard in _checksum(tree).addressable_shards]


@jax.jit
def _checksum(tree):
    def of_leaf(leaf):
        if leaf.dtype == bool:
            leaf = leaf.astype(jnp.uint8)
        unsigned = jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")
        bits = jax.lax.bitcast_convert_type(jnp.ravel(leaf), unsigned)
        # Odd factors that differ: a change anywhere, and a swap, changes the sum.
        factors = jnp.uint32(2654435761) * jnp.arange(bits.size, dtype=jnp.uint32) | jnp.uint32(1)
        return jnp.sum(bits.astype(jnp.uint32) * factors, dtype=jnp.uint32)

    total = jnp.uint32(0)
    for leaf in jax.tree.leaves(tree):
        total = total * jnp.uint32(31) + of_leaf(leaf)
    return total
