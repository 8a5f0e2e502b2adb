"""The train step of a config, compiled for the devices, and the state that it starts from."""

import contextlib
import functools
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from ant_jax import config as config_lib
from ant_jax import experiment, models
from ant_jax.experiment import Setup
from ant_jax.mtl.gramian import keeping_axes
from ant_jax.mtl.shards import gathered
from ant_jax.optimizers import stop_gradients
from ant_jax.runtime import processes
from ant_jax.runtime.devices import (
    abstract,
    alone,
    compiler_options,
    parallel_map,
    parallel_step,
    partitioned_step,
    parts_of,
    replicate,
    replicated,
    shard,
    shard_in_process,
    sharding_of,
)
from ant_jax.runtime.sharded import by_task, network_on_shards
from ant_jax.train_step import Setup as StepSetup
from ant_jax.train_step import (
    TrainState,
    init_state,
    split_axes,
    train_step,
    whole_state,
)


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
    program, model, *_ = _program(config, setup)
    devices = _devices(program)
    axes = _axes(program, model, setup.image_shape, devices)
    state = abstract_state(config, setup)
    if axes is not None:
        state = abstract(state, devices, axes)
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
    program = _program(config, setup)
    step = _training_step(*program, setup.image_shape, _devices(program[0]))
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


def _program(config, setup):
    """All that the compiled step depends on; hashable."""
    specialist = config.clusters.specialist >= 0
    given = setup.given_weighting
    return config_lib.program(config), setup.model, setup.process, setup.draw, specialist, given


def _devices(program):
    """The devices that hold one state: of this process, or of all if they share its arrays."""
    if program.parallel.params == "sharded" and jax.process_count() > 1:
        return tuple(sorted(jax.devices(), key=lambda each: (each.process_index, each.id)))
    return tuple(jax.local_devices())


def _is_sharded(program, devices):
    """Whether each device holds a part of each parameter."""
    return program.parallel.params == "sharded" and not alone(devices)


class _StepArguments(NamedTuple):
    """The values of a run that its step takes as arguments."""

    seed: np.int32
    learning_rate: np.float32
    boundaries: np.ndarray
    timestep_order: np.ndarray | None
    loss_scale: np.ndarray | None


@functools.lru_cache(maxsize=8)
def _first_state(program, model, process, draw, specialist, given, image_shape, k, devices):
    """A compiled function from the seed, and parameters or None, to the state before step 1."""
    del process, draw

    def make(seed, params=None):
        if params is None:
            params = experiment.init_params(model, image_shape, seed)
        weighting = experiment.build_weighting(program, k, seed, None, specialist, given)
        return init_state(params, _transformation(program), weighting)

    shardings = _shardings(program, model, image_shape, devices)
    return jax.jit(make, out_shardings=shardings, compiler_options=compiler_options(devices))


def _transformation(program):
    """The optimizer of a state; no state depends on the learning rate."""
    return experiment.build_optimizer(program, 0.0).transformation


def _first_state_of(config, setup):
    k = len(setup.clusters.boundaries) - 1
    program = _program(config, setup)
    return _first_state(*program, setup.image_shape, k, _devices(program[0]))


def _shardings(program, model, image_shape, devices):
    """The shardings of a state before it is split, each of a leaf or of all below it."""
    whole = replicated(devices)
    if not _is_sharded(program, devices):
        return TrainState._make([whole] * len(TrainState._fields))
    params = jax.eval_shape(lambda: experiment.init_params(model, image_shape, 0))
    opt_state = jax.eval_shape(_transformation(program).init, params)
    of = lambda tree: jax.tree.map(lambda leaf: sharding_of(leaf.shape, devices), tree)
    return TrainState._make([whole, of(params), of(params), of(opt_state), whole])


def _on_all_devices(weighting, devices):
    """A method that every device computes alone: its arrays are small, and messages take time."""
    whole = lambda tree: jax.lax.with_sharding_constraint(tree, replicated(devices))
    weigh = lambda stats, state: whole(weighting.weigh(whole(stats), state))
    return weighting._replace(weigh=weigh)


@functools.lru_cache(maxsize=8)
def _training_step(program, model, process, draw, specialist, given, image_shape, devices):
    is_sharded = _is_sharded(program, devices)
    split = not is_sharded and experiment.build_optimizer(program, 0.0).entrywise

    def step(state, batch, arguments, axis_name=None):
        k = len(arguments.boundaries) - 1
        weighting = experiment.build_weighting(
            program, k, arguments.seed, arguments.loss_scale, specialist, given
        )
        network = lambda params, x, t, y: model.apply({"params": params}, x, t, y)
        if is_sharded:
            # Only this form computes the gradients of all tasks side by side.
            side_by_side = "gram" in weighting.needs and program.method.gradient_form == "vmap"
            blocks = k if weighting.blocks is None else weighting.blocks.n
            groups = math.gcd(blocks, len(devices)) if side_by_side else 1
            network = network_on_shards(network, devices, groups)
            batch = by_task(batch, devices, groups)
            weighting = _on_all_devices(weighting, devices)
        optimizer = experiment.build_optimizer(
            program, arguments.learning_rate, axis_name if split else None
        )
        setup = StepSetup(
            apply_fn=lambda params, x, t, y: network(
                stop_gradients(params, program.optimizer.frozen), x, t, y
            ),
            process=process,
            boundaries=arguments.boundaries,
            weighting=weighting,
            optimizer=optimizer.transformation,
            seed=arguments.seed,
            draw=draw,
            timestep_order=arguments.timestep_order,
            suppress=program.method.suppress,
            suppress_log_snr=program.method.suppress_log_snr,
            curriculum_steps=program.method.curriculum_steps,
            form=program.method.gradient_form,
            microbatches=program.optimizer.microbatches,
            num_classes=models.num_classes(model),
            label_dropout=program.label_dropout,
            ema_decay=program.ema_decay,
            skip_nonfinite=program.optimizer.nonfinite == "skip",
            split=split,
            eval_params=optimizer.eval_params,
        )
        with keeping_axes() if is_sharded else contextlib.nullcontext():
            return train_step(state, batch, setup, axis_name)

    if is_sharded:
        return partitioned_step(step, devices, _shardings(program, model, image_shape, devices))
    return parallel_step(step, devices, _axes(program, model, image_shape, devices))


def _axes(program, model, image_shape, devices):
    """The axis of devices of every leaf of a state, see `split_axes`; None if it is not split."""
    optimizer = experiment.build_optimizer(program, 0.0)
    if alone(devices) or _is_sharded(program, devices) or not optimizer.entrywise:
        return None
    params = jax.eval_shape(lambda: experiment.init_params(model, image_shape, 0))
    return split_axes(optimizer.transformation, params)


class Layout(NamedTuple):
    """How a state lies on the devices while it is trained.

    Attributes:
      split: puts a state like that of `new_state` in the layout of `training_step`.
      whole: the inverse, for checkpoints, which do not depend on the devices.
      average: the moving average alone, on the devices of this process as by `place_params`.
    """

    split: Callable[[TrainState], TrainState]
    whole: Callable[[TrainState], TrainState]
    average: Callable[[TrainState], dict]


def layout(config: ConfigDict, setup: Setup) -> Layout:
    """The layout of a run's state. With several processes, all call its functions together."""
    program, model, *_ = _program(config, setup)
    return _layout(program, model, setup.image_shape, _devices(program))


@functools.lru_cache(maxsize=8)
def _layout(program, model, image_shape, devices):
    axes = _axes(program, model, image_shape, devices)
    if axes is None:
        same = lambda state: state
        if not _is_sharded(program, devices):
            return Layout(same, same, lambda state: state.ema_params)
        return Layout(same, same, lambda state: shard_in_process(state.ema_params, devices))
    optimizer = _transformation(program)

    # The parameters are whole in both layouts, and pmap would copy them.
    rest = parallel_map(
        lambda state, axis_name: whole_state(state, optimizer, axis_name)._replace(params=None),
        devices,
        axes,
        None,
    )
    average = lambda state, axis_name: jax.tree.map(
        lambda part, leaf: gathered(part, leaf.shape, axis_name), state.ema_params, state.params
    )
    return Layout(
        lambda state: parts_of(state, devices, axes),
        lambda state: rest(state)._replace(params=state.params),
        parallel_map(average, devices, axes, None),
    )


def new_state(config: ConfigDict, setup: Setup, params: dict | None = None) -> TrainState:
    """The state before the first step, on the devices of this process.

    Args:
      config: the run's config.
      setup: what the config describes.
      params: initial parameters instead of random ones; see `init_from.initial_params`.
    """
    program = _program(config, setup)[0]
    if params is not None:
        params = _place(program, params, _devices(program))
    return _first_state_of(config, setup)(np.int32(config.seed), params)


def place_params(config: ConfigDict, setup: Setup, params: dict) -> dict:
    """Puts parameters on the devices of this process as ``config.parallel`` says."""
    return _place(_program(config, setup)[0], params, tuple(jax.local_devices()))


def _place(program, params, devices):
    return (shard if _is_sharded(program, devices) else replicate)(params, devices)


def abstract_state(config: ConfigDict, setup: Setup) -> TrainState:
    """The shapes, types and shardings of the arrays of a state like that of `new_state`."""
    program, model, *_ = _program(config, setup)
    shardings = _shardings(program, model, setup.image_shape, _devices(program))
    of = lambda sharding, leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    below = lambda sharding, part: jax.tree.map(functools.partial(of, sharding), part)
    return jax.tree.map(below, shardings, _shapes(config, setup))


def _shapes(config, setup):
    return jax.eval_shape(_first_state_of(config, setup), np.int32(0))


def _abstract_batch(config, setup):
    """The shapes and types of a batch, where one process holds all of it."""
    size = config.data.batch_size
    return {
        "image": jax.ShapeDtypeStruct(
            (size, *setup.image_shape), np.float32 if config.autoencoder.name else np.uint8
        ),
        "label": jax.ShapeDtypeStruct((size,), np.int32),
    }
