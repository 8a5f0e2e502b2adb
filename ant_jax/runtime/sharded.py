"""Parameters that are sharded over devices, for networks that are larger than one device.

Each array is split along one of its axes, and XLA partitions the program (Xu et al., *GSPMD*, arXiv
2105.04663). The network gathers each parameter where it needs it, and the gradient of each is
reduced to shards where it is computed (Rajbhandari et al., *ZeRO*, SC 2020, stage 3).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.lax import with_sharding_constraint
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ant_jax.runtime.devices import spec_of

_EXAMPLE, _TASK = "example", "task"


def network_on_shards(
    network: Callable, devices: Sequence[jax.Device], groups: int = 1
) -> Callable:
    """A network that takes sharded parameters, for a program that `jax.jit` partitions.

    Each device computes the outputs of its own examples. It gathers each parameter for the forward
    pass and again for the backward pass, so that it need not hold all of them together. The
    gradient of each parameter has the sharding of the parameter.

    Under `jax.vmap` over tasks, with the same parameters for all, each group of devices computes
    the gradients of its own tasks alone. An all-to-all then gives every device its shard of the
    gradients of all tasks.

    Args:
      network: ``(params, *examples) -> outputs``; every array but the parameters has the examples
        on its leading axis.
      devices: over which the parameters are split by `devices.sharding_of`.
      groups: of devices with different tasks; it divides the numbers of devices and of tasks.
    """
    mesh, count = _mesh(devices, groups), len(devices)

    def constrained(leaf, spec, of_tasks):
        """Under `jax.vmap` the leading axis is that of the tasks: then by ``of_tasks`` in turn."""

        @jax.custom_batching.custom_vmap
        def constrain(leaf):
            return with_sharding_constraint(leaf, NamedSharding(mesh, spec))

        @constrain.def_vmap
        def _(_, batched, leaf):
            for each in of_tasks:
                leaf = with_sharding_constraint(leaf, NamedSharding(mesh, each))
            return leaf, batched[0]

        return constrain(leaf)

    def gather(leaf):
        spec = spec_of(leaf.shape, count, (_EXAMPLE, _TASK))
        # First each group adds what its devices have found for its tasks.
        own = PartitionSpec(_TASK, *(name and _EXAMPLE for name in spec))
        of_tasks = (own, PartitionSpec(None, *spec))
        gathered = lambda leaf: with_sharding_constraint(leaf, NamedSharding(mesh, PartitionSpec()))
        whole = jax.custom_vjp(gathered)
        whole.defvjp(
            lambda leaf: (gathered(leaf), None),
            lambda _, gradient: (constrained(gradient, spec, of_tasks),),
        )
        return whole(leaf)

    def of_examples(leaf):
        return constrained(leaf, PartitionSpec(_EXAMPLE), (PartitionSpec(_TASK, _EXAMPLE),))

    def run(params, *examples):
        return network(jax.tree.map(gather, params), *jax.tree.map(of_examples, examples))

    return jax.checkpoint(run, policy=_is_kept)


def gathering(network: Callable, params: Any) -> Callable:
    """A network for sampling: if its parameters are sharded, each device gathers them.

    Args:
      network: ``(variables, *examples) -> outputs``.
      params: the parameters in its variables, on devices.
    """
    sharded = [leaf for leaf in jax.tree.leaves(params) if not leaf.is_fully_replicated]
    return _gathering(network, sharded[0].sharding.mesh) if sharded else network


@functools.lru_cache(maxsize=8)
def _gathering(network, mesh):
    """One function for all calls, so that the program that takes it is compiled once."""
    whole = NamedSharding(mesh, PartitionSpec())

    def run(variables, *examples):
        # Otherwise the compiler would gather once, before the loop of a sampler, and keep all.
        variables, examples = jax.lax.optimization_barrier((variables, examples))
        return network(with_sharding_constraint(variables, whole), *examples)

    return run


def _is_kept(primitive, *_, **__):
    """Whether the backward pass gets a result of the forward pass, or computes it again.

    It gathers parameters again. It also casts again: what is cast may be a gathered parameter.
    """
    return primitive.name not in ("sharding_constraint", "convert_element_type")


def by_task(batch: Any, devices: Sequence[jax.Device], groups: int) -> Any:
    """Gives each group of devices the examples of its tasks, where each task is one block."""
    sharding = NamedSharding(_mesh(devices, groups), PartitionSpec((_TASK, _EXAMPLE)))
    return jax.tree.map(lambda leaf: with_sharding_constraint(leaf, sharding), batch)


def _mesh(devices, groups):
    # The shards of a parameter lie on the devices in their order, those of `devices.sharding_of`.
    return Mesh(np.reshape(devices, (-1, groups)), (_EXAMPLE, _TASK))
