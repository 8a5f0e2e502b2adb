"""Measures a run, or a file of samples."""

from ant_jax.runtime import extras

if _error := extras.missing("training"):
    raise _error

import contextlib
import functools
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from ant_jax import config as config_lib
from ant_jax import evaluation, experiment, measuring, results, sampling
from ant_jax import workdir as workdir_lib
from ant_jax.config import ConfigError
from ant_jax.runtime import logs, processes, signals
from ant_jax.runtime.files import user_path
from ant_jax.runtime.lock import InUseError
from ant_jax.runtime.progress import with_time_left
from ant_jax.sample import Stopped, draw
from ant_jax.sampling import cache
from ant_jax.settings import Affects
from ant_jax.workdir import Step

# Levels of the validation loss, and at most as many of all tasks together.
_LEVELS = 25


def evaluate(
    config: ConfigDict, workdir: str | Path, step: Step = None, **given: Any
) -> dict[str, float | int | str] | None:
    """Measures the EMA model, logs the figures and writes them to a JSON file.

    If ``config.evaluation.features`` is set, this compares samples with the data, and writes a grid
    of the first samples beside the JSON file. If ``config.evaluation.split`` is set, this measures
    the loss on held-out images, always at the same noise levels and with the same noise, whatever
    the clusters. Samples that an earlier call drew before it was killed are not drawn again.

    If ``config.evaluation.samples`` is set, this measures the samples of that file and nothing
    else. Then the workdir needs no run, and the result has no step.

    The JSON file has the figures, and under ``made_from`` what they depend on. It is named by the
    step, or by the file of samples. A key is added to the name if other figures already have it.

    Several processes share the drawing. Process 0 measures, and the others return None.

    Args:
      config: of the run.
      workdir: of the run.
      step: of the checkpoint, or "best"; the newest by default.
      **given: ``model``, ``process`` and ``weighting`` that `train.train` was given.

    Returns:
      The figures.

    Figures:
      step: the step of the checkpoint | steps | 1 and above | says nothing about the model
      nfe: calls of the network for a sample; with guidance, each call has a doubled batch | number
        | 1 and above | low: samples cost less
      validation_loss: mean loss on held-out images, over all noise levels, without loss weights |
        that of the loss | 0 and above | low; comparable if process and prediction are equal
      validation_cluster_losses: the same for each task, if tasks are intervals | that of the loss |
        0 and above | low

    Raises:
      FileNotFoundError: if the workdir has no such checkpoint.
      ConfigError: if the workdir is of another config; if ``config.evaluation`` names nothing to
        measure by, or something that can't be used; or if the run learned from images that were
        given from Python, which are not here to compare with.
      InUseError: if another job draws the same samples.
      FloatingPointError: if samples or the validation loss are not finite.
    """
    logs.show_progress()
    workdir = user_path(workdir)
    config_lib.validate(config)
    # A file of samples needs no run.
    before = None if config.evaluation.samples else workdir_lib.recorded(workdir)
    measuring.check(config, None if before is None else before["facts"].get("channels"))
    if config.evaluation.samples:
        return _of_file(config, workdir) if processes.is_first() else None
    if before is not None:
        check_source(config, workdir, before["given"])
    step, setup, params = results.restore_run(config, workdir, step, **given)
    made_from = results.run_origin(config, workdir, step, params)
    build = functools.cache(lambda: measuring.build(config))
    figures = measure_step(config, workdir, step, setup, params, made_from, build)
    if figures is not None:
        _log(figures)
    return figures


def measured(config: ConfigDict, workdir: Path, step: int) -> dict[str, Any] | None:
    """The figures that `evaluate` would measure, if an evaluation during training has written them.

    Raises the errors of `evaluate`.

    Args:
      config: of the run.
      workdir: of the run.
      step: of the checkpoint.

    Returns:
      The figures; None unless they are of these parameters, and all settings of the samples and of
      the measurement are the same.
    """
    _, _, params = results.restore_run(config, workdir, step)
    origin = results.run_origin(config, workdir, step, params)
    return results.read(
        path_of(workdir, step), made_from(config, origin, lambda: measuring.build(config))
    )


def measure_step(
    config: ConfigDict,
    workdir: Path,
    step: int,
    setup: experiment.Setup,
    params: Any,
    origin: dict[str, Any],
    build: Callable[[], measuring.Measuring],
    *,
    compiled: bool = False,
) -> dict[str, Any] | None:
    """Measures the EMA of a step, and writes the result; all processes call it together.

    Args:
      config: of the run.
      workdir: of the run.
      step: of the parameters.
      setup: what the config describes.
      params: the EMA.
      origin: of the samples; see `results.run_origin`.
      build: returns the `measuring.Measuring` of the config.
      compiled: whether an earlier call has compiled all programs.

    Returns:
      The figures, in process 0; None in the others.

    Raises:
      ConfigError: if held-out images can't be opened; in process 0, if the samples can't be
        measured.
      InUseError: if another job draws the same samples.
      FloatingPointError: if samples or the validation loss are not finite.
      Stopped: after a signal, if it does not end the program.
    """
    with contextlib.ExitStack() as stack:
        place = None
        if config.evaluation.features:
            place = stack.enter_context(_folder(workdir, origin))
        # First, so that unreadable held-out images are found before hours of drawing.
        validation = _in_first(lambda: _validation(config, step, setup, params, compiled))
        figures: dict[str, Any] = {"step": step}
        first = []
        if place is not None:
            measure = build().measure if processes.is_first() else None
            draw(config, place, step, setup, params, compiled=compiled)
            if measure is not None:
                batches = results.keep_first(cache.read(place, config.sample.num), first)
                try:
                    figures |= {"nfe": experiment.nfe(config)} | measure(_until_asked(batches))
                except ValueError as error:
                    raise ConfigError(
                        f"samples of step {step} can't be evaluated: {error}"
                    ) from error
        if not processes.is_first():
            return None
        figures |= validation
        _write(
            path_of(workdir, step),
            figures,
            made_from(config, origin, build),
            config,
            workdir,
            first,
        )
        if place is not None:
            shutil.rmtree(place, ignore_errors=True)
    return figures


@contextlib.contextmanager
def _folder(workdir, origin):
    """`cache.folder`, whose InUseError comes in all processes."""
    with contextlib.ExitStack() as stack:
        place = None

        def enter():
            nonlocal place
            place = stack.enter_context(cache.folder(workdir, origin))

        _in_first(enter)
        yield place or stack.enter_context(cache.folder(workdir, origin))


# Training goes on after these: if they came in process 0 alone, the others would wait for it.
_PASSED_ON = {each.__name__: each for each in (ConfigError, FloatingPointError, InUseError)}


def _in_first(function):
    """The result of process 0, or its error of `_PASSED_ON`, in all processes."""
    cause = None

    def attempt():
        nonlocal cause
        try:
            return [function(), "", ""]
        except tuple(_PASSED_ON.values()) as error:
            cause = error
            kind = next(name for name, each in _PASSED_ON.items() if isinstance(error, each))
            return [None, kind, str(error)]

    result, kind, problem = processes.broadcast_from_first(attempt)
    if kind:
        raise _PASSED_ON[kind](problem) from cause
    return result


def _until_asked(batches):
    for batch in batches:
        if signals.asked():
            raise Stopped
        yield batch


def check_source(config: ConfigDict, workdir: Path, given: Mapping[str, str]) -> None:
    """Checks that samples of a run are compared with what it learned from.

    Args:
      config: of the run.
      workdir: of the run.
      given: names of the objects that replace those of the config; see `workdir.names_of`.

    Raises:
      ConfigError: if the run learned from images that were given from Python.
    """
    settings = config.evaluation
    by_reference = settings.reference and not settings.split
    if "source" in given and not by_reference:
        raise ConfigError(
            f"the run in {workdir} learned from images that were given from Python, but its "
            f"samples would be compared with config.data.name = {config.data.name!r}: set "
            "config.evaluation.reference to an .npz of images and config.evaluation.split = ''"
        )


def _of_file(config, workdir):
    samples = user_path(config.evaluation.samples)
    first = []
    try:
        num = sampling.num_samples(samples)
        measure, measured_by, _ = measuring.build(config)
        batches = sampling.read_samples(samples, config.sample.batch_size)
        figures = measure(
            results.keep_first(with_time_left(batches, num, "samples evaluated"), first)
        )
    except ConfigError:
        raise
    except (ValueError, OSError) as error:
        raise ConfigError(f"config.evaluation.samples: {error}") from error
    origin = {
        "samples": str(samples.absolute()),
        "samples_made_from": results.made_from(samples.with_suffix(".json")),
        # The reference depends on these if it is the training images.
        "settings": {
            name: value
            for name, value in config_lib.affecting(config, Affects.PARAMETERS).items()
            if name.startswith("data.")
        },
    }
    path = workdir / "evaluation" / f"samples-{samples.stem}.json"
    _write(path, figures, _with_evaluation(origin, config) | measured_by, config, workdir, first)
    _log(figures)
    return figures


def _validation(config, step, setup, params, compiled):
    if not config.evaluation.split:
        return {}
    apply_fn = experiment.denoiser(setup, params)
    split = config.evaluation.split
    wait = "" if compiled else "; it compiles first ..."
    logging.info("validation loss on the images of %r%s", split, wait)
    losses = functools.partial(measuring.validation_losses, config, setup, apply_fn)
    (loss,) = losses(np.array([0, setup.process.span]), timesteps_each=_LEVELS)
    if not np.isfinite(loss):
        raise FloatingPointError(f"step {step}: the validation loss is {loss}")
    figures = {"validation_loss": float(loss)}
    if setup.clusters.order is None:
        boundaries = setup.clusters.boundaries
        each = losses(boundaries, timesteps_each=max(1, _LEVELS // (len(boundaries) - 1)))
        figures["validation_cluster_losses"] = each.tolist()
    return figures


def made_from(
    config: ConfigDict, origin: dict[str, Any], build: Callable[[], measuring.Measuring]
) -> dict[str, Any]:
    """What the figures of a run depend on, as values that JSON can hold.

    Args:
      config: of the run.
      origin: of the samples; see `results.run_origin`.
      build: returns the `measuring.Measuring` of the config.
    """
    measured_by = build().made_from if config.evaluation.features else {}
    return json.loads(json.dumps(_with_evaluation(origin, config) | measured_by))


def _with_evaluation(origin, config):
    # The digest in `Measuring.made_from` identifies the weights, which their path does not.
    settings = {
        f"evaluation.{name}": value
        for name, value in config.evaluation.items()
        if name not in ("weights", "samples", "every", "num_in_training")
    }
    return origin | {"settings": origin["settings"] | settings}


def path_of(workdir: Path, step: int) -> Path:
    """The file of a step's figures, unless figures of other settings have that name."""
    return workdir / "evaluation" / f"{step:08d}.json"


def _write(path, figures, made_from, config, workdir, first):
    path = results.write(path, figures | {"made_from": made_from}, config, workdir)
    if first:
        results.save_grid(path, first)
    logging.info("%s", path)


def _log(figures):
    for name, value in figures.items():
        if isinstance(value, list):
            value = ", ".join(f"{each:.4f}" for each in value)
        logging.info("%-28s %s", name, f"{value:.4f}" if isinstance(value, float) else value)
    if "fid" in figures:
        logging.info("%s", evaluation.table(figures))
