"""The training loop."""

import contextlib
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from absl import logging
from clu import parameter_overview
from ml_collections import ConfigDict

from ant_jax import config as config_lib
from ant_jax import data, experiment, init_from, sampling
from ant_jax import workdir as workdir_lib
from ant_jax.config import ConfigError
from ant_jax.latents import dataset
from ant_jax.runtime import checkpoint, logs, processes, progress, signals
from ant_jax.runtime import devices as devices_lib
from ant_jax.runtime.lock import job_lock
from ant_jax.train_step import TrainState

_PROFILE_START = 10
# So many steps in a row that are not finite come from the parameters, not from the data.
_PATIENCE = 9


def train(config: ConfigDict, workdir: str | Path) -> TrainState:
    """Trains to ``config.num_steps``, from the newest checkpoint in the workdir if there is one.

    Args:
      config: see ``configs/digits.py``.
      workdir: gets ``config.json``, ``facts.json``, ``metrics.jsonl``, TensorBoard files,
        ``samples/`` and ``checkpoints/``.

    Returns:
      The state reached: the last one, or on SIGTERM, SIGHUP or Ctrl-C the one that was saved.

    Raises:
      KeyboardInterrupt: on one of these before the first step, when there is nothing to save yet,
        or on a second one.
      ConfigError: for impossible settings, or a workdir of another config or in another's use.
      FloatingPointError: at the first loss or gradient that is not finite, or, where
        ``config.optimizer.nonfinite`` skips them, at the tenth in a row since the start.
    """
    workdir = Path(workdir)
    config_lib.validate(config)
    source = dataset.open_data(config)
    # Process 0's: another may see the disk a little later.
    before = processes.broadcast_from_first(lambda: workdir_lib.recorded(workdir))
    boundaries = None
    if before is not None:
        config_lib.check_same(config_lib.from_json(before["config"]), config, workdir)
        workdir_lib.check_data(before["facts"], source, workdir)
        boundaries = before["facts"].get("boundaries")
    pieces = experiment.build(config, source.image_shape[-1], source.num_classes, boundaries)
    experiment.check_batch(config, pieces.method)
    processes.assert_equal(lambda: _found(pieces, source))
    with _alone(workdir) as check_alone:
        return _train(config, workdir, source, pieces, before, check_alone)


def _found(pieces, source):
    """What each of several processes finds for itself, which must be the same."""
    devices = jax.local_devices()
    return {
        "devices of a process": len(devices),
        "kind of device": devices[0].device_kind,
        **workdir_lib.facts(pieces, source),
    }


def _train(config, workdir, source, pieces, before, check_alone):
    if processes.is_first() and workdir_lib.recorded(workdir) != before:
        raise ConfigError(f"another run has begun in {workdir} just now: start again")
    directory = (workdir / "checkpoints").absolute()
    # Before anything is written or compiled: what can't be read is an error at once.
    begun = processes.broadcast_from_first(lambda: bool(checkpoint.checkpoint_steps(directory)))
    params = None if begun else init_from.initial_params(config, pieces)
    if max(checkpoint.checkpoint_steps(directory), default=0) < config.num_steps:
        logging.info("compiling the step ...")
        step_fn = experiment.start_compiling(config, pieces)
    else:
        step_fn = experiment.training_step(config, pieces)
    _look_ahead(config)
    restored = workdir_lib.restore(config, pieces, workdir)
    kept = None
    if restored is None:
        start, state = 0, experiment.new_state(config, pieces, params)
        # On the devices now; the host's copy would stay as long as the training.
        del params
        _log_overview(config, pieces, state, len(source))
    else:
        start, state = restored
        if start < config.num_steps:
            logging.info("resuming from step %d of %s", start, directory)
        else:
            logging.info(
                "%s is at step %d already, and config.num_steps = %d: raise it to train on",
                workdir,
                start,
                config.num_steps,
            )
        kept = processes.broadcast_from_first(lambda: checkpoint.read_record(directory, start))
    saved = None if restored is None else start
    # Of a checkpoint of an older version nothing is known.
    kept = kept["metrics"] if kept else {"interval": {}, "skipped": 0, "replaced": 0, "lines": None}
    _check_same(start, state)

    # Until here a start can be refused, and so nothing but the lock is written before.
    checkpoints = checkpoint.Checkpointer(
        directory, config.checkpoint.keep, config.checkpoint.keep_period, check_alone
    )
    # A kill may have come between the save and the pruning that follows it.
    checkpoints.prune(start)
    record = {"id": (before or {}).get("id") or uuid.uuid4().hex, "config": config.to_dict()}
    if processes.is_first():
        record["facts"] = workdir_lib.save_facts(pieces, source, workdir, record["id"])
        workdir_lib.save_config(config, workdir)
    writer = logs.MetricWriter(workdir, start, config.tensorboard, kept["lines"])
    batches = data.batches(
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
    grid_is_due = lambda step: sampling.grid_is_due(step, config.sample.every, config.num_steps)
    speedometer = progress.Progress(start, config.num_steps, config.data.batch_size)
    measured = _Measured(config, kept, lambda: _advice(saved, directory))

    def save(step):
        nonlocal saved
        so_far = measured.state() | {"lines": writer.written()}
        _check_finite(step, state, saved, directory)
        _check_same(step, state)
        checkpoints.save(step, state, record | {"metrics": so_far})
        saved = step

    with (
        signals.saving() as stop,
        contextlib.closing(checkpoints),
        contextlib.closing(writer),
        contextlib.closing(batches),
        _profiler(config, workdir, start) as profile,
    ):
        if start and grid_is_due(start) and not _grid_path(workdir, start).exists():
            # A kill came between the checkpoint and its picture.
            _write_grid(config, pieces, state.ema_params, workdir, writer, start)
            processes.barrier()
        for step in range(start + 1, config.num_steps + 1):
            profile(step)
            # Read while the devices work on the step before; the call below sends it to them.
            batch = next(batches, None)
            if batch is None:
                logging.info("asked to stop while waiting for data: saving step %d", step - 1)
                if saved != step - 1:
                    save(step - 1)
                break
            measured.replaced += int(batch.pop("replaced", np.zeros(0)).sum())
            state, on_device = step_fn(state, batch)
            if step == start + 1:
                speedometer.restart(start)
                # From now on there is something to save.
                stop.saving = True
            measured.add(step, on_device)
            checkpoints.check()

            log = step % config.log_every == 0
            last = step == config.num_steps
            ends = last or _stop_here(stop, log)
            # Between two reports a run that stops keeps its numbers in the checkpoint.
            if log or last:
                report = measured.report()
                speed = speedometer.line(step, np.nan if report["loss"] is None else report["loss"])
                writer.scalars(step, {**report, "steps_per_second": speed})
            if step % config.checkpoint.every == 0 or ends:
                save(step)
            if ends and not last:
                # A picture that is due now is drawn at the next start.
                logging.info("asked to stop: saving step %d, start again to go on", step)
                break
            if grid_is_due(step):
                check_alone()
                _write_grid(config, pieces, state.ema_params, workdir, writer, step)
                # In a collective on CPUs the others would not wait longer than half a minute.
                processes.barrier()
                speedometer.restart(step)
    return state


class _Measured:
    """What the steps since the last report have measured; a checkpoint keeps it.

    Attributes:
      replaced: number of images that this process has replaced.
    """

    def __init__(self, config: ConfigDict, kept: dict[str, Any], advice: Callable[[], str]):
        """Starts from what `state` gave; see `_advice`."""
        self._replaces = config.data.replace_unreadable
        self._skips = config.optimizer.nonfinite == "skip"
        self._advice = advice
        self._interval = logs.MeanMetrics(kept["interval"])
        self._pending = None
        self._in_a_row, self._skipped = 0, kept["skipped"]
        # Each process counts in its own part of the batches.
        self.replaced = kept["replaced"] if processes.is_first() else 0

    def add(self, step: int, on_device: dict[str, jax.Array]) -> None:
        """Takes a step's metrics, and fetches those of the one before, while this one runs.

        Raises:
          FloatingPointError: if those are not finite, and steps are not skipped or too many were.
        """
        self._fetch()
        self._pending = step, on_device

    def state(self) -> dict[str, Any]:
        """All that was measured, as JSON can hold it; raises what `add` does."""
        self._fetch()
        return {
            "interval": self._interval.state(),
            "skipped": self._skipped,
            "replaced": self._replaced_anywhere(),
        }

    def report(self) -> dict[str, Any]:
        """What a line of ``metrics.jsonl`` says; starts anew; raises what `add` does."""
        self._fetch()
        report = self._interval.report()
        if self._replaces:
            report["replaced_images"] = self._replaced_anywhere()
            self.replaced = 0
        if self._skips:
            report["skipped_steps"] = self._skipped
            self._skipped = 0
        return report

    def _replaced_anywhere(self):
        return sum(processes.all_gather(self.replaced)) if self._replaces else 0

    def _fetch(self):
        if self._pending is None:
            return
        (step, on_device), self._pending = self._pending, None
        values = jax.device_get(on_device)
        finite = np.isfinite(values["loss"]) and np.isfinite(values["grad_norm"])
        self._in_a_row = 0 if finite else self._in_a_row + 1
        if self._in_a_row > (_PATIENCE if self._skips else 0):
            raise FloatingPointError(f"{_figures(step, values)}; {self._advice()}")
        if not finite:
            logging.warning("%s; the update is skipped", _figures(step, values))
            self._skipped += 1
            # No part of a mean.
            values = jax.tree.map(lambda value: np.full_like(value, np.nan), values)
        self._interval.add(values)


def _grid_path(workdir, step):
    return workdir / "samples" / f"{step:08d}.png"


def _write_grid(config, pieces, ema_params, workdir, writer, step):
    if not processes.is_first():
        return
    apply_fn = experiment.denoiser(pieces, ema_params)
    drawn = sampling.sample_batches(config, pieces, apply_fn, min(sampling.GRID, config.sample.num))
    try:
        grid = sampling.image_grid(np.concatenate([images for images, _ in drawn]))
    except FloatingPointError as error:
        # The parameters are finite, so training may well go on to better ones.
        logging.warning("no picture of step %d: %s", step, error)
        return
    path = _grid_path(workdir, step)
    sampling.save_png(path, grid)
    writer.image(step, "samples", grid)
    logging.info("samples of step %d: %s", step, path)


def _look_ahead(config):
    """Says what --mode evaluate would refuse, before the hours of training and not after."""
    # Beside the compilation, because nothing else here needs it.
    from ant_jax.evaluation import evaluator

    if processes.is_first() and (config.evaluation.features or config.evaluation.split):
        try:
            evaluator.check(config)
        except ConfigError as error:
            logging.warning("--mode evaluate will refuse this: %s", error)


def _log_overview(config, pieces, state, num_images):
    logging.info(
        "\n%s", parameter_overview.get_parameter_overview(state.params, include_stats=False)
    )
    method = config.method.name
    logging.info(
        "%s; clusters by %s: %s; %d images; %d %s device(s)",
        method,
        config.clusters.cost,
        " ".join(map(str, pieces.method.boundaries)),
        num_images,
        jax.device_count(),
        jax.default_backend(),
    )


def _check_finite(step, state, saved, directory):
    """A state that is not finite must not become the last good checkpoint."""
    if not np.isfinite(jax.jit(optax.tree.norm)((state.params, state.ema_params))):
        raise FloatingPointError(
            f"step {step}: parameters are not finite; {_advice(saved, directory)}"
        )


def _check_same(step, state):
    """A state that differs between processes or devices must not become a checkpoint."""
    processes.assert_equal(lambda: {f"the state after step {step}": devices_lib.checksums(state)})


def _figures(step, values):
    losses = ", ".join(f"{loss:.4g}" for loss in values["cluster_losses"])
    return (
        f"step {step}: loss {values['loss']:.4g}, gradient norm {values['grad_norm']:.4g}; "
        f"cluster losses [{losses}]"
    )


def _advice(saved, directory):
    last = "none yet" if saved is None else f"step {saved} in {directory}"
    return (
        f"last good checkpoint: {last}. A lower config.optimizer.learning_rate or "
        "config.optimizer.clip_norm may help, or config.optimizer.nonfinite = 'skip' if it is rare."
    )


@contextlib.contextmanager
def _alone(workdir: Path) -> Iterator[Callable[[], None]]:
    """Keeps other runs out of a workdir while this one, of however many processes, is in it.

    Yields:
      A function that raises a CheckpointError once the workdir is no longer the one that was
      locked.
    """
    new = [folder for folder in (workdir, *workdir.parents) if not folder.exists()]
    with job_lock(
        workdir / ".lock",
        f"is training in {workdir}",
        "wait for it, stop it, or choose another --workdir",
    ) as is_held:

        def check():
            if not is_held():
                raise checkpoint.CheckpointError(
                    f"{workdir} was removed or replaced, or its .lock was, while this run trained "
                    "in it: it ends here, and nothing more is saved"
                )

        try:
            yield check
        except BaseException:
            # A start that is refused leaves nothing.
            with contextlib.suppress(OSError):
                if processes.is_first() and is_held() and os.listdir(workdir) == [".lock"]:
                    (workdir / ".lock").unlink()
                    for folder in new:
                        folder.rmdir()
            raise


def _stop_here(stop, waiting):
    """Whether to stop after this step because a signal has come.

    All processes must stop at the same step, so many ask each other, and only where the loop waits
    for the device anyway.
    """
    asked = stop.signum is not None
    if jax.process_count() == 1:
        return asked
    return waiting and any(processes.all_gather(asked))


@contextlib.contextmanager
def _profiler(config: ConfigDict, workdir: Path, start: int) -> Iterator:
    """Yields a function that is called before each step and traces the steps asked for."""
    first = start + _PROFILE_START
    running = False

    def before_step(step):
        nonlocal running
        if config.profile_steps and step == first and processes.is_first():
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
