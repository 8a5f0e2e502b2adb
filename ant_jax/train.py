"""The training loop."""

import contextlib
import functools
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from clu import parameter_overview
from ml_collections import ConfigDict

from ant_jax import builders, checkpoint, data, metrics, sampling
from ant_jax import config as config_lib
from ant_jax.diffusion import GaussianDiffusion
from ant_jax.models.dit import DiT
from ant_jax.train_step import (
    TrainState,
    check_step,
    init_state,
    parallel_step,
    replicate,
    train_step,
)

_PROFILE_START = 10


class Experiment(NamedTuple):
    """What a config describes, before anything is compiled.

    Attributes:
      source: the training data.
      image_shape: (H, W, C) of what the model sees.
      model: the network.
      process: the noise process.
      method: clusters and weighting.
    """

    source: data.Source
    image_shape: tuple[int, int, int]
    model: DiT
    process: GaussianDiffusion
    method: builders.Method


def build(config: ConfigDict) -> Experiment:
    """Builds and checks what a config describes.

    Raises:
      ValueError: naming the setting, if the config is not valid, does not fit the data, or its
        batch can't be split over clusters, microbatches and devices.
    """
    config_lib.validate(config)
    source = data.load(config.data.name, config.data.split, config.data.dir or None)
    size = config.data.image_size
    image_shape = (size, size, source.image_shape[-1])
    process = builders.build_diffusion(config)
    method = builders.build_method(config, process.log_snr)
    per_device, rest = divmod(config.data.batch_size, jax.device_count())
    if rest:
        raise ValueError(
            f"config.data.batch_size = {config.data.batch_size} must be divisible by the number of "
            f"devices, {jax.device_count()}"
        )
    try:
        check_step(
            config.clusters.k,
            per_device,
            timesteps=method.timesteps,
            microbatches=config.optimizer.microbatches,
            gradient_form=config.method.gradient_form,
            weighting=method.weighting,
        )
    except ValueError as error:
        raise ValueError(f"config.data.batch_size = {config.data.batch_size}: {error}") from None
    if config.model.conditional and not source.num_classes:
        raise ValueError(
            f"config.model.conditional = True, but {config.data.name} has no labels: set it False"
        )
    num_classes = source.num_classes if config.model.conditional else 0
    model = builders.build_model(config, image_shape[-1], num_classes)
    return Experiment(source, image_shape, model, process, method)


def new_state(config: ConfigDict, experiment: Experiment) -> TrainState:
    """The state before the first step, on this process's devices."""
    params = builders.init_params(experiment.model, experiment.image_shape, config.seed)
    optimizer = builders.build_optimizer(config)
    state = init_state(params, optimizer, experiment.method.weighting, config.clusters.k)
    return replicate(state, jax.local_devices())


def restore_ema(
    config: ConfigDict, experiment: Experiment, workdir: Path, step: int | None = None
) -> tuple[int, Any]:
    """The step and EMA parameters of a run's newest checkpoint, or of the one named.

    Raises:
      FileNotFoundError: if there is no checkpoint.
    """
    template = jax.eval_shape(functools.partial(new_state, config, experiment))
    mesh = jax.sharding.Mesh(np.asarray(jax.local_devices()), ("devices",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    template = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), template
    )
    restored = checkpoint.restore(workdir / "checkpoints", template, step)
    if restored is None:
        raise FileNotFoundError(f"no checkpoint in {workdir}: train first")
    return restored[0], restored[1].ema_params


def train(config: ConfigDict, workdir: str | Path) -> TrainState:
    """Trains to ``config.num_steps``, from the newest checkpoint in the workdir if there is one.

    Args:
      config: see ``configs/digits.py``.
      workdir: gets ``config.json``, ``metrics.jsonl``, TensorBoard files, ``samples/`` and
        ``checkpoints/``.

    Returns:
      The state reached: the last one, or on SIGTERM the one that was saved.

    Raises:
      ValueError: for impossible settings or a workdir of another config.
      FloatingPointError: at the first loss or gradient that is not finite.
    """
    workdir = Path(workdir)
    experiment = build(config)
    method, process = experiment.method, experiment.process
    saved_config = config_lib.load(workdir)
    if saved_config is not None:
        config_lib.check_same(saved_config, config, workdir)
    if jax.process_index() == 0:
        config_lib.save(config, workdir)
    devices = jax.local_devices()
    state = new_state(config, experiment)
    checkpoints = checkpoint.Checkpointer(
        workdir / "checkpoints", config.checkpoint.keep, config.checkpoint.keep_period
    )
    restored = checkpoint.restore(checkpoints.directory, state)
    start = 0
    if restored is None:
        _log_overview(config, experiment, state)
    else:
        start, state = restored
        logging.info("resuming from step %d of %s", start, checkpoints.directory)
    saved = start if restored else None

    step_fn = parallel_step(
        functools.partial(
            train_step,
            apply_fn=lambda params, x, t, y: experiment.model.apply({"params": params}, x, t, y),
            diffusion=process,
            boundaries=method.boundaries,
            weighting=method.weighting,
            optimizer=builders.build_optimizer(config),
            seed=config.seed,
            timesteps=method.timesteps,
            gradient_form=config.method.gradient_form,
            microbatches=config.optimizer.microbatches,
            num_classes=experiment.model.num_classes,
            label_dropout=config.label_dropout,
            ema_decay=config.ema_decay,
        ),
        devices,
    )
    batches = data.batches(
        experiment.source,
        batch_size=config.data.batch_size,
        seed=config.seed,
        start_step=start,
        image_size=config.data.image_size,
        crop=config.data.crop,
        flip=config.data.flip,
        num_workers=config.data.num_workers,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    writer = metrics.Writer(workdir, start, config.tensorboard)
    progress = metrics.Progress(start, config.num_steps, config.data.batch_size)
    interval = metrics.Interval()
    pending = None

    def collect():
        """Fetches the pending metrics and refuses to go on from a state that is not finite."""
        nonlocal pending
        if pending is not None:
            step, on_device = pending
            pending = None
            values = jax.device_get(on_device)
            if not (np.isfinite(values["loss"]) and np.isfinite(values["grad_norm"])):
                raise FloatingPointError(_not_finite(step, values, saved, checkpoints.directory))
            interval.add(values)

    with (
        contextlib.closing(checkpoints),
        contextlib.closing(writer),
        contextlib.closing(batches),
        _stop_signal() as stop_requested,
        _profiler(config, workdir, start) as profile,
    ):
        for step in range(start + 1, config.num_steps + 1):
            profile(step)
            state, on_device = step_fn(state, next(batches))
            # Fetched while this step runs: the metrics of the one before it.
            collect()
            pending = (step, on_device)
            checkpoints.check()

            stopping = stop_requested() or step == config.num_steps
            if step % config.log_every == 0 or stopping:
                collect()
                report = interval.report()
                speed = progress.line(step, report["loss"])
                writer.scalars(step, {**report, "steps_per_second": speed})
            if step % config.checkpoint.every == 0 or stopping:
                collect()
                checkpoints.save(step, state)
                saved = step
            if config.sample.every and (
                step % config.sample.every == 0 or step == config.num_steps
            ):
                _write_grid(config, experiment, state.ema_params, workdir, writer, step)
                progress.restart(step)
            if stopping and step < config.num_steps:
                logging.info("asked to stop: saving step %d, start again to go on", step)
                break
    return state


def _write_grid(config, experiment, ema_params, workdir, writer, step):
    if jax.process_index() != 0:
        return
    _, image_shape, model, process, _ = experiment
    drawn = sampling.sample_batches(
        config, model, ema_params, process, image_shape, min(sampling.GRID, config.sample.num)
    )
    grid = sampling.image_grid(np.concatenate([images for images, _ in drawn]))
    path = workdir / "samples" / f"{step:08d}.png"
    sampling.save_png(path, grid)
    writer.image(step, "samples", grid)
    logging.info("samples of step %d: %s", step, path)


def _log_overview(config, experiment, state):
    logging.info(
        "\n%s", parameter_overview.get_parameter_overview(state.params, include_stats=False)
    )
    method = config.method.name
    logging.info(
        "%s; clusters by %s: %s; %d images; %d %s device(s)",
        method,
        config.clusters.cost,
        " ".join(map(str, experiment.method.boundaries)),
        len(experiment.source),
        jax.device_count(),
        jax.default_backend(),
    )
    logging.info("compiling the first step ...")


def _not_finite(step, values, saved, directory):
    losses = ", ".join(f"{loss:.4g}" for loss in values["cluster_losses"])
    last = f"step {saved} in {directory}" if saved is not None else "none yet"
    return (
        f"step {step}: loss {values['loss']:.4g}, gradient norm {values['grad_norm']:.4g}; "
        f"cluster losses [{losses}]; last good checkpoint: {last}. "
        "A lower config.optimizer.learning_rate or config.optimizer.clip_norm may help."
    )


@contextlib.contextmanager
def _stop_signal() -> Iterator:
    """Yields a function that tells whether SIGTERM has come; only the main thread can listen."""
    received = []
    try:
        before = signal.signal(signal.SIGTERM, lambda *_: received.append(True))
    except ValueError:
        yield lambda: False
        return
    try:
        yield lambda: bool(received)
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _profiler(config: ConfigDict, workdir: Path, start: int) -> Iterator:
    """Yields a function that is called before each step and traces the steps asked for."""
    first = start + _PROFILE_START
    running = False

    def before_step(step):
        nonlocal running
        if config.profile_steps and step == first:
            jax.profiler.start_trace(str(workdir / "profile"))
            running = True
        elif running and step == first + config.profile_steps:
            jax.profiler.stop_trace()
            running = False
            logging.info("profile: %s", workdir / "profile")

    try:
        yield before_step
    finally:
        if running:
            jax.profiler.stop_trace()
