"""The training loop."""

from ant_jax.runtime import extras

if _error := extras.missing("training"):
    raise _error

import contextlib
import functools
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from absl import logging
from clu import parameter_overview
from ml_collections import ConfigDict

from ant_jax import (
    compiled_step,
    data,
    dataset,
    experiment,
    hooks,
    init_from,
    mtl,
    sampling,
    state_layout,
)
from ant_jax import config as config_lib
from ant_jax import workdir as workdir_lib
from ant_jax.config import ConfigError
from ant_jax.diffusion import Process
from ant_jax.runtime import boards, checkpoint, logs, measurements, processes, progress, signals
from ant_jax.runtime.files import user_path
from ant_jax.runtime.loss_guard import LossGuard
from ant_jax.runtime.profiler import profiler
from ant_jax.train_step import TrainState
from ant_jax.workdir import compatibility

_PROFILE_START = 10


def train(
    config: ConfigDict,
    workdir: str | Path,
    *,
    model: nn.Module | None = None,
    source: data.Source | None = None,
    process: Process | None = None,
    weighting: mtl.Weighting | None = None,
    callback: Callable[[int, dict[str, Any]], None] | None = None,
) -> TrainState:
    """Trains up to step ``config.num_steps``, from the newest checkpoint in the workdir if any.

    Args:
      config: see ``configs/digits.py``.
      workdir: folder of the run. It gets ``config.json``, ``facts.json``, ``metrics.jsonl``,
        TensorBoard files, ``samples/`` and ``checkpoints/``; with ``config.evaluation.every`` also
        ``evaluation/`` and ``best/``.
      model: a network, instead of the one that the config names. The workdir records that you gave
        a model: give it again to resume the run. The same holds for the next three arguments.
      source: images and labels, instead of those that the config names.
      process: a noise process, instead of the one that the config names.
      weighting: a multi-task method, instead of the one that the config names.
      callback: called with the step and the metrics of every line of ``metrics.jsonl``, in process
        0, after the line is written. A run that was killed repeats its lines since the last
        checkpoint. An error that it raises ends the run.

    Returns:
      The state after the last step. After SIGTERM, SIGHUP or Ctrl-C, the state that was saved.

    Raises:
      KeyboardInterrupt: after such a signal before the first step, when there is nothing to save,
        or after a second signal.
      ConfigError: if a setting is impossible, or the workdir has a run of another config.
      InUseError: if another run trains in the workdir.
      MissingExtraError: if ``config.log_to`` names Weights & Biases, which is not installed.
      ConnectionError: if Weights & Biases does not start.
      FloatingPointError: at the first loss or gradient that is not finite. With
        ``config.optimizer.nonfinite = "skip"``, at the tenth in a row.
    """
    logs.show_progress()
    workdir = user_path(workdir)
    config_lib.validate(config)
    boards.check(config.log_to)
    built = {"model": model, "process": process, "weighting": weighting}
    built = {name: value for name, value in built.items() if value is not None}
    given = workdir_lib.names_of(built if source is None else built | {"source": source})
    if source is not None and not isinstance(source, data.Source):
        kind = type(source).__name__
        way = ": ant_jax.data.ArraySource(images, labels) makes one" if kind == "ndarray" else ""
        raise ConfigError(f"source= must be a data.Source, got an object of type {kind}{way}")
    if source is None:
        source = dataset.open_data(config)
    # Process 0 reads for all, because another may see the disk a little later.
    before = processes.broadcast_from_first(lambda: workdir_lib.recorded(workdir))
    boundaries = None
    if before is not None:
        compatibility.check_config(before, config, given, workdir)
        compatibility.check_data(before["facts"], source, workdir)
        boundaries = before["facts"].get("boundaries")
    shape, num_classes = source.image_shape, source.num_classes
    setup = experiment.build(config, shape[-1], num_classes, boundaries, **built)
    experiment.check_batch(config, setup)
    processes.assert_equal(lambda: _found(setup, source, given))
    with workdir_lib.exclusive(workdir) as check_alone:
        if processes.is_first() and workdir_lib.recorded(workdir) != before:
            raise ConfigError(f"another run has begun in {workdir} just now: start again")
        start = _start(config, workdir, setup, before is not None)
        _log_overview(config, setup, start.state, len(source))
        run = (before or {}).get("id") or processes.broadcast_from_first(lambda: uuid.uuid4().hex)
        measure = _evaluation(config, workdir, setup, start, run, given)
        # All checks are done: until here nothing but the lock is written.
        record = workdir_lib.save_record(run, config, given, setup, source, workdir)
        with _hooks(
            config, workdir, source, setup, start, record, measure, check_alone, callback
        ) as on:
            return _train(config, start, on)


def _found(setup, source, given):
    """What must be equal in all processes."""
    devices = jax.local_devices()
    return {
        "devices of a process": len(devices),
        "kind of device": devices[0].device_kind,
        "what was given": given,
        **workdir_lib.facts(setup, source),
    }


class _Start(NamedTuple):
    """Where training starts.

    Attributes:
      step: number of steps done.
      state: the state after them, split over the devices.
      layout: of the state on the devices.
      take_step: ``(state, batch) -> (state, metrics)``.
      kept: measurements of the steps since the last report, from the checkpoint.
      waiting: the line of this step, if it is still to be written; see `hooks.Reports`.
      restored: whether the state comes from a checkpoint.
    """

    step: int
    state: TrainState
    layout: state_layout.Layout
    take_step: Callable
    kept: dict[str, Any]
    waiting: dict[str, Any] | None
    restored: bool


def _start(config, workdir, setup, has_begun):
    """Makes a new state or restores one; writes nothing."""
    directory = (workdir / "checkpoints").absolute()
    steps = processes.broadcast_from_first(lambda: checkpoint.checkpoint_steps(directory))
    params = None if steps else init_from.initial_params(config, setup)
    if max(steps, default=0) < config.num_steps:
        logging.info("compiling the step ...")
        take_step = compiled_step.start_compiling(config, setup)
    else:
        take_step = compiled_step.training_step(config, setup)
    _look_ahead(config, setup.image_shape[-1])
    restored = workdir_lib.restore(config, setup, workdir)
    if restored is None:
        # The state moves to the devices; no variable keeps the copy on the host.
        step, state = 0, state_layout.new_state(config, setup, params)
        if has_begun:
            logging.info("the run in %s has no checkpoint yet: it begins at step 0", workdir)
    else:
        step, state = restored
        _log_resumed(config, workdir, step)
    record = processes.broadcast_from_first(lambda: checkpoint.read_record(directory, step))
    # A checkpoint of an older version has no measurements.
    kept = record["metrics"] if record else measurements.NOTHING | {"lines": None}
    waiting = kept.get("waiting")
    # The step may have been evaluated since the checkpoint.
    if waiting and processes.broadcast_from_first(lambda: _has_line(workdir, step)):
        waiting = None
    hooks.check_replicas(step, state)
    layout = state_layout.layout(config, setup)
    state = layout.split(state)
    return _Start(step, state, layout, take_step, kept, waiting, restored is not None)


def _has_line(workdir, step):
    log = workdir / "metrics.jsonl"
    return log.exists() and any(row["step"] == step for row in logs.read(log))


def _evaluation(config, workdir, setup, start, run, given):
    """See `evaluation_in_training.prepare`; None if nothing is to be evaluated."""
    if not config.evaluation.every:
        return None
    if start.step >= config.num_steps and start.waiting is None:
        logging.info(
            "nothing is evaluated now: config.evaluation.every = %d evaluates while a run trains; "
            "--mode evaluate measures a finished run",
            config.evaluation.every,
        )
        return None
    # A slow import that only this needs; the step compiles meanwhile.
    from ant_jax import evaluation_in_training

    return evaluation_in_training.prepare(config, setup, workdir, run, given)


def _train(config, start, on):
    state, average = start.state, start.layout.average
    if on.reports.waiting is not None:
        # The run ended before the evaluation of its last step.
        due = on.evaluations.is_due(start.step)
        on.reports.write(_evaluate(start.step, state, start.layout, on) if due else {})
    if on.pictures.is_missing(start.step):
        on.pictures.draw(start.step, average(state))
    for step in range(start.step + 1, config.num_steps + 1):
        on.profile(step)
        # The devices still compute the previous step while the next batch is read here.
        batch = next(on.batches, None)
        if batch is None:
            logging.info("asked to stop while waiting for data: saving step %d", step - 1)
            on.saves.save(step - 1, state)
            break
        replaced = int(batch.pop("replaced", np.zeros(0)).sum())
        state, metrics = start.take_step(state, batch)
        if step == start.step + 1:
            on.reports.restart_clock(start.step)
            # Now there is a state to save.
            on.stop.saving = True
        on.measured.add(step, metrics, replaced)
        on.saves.check()

        last, evaluates = step == config.num_steps, on.evaluations.is_due(step)
        log = last or evaluates or step % config.log_every == 0
        stopping = not last and hooks.stops_here(on.stop, waits=log)
        # If a run stops between two reports, the checkpoint keeps its measurements.
        if log:
            on.reports.measured(step, on.measured.report())
            if not evaluates:
                on.reports.write()
        if step % config.checkpoint.every == 0 or last or stopping:
            on.saves.save(step, state)
        if evaluates and not stopping:
            figures = _evaluate(step, state, start.layout, on)
            if figures is None:
                stopping = True
                on.saves.save(step, state)
            else:
                on.reports.write(figures)
                on.reports.restart_clock(step)
        if stopping:
            # If a picture or an evaluation is due now, the next start makes it.
            logging.info("asked to stop: saving step %d; the same command resumes", step)
            break
        if on.pictures.is_due(step):
            on.pictures.draw(step, average(state))
            on.reports.restart_clock(step)
    return on.saves.whole(state)


def _evaluate(step, state, layout, on):
    saved = lambda: on.saves.whole(state).ema_params
    return on.evaluations.run(step, lambda: layout.average(state), saved)


class _Hooks(NamedTuple):
    """What happens between the steps."""

    stop: signals.Stop
    batches: Iterator
    profile: Callable[[int], None]
    measured: measurements.Measurements
    reports: hooks.Reports
    saves: hooks.Saves
    pictures: hooks.Pictures
    evaluations: hooks.Evaluations


@contextlib.contextmanager
def _hooks(config, workdir, source, setup, start, record, measure, check_alone, callback):
    """Opens the hooks; closes them at the end, also after an error."""
    checkpoints = checkpoint.Checkpointer(
        workdir / "checkpoints", config.checkpoint.keep, config.checkpoint.keep_period, check_alone
    )
    # The last run may have been killed between saving and pruning.
    checkpoints.prune(start.step)
    settings = config_lib.flatten(config)
    opened = boards.opened(config.log_to, workdir, record["id"], settings)
    waited = start.kept.get("waiting") is not None
    writer = logs.MetricWriter(workdir, start.step, opened, start.kept["lines"], waited)
    batches = _batches(config, source, start.step)
    speedometer = progress.Progress(start.step, config.num_steps, config.data.batch_size)
    saves = hooks.Saves(
        checkpoints,
        record,
        lambda: measured.state() | {"lines": writer.written(), "waiting": reports.waiting},
        start.step if start.restored else None,
        start.layout.whole,
    )
    skips = config.optimizer.nonfinite == "skip"
    guard = LossGuard(skips, saves.advice)
    measured = measurements.Measurements(start.kept, guard, skips, config.data.replace_unreadable)
    is_due = lambda every: lambda step: progress.is_due(step, every, config.num_steps)
    draw = functools.partial(_draw, config, setup)
    pictures = hooks.Pictures(workdir, is_due(config.sample.every), draw, writer, check_alone)
    evaluations = hooks.Evaluations(
        workdir, is_due(config.evaluation.every), measure, record, check_alone
    )
    first = start.step + _PROFILE_START
    with (
        signals.saving() as stop,
        contextlib.closing(checkpoints),
        contextlib.closing(writer),
        contextlib.closing(batches),
        profiler(workdir / "profile", first, config.profile_steps) as profile,
    ):
        reports = hooks.Reports(writer, speedometer, callback, start.waiting)
        yield _Hooks(stop, batches, profile, measured, reports, saves, pictures, evaluations)


def _batches(config, source, start):
    return data.batches(
        source,
        batch_size=config.data.batch_size,
        seed=config.seed,
        start_step=start,
        flip=config.data.flip,
        **dataset.pipeline_settings(config),
        num_workers=config.data.num_workers,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        stopped=signals.asked,
    )


def _draw(config, setup, params):
    num = min(sampling.GRID, config.sample.num)
    return experiment.draw_samples(config, setup, experiment.denoiser(setup, params), num)


def _look_ahead(config, channels):
    """Raises the error of evaluations during training; warns of that of ``--mode evaluate``."""
    # A slow import that only this needs; the step compiles meanwhile.
    from ant_jax import measuring

    every, settings = config.evaluation.every, config.evaluation
    if processes.is_first() and (every or settings.features or settings.split):
        try:
            measuring.check(config, channels)
        except ConfigError as error:
            if every:
                raise ConfigError(
                    f"config.evaluation.every = {every} evaluates during training: {error}; or set "
                    "config.evaluation.every to 0"
                ) from error
            logging.warning("--mode evaluate will refuse this: %s", error)


def _log_overview(config, setup, state, num_images):
    table = parameter_overview.get_parameter_overview(state.params, include_stats=False)
    logging.debug("\n%s", table)
    leaves = jax.tree.leaves(state.params)
    logging.info(
        "%s of %s parameters, %.3g MB (--verbosity=1 lists them); %d images of %s",
        config.model.name,
        f"{sum(leaf.size for leaf in leaves):,}",
        sum(leaf.nbytes for leaf in leaves) / 1e6,
        num_images,
        "x".join(map(str, setup.image_shape)),
    )
    logging.info("%s; clusters by %s: %s", config.method.name, config.clusters.name, _tasks(setup))
    logging.info("%d %s device(s)", jax.device_count(), jax.default_backend())


def _tasks(setup):
    """The noise levels of each task, and their log-SNR."""
    ends = experiment.task_ends(setup)
    if ends is None:
        sizes = np.diff(setup.clusters.boundaries)
        return f"{len(sizes)} tasks of {', '.join(map(str, sizes))} levels"
    return ", ".join(
        f"t = {first:.4g}..{last:.4g} (log-SNR {snr_first:.1f}..{snr_last:.1f})"
        for first, last, snr_first, snr_last in zip(*ends, strict=True)
    )


def _log_resumed(config, workdir, step):
    if step < config.num_steps:
        logging.info("resuming from step %d of %s", step, workdir / "checkpoints")
    else:
        way = "set config.num_steps higher"
        if config_lib.schedule_needs_num_steps(config):
            way = f"begin another run with config.init_from = '{workdir}'"
        logging.info(
            "the run in %s is finished, at step %d %s config.num_steps = %d; to train on, %s",
            workdir,
            step,
            "of" if step == config.num_steps else "beyond",
            config.num_steps,
            way,
        )
