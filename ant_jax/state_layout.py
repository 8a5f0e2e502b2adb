"""The state of a run on its devices: the first one, its shapes, and its layout during training."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from ant_jax import config as config_lib
from ant_jax import experiment, optimizers
from ant_jax.diffusion import Process
from ant_jax.experiment import Setup
from ant_jax.mtl import Weighting
from ant_jax.mtl.shards import gathered
from ant_jax.runtime import processes
from ant_jax.runtime.devices import (
    alone,
    compiler_options,
    parallel_map,
    parts_of,
    replicate,
    replicated,
    shard,
    shard_in_process,
    sharding_of,
)
from ant_jax.train_step import TrainState, init_state, split_axes, whole_state


class Program(NamedTuple):
    """All that the compiled functions of a run depend on; hashable.

    Attributes:
      settings: see `config.program`.
      model: the network.
      process: the noise process.
      draw: how noise levels are drawn; see `tasks.clusters.draw`.
      specialist: whether the run trains one task alone.
      given: the caller's own method, or None.
      image_shape: (H, W, C) of the network's input.
      devices: those that hold one state: of this process, or of all if they share its arrays.
    """

    settings: FrozenConfigDict
    model: Any
    process: Process
    draw: str
    specialist: bool
    given: Weighting | None
    image_shape: tuple[int, int, int]
    devices: tuple[jax.Device, ...]

    @property
    def is_sharded(self) -> bool:
        """Whether each device holds a part of each parameter."""
        return self.settings.parallel.params == "sharded" and not alone(self.devices)

    def optimizer(
        self, learning_rate: float | jax.Array = 0.0, axis_name: str | None = None
    ) -> optimizers.Optimizer:
        """The optimizer; its state does not depend on the learning rate."""
        return experiment.build_optimizer(self.settings, learning_rate, axis_name)

    def weighting(
        self, k: int, seed: int | jax.Array, loss_scale: jax.Array | None = None
    ) -> Weighting:
        """The method for k tasks; see `experiment.build_weighting`."""
        return experiment.build_weighting(
            self.settings, k, seed, loss_scale, self.specialist, self.given
        )

    def init_params(self, seed: int | jax.Array) -> dict:
        """Random parameters; traceable."""
        return experiment.init_params(self.model, self.image_shape, seed)


def program_of(config: ConfigDict, setup: Setup) -> Program:
    """The program of a run. Runs with equal programs share their compiled functions."""
    settings = config_lib.program(config)
    devices = tuple(jax.local_devices())
    if settings.parallel.params == "sharded" and jax.process_count() > 1:
        devices = tuple(sorted(jax.devices(), key=lambda each: (each.process_index, each.id)))
    return Program(
        settings,
        setup.model,
        setup.process,
        setup.draw,
        config.clusters.specialist >= 0,
        setup.given_weighting,
        setup.image_shape,
        devices,
    )


@functools.lru_cache(maxsize=8)
def _first_state(program, k):
    """A compiled function from the seed, and parameters or None, to the state before step 1."""

    def make(seed, params=None):
        if params is None:
            params = program.init_params(seed)
        weighting = program.weighting(k, seed)
        return init_state(params, program.optimizer().transformation, weighting)

    options = compiler_options(program.devices)
    return jax.jit(make, out_shardings=shardings_of(program), compiler_options=options)


def _first_state_of(config, setup):
    return _first_state(program_of(config, setup), len(setup.clusters.boundaries) - 1)


def shardings_of(program: Program) -> TrainState:
    """The shardings of a state before it is split, each of a leaf or of all below it."""
    whole = replicated(program.devices)
    if not program.is_sharded:
        return TrainState._make([whole] * len(TrainState._fields))
    params = jax.eval_shape(program.init_params, 0)
    opt_state = jax.eval_shape(program.optimizer().transformation.init, params)
    of = lambda tree: jax.tree.map(lambda leaf: sharding_of(leaf.shape, program.devices), tree)
    return TrainState._make([whole, of(params), of(params), of(opt_state), whole])


def split_axes_of(program: Program) -> TrainState | None:
    """The axis of devices of every leaf of a state, see `split_axes`; None if it is not split."""
    optimizer = program.optimizer()
    if alone(program.devices) or program.is_sharded or not optimizer.entrywise:
        return None
    return split_axes(optimizer.transformation, jax.eval_shape(program.init_params, 0))


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
    return _layout(program_of(config, setup))


@functools.lru_cache(maxsize=8)
def _layout(program):
    devices, axes = program.devices, split_axes_of(program)
    if axes is None:
        same = lambda state: state
        if not program.is_sharded:
            return Layout(same, same, lambda state: state.ema_params)
        in_process = _together(lambda state: shard_in_process(state.ema_params, devices))
        return Layout(same, same, in_process)
    optimizer = program.optimizer().transformation

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
        _together(lambda state: rest(state)._replace(params=state.params)),
        _together(parallel_map(average, devices, axes, None)),
    )


def _together(gather):
    """Lets the processes start together: on CPUs a collective waits half a minute at most."""

    def run(state):
        processes.barrier()
        return gather(state)

    return run


def new_state(config: ConfigDict, setup: Setup, params: dict | None = None) -> TrainState:
    """The state before the first step, on the devices of this process.

    Args:
      config: the run's config.
      setup: what the config describes.
      params: initial parameters instead of random ones; see `init_from.initial_params`.
    """
    if params is not None:
        program = program_of(config, setup)
        params = _place(program, params, program.devices)
    return _first_state_of(config, setup)(np.int32(config.seed), params)


def place_params(config: ConfigDict, setup: Setup, params: dict) -> dict:
    """Puts parameters on the devices of this process as ``config.parallel`` says."""
    return _place(program_of(config, setup), params, tuple(jax.local_devices()))


def _place(program, params, devices):
    return (shard if program.is_sharded else replicate)(params, devices)


def abstract_state(config: ConfigDict, setup: Setup) -> TrainState:
    """The shapes, types and shardings of the arrays of a state like that of `new_state`."""
    shapes = jax.eval_shape(_first_state_of(config, setup), np.int32(0))
    of = lambda sharding, leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    below = lambda sharding, part: jax.tree.map(functools.partial(of, sharding), part)
    return jax.tree.map(below, shardings_of(program_of(config, setup)), shapes)
