"""The train step of a config, compiled for the devices."""

import contextlib
import functools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from ant_jax import experiment, models
from ant_jax.experiment import Setup
from ant_jax.mtl.gramian import keeping_axes
from ant_jax.optimizers import stop_gradients
from ant_jax.runtime import processes
from ant_jax.runtime.devices import abstract, parallel_step, partitioned_step, replicated
from ant_jax.runtime.sharded import by_task, network_on_shards
from ant_jax.state_layout import abstract_state, program_of, shardings_of, split_axes_of
from ant_jax.train_step import Setup as StepSetup
from ant_jax.train_step import train_step


def training_step(config: ConfigDict, setup: Setup) -> Callable:
    """The train step on the devices of this process, compiled at its first call.

    Runs share one compiled step if they differ only in the seed, the learning rate, the boundaries
    of their k tasks, and in what happens between the steps.

    With several processes, all start the first step together, because one may compile longer than
    the others. On CPUs they start every step together: a collective there fails after 30 seconds.

    Returns:
      ``(state, batch) -> (state, metrics)``; see `train_step`. The state is donated. On CPUs, do
      not call it inside another `jax.jit`: it has compiler options of its own.
    """
    step, arguments = _step_and_arguments(config, setup)
    if jax.process_count() > 1:
        return _in_step(step, arguments)
    return lambda state, batch: step(state, batch, arguments)


def start_compiling(config: ConfigDict, setup: Setup) -> Callable:
    """The `training_step`; a thread starts to compile it now.

    The first call waits for the thread, and raises the error of the compilation if there is one.
    Python exits only after the thread has ended.

    With several processes the step is compiled at its first call instead, because JAX then needs
    the arrays themselves.
    """
    if jax.process_count() > 1:
        return training_step(config, setup)
    step, arguments = _step_and_arguments(config, setup)
    program, state = program_of(config, setup), abstract_state(config, setup)
    axes = split_axes_of(program)
    if axes is not None:
        state = abstract(state, program.devices, axes)
    values = jax.tree.map(lambda each: jax.ShapeDtypeStruct(each.shape, each.dtype), arguments)
    leaves, structure = jax.tree.flatten((state, _abstract_batch(config, setup), values))
    compiling = _compilation(step, structure, tuple(leaves))
    if compiling.done() and compiling.exception():
        _compilation.cache_clear()
        compiling = _compilation(step, structure, tuple(leaves))

    def run(state, batch):
        compiling.result()
        return step(state, batch, arguments)

    return run


@functools.lru_cache(maxsize=8)
def _compilation(step, structure, leaves):
    """The compilation of a step in a thread; runs that share a step do not lower it again."""
    return _in_a_thread(step.lower(*structure.unflatten(leaves)).compile)


def _in_step(step, arguments):
    on_cpus = jax.default_backend() == "cpu"
    first = True

    def run(state, batch):
        nonlocal first
        if first:
            # The main thread must stay free to receive signals.
            _in_a_thread(step.lower(state, batch, arguments).compile).result()
        if first or on_cpus:
            processes.barrier()
        first = False
        return step(state, batch, arguments)

    return run


def _in_a_thread(function):
    executor = ThreadPoolExecutor(1, thread_name_prefix="compiler")
    future = executor.submit(function)
    executor.shutdown(wait=False)
    return future


def _step_and_arguments(config, setup):
    step = _training_step(program_of(config, setup))
    scale = experiment.interval_scale(config, setup.process, setup.clusters)
    order, discrete = setup.clusters.order, isinstance(setup.process.span, int)
    arguments = _StepArguments(
        np.int32(config.seed),
        np.float32(config.optimizer.learning_rate),
        setup.clusters.boundaries.astype(np.int32 if discrete else np.float32),
        None if order is None else order.astype(np.int32),
        None if scale is None else scale.astype(np.float32),
    )
    return step, arguments


class _StepArguments(NamedTuple):
    """The values of a run that its step takes as arguments."""

    seed: np.int32
    learning_rate: np.float32
    boundaries: np.ndarray
    timestep_order: np.ndarray | None
    loss_scale: np.ndarray | None


def _on_all_devices(weighting, devices):
    """A method that every device computes alone: its arrays are small, and messages take time."""
    whole = lambda tree: jax.lax.with_sharding_constraint(tree, replicated(devices))
    weigh = lambda stats, state: whole(weighting.weigh(whole(stats), state))
    return weighting._replace(weigh=weigh)


@functools.lru_cache(maxsize=8)
def _training_step(program):
    settings, devices, is_sharded = program.settings, program.devices, program.is_sharded
    split = not is_sharded and program.optimizer().entrywise

    def step(state, batch, arguments, axis_name=None):
        k = len(arguments.boundaries) - 1
        weighting = program.weighting(k, arguments.seed, arguments.loss_scale)
        network = lambda params, x, t, y: program.model.apply({"params": params}, x, t, y)
        if is_sharded:
            # Only this form computes the gradients of all tasks side by side.
            side_by_side = "gram" in weighting.needs and settings.method.gradient_form == "vmap"
            blocks = k if weighting.blocks is None else weighting.blocks.n
            groups = math.gcd(blocks, len(devices)) if side_by_side else 1
            network = network_on_shards(network, devices, groups)
            batch = by_task(batch, devices, groups)
            weighting = _on_all_devices(weighting, devices)
        optimizer = program.optimizer(arguments.learning_rate, axis_name if split else None)
        setup = StepSetup(
            apply_fn=lambda params, x, t, y: network(
                stop_gradients(params, settings.optimizer.frozen), x, t, y
            ),
            process=program.process,
            boundaries=arguments.boundaries,
            weighting=weighting,
            optimizer=optimizer.transformation,
            seed=arguments.seed,
            draw=program.draw,
            timestep_order=arguments.timestep_order,
            suppress=settings.method.suppress,
            suppress_log_snr=settings.method.suppress_log_snr,
            curriculum_steps=settings.method.curriculum_steps,
            form=settings.method.gradient_form,
            microbatches=settings.optimizer.microbatches,
            num_classes=models.num_classes(program.model),
            label_dropout=settings.label_dropout,
            ema_decay=settings.ema_decay,
            skip_nonfinite=settings.optimizer.nonfinite == "skip",
            split=split,
            eval_params=optimizer.eval_params,
        )
        with keeping_axes() if is_sharded else contextlib.nullcontext():
            return train_step(state, batch, setup, axis_name)

    if is_sharded:
        return partitioned_step(step, devices, shardings_of(program))
    return parallel_step(step, devices, split_axes_of(program))


def _abstract_batch(config, setup):
    """The shapes and types of a batch, where one process holds all of it."""
    size = config.data.batch_size
    return {
        "image": jax.ShapeDtypeStruct(
            (size, *setup.image_shape), np.float32 if config.autoencoder.name else np.uint8
        ),
        "label": jax.ShapeDtypeStruct((size,), np.int32),
    }
