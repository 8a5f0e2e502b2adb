"""Samples of a trained run, and how good they are."""

import functools
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from jax.tree_util import Partial
from ml_collections import ConfigDict

from ant_jax import config as config_lib
from ant_jax import dataset, evaluation, experiment, models, results, sampling
from ant_jax import settings as settings_lib
from ant_jax import workdir as workdir_lib
from ant_jax.config import ConfigError
from ant_jax.evaluation import metrics
from ant_jax.evaluation.summary import Batch
from ant_jax.runtime import processes
from ant_jax.runtime.files import user_path
from ant_jax.runtime.progress import with_time_left
from ant_jax.sampling import cache
from ant_jax.settings import Affects

_VALIDATION_IMAGES = 1000


def sample(config: ConfigDict, workdir: Path, step: int | None = None, **given: Any) -> Path:
    """Draws ``config.sample.num`` samples from the EMA into an ``.npz``.

    Beside it are a grid of the first ones and a JSON file that says what they were made from. Their
    name is the step; a key follows where samples of other settings, or the trainer's picture of
    them, have that name. What an earlier call has drawn before it was killed is not drawn again.
    Several processes share the drawing; the files are made by process 0.

    Args:
      config: of the run.
      workdir: of the run.
      step: of the checkpoint; the newest by default.
      **given: ``model``, ``process`` and ``weighting`` that `train.train` was given.

    Returns:
      The ``.npz`` file.

    Raises:
      FileNotFoundError: if the workdir has no checkpoint (of that step).
      ConfigError: if the workdir is of another config.
      InUseError: if another job draws the same samples.
      FloatingPointError: if samples have numbers that are not finite.
    """
    step, setup, state = results.restore_run(config, workdir, step, **given)
    made_from, num = results.run_origin(config, workdir, step, state), config.sample.num
    with cache.folder(workdir, made_from) as place:
        logging.info("drawing %d samples from step %d", num, step)
        _draw(config, place, step, setup, state)
        plain = workdir / "samples" / f"{step:08d}.npz"
        content = {"num_samples": num, "made_from": made_from}
        place_of = lambda: results.write(plain.with_suffix(".json"), content, config, workdir).stem
        path = plain.with_stem(processes.broadcast_from_first(place_of))
        if processes.is_first():
            first = []
            sampling.write_samples(path, results.noting_first(cache.read(place, num), first), num)
            results.save_grid(path, first)
            shutil.rmtree(place, ignore_errors=True)
    logging.info("%d samples: %s, .png and .json", num, path)
    return path


def evaluate(
    config: ConfigDict, workdir: Path, step: int | None = None, **given: Any
) -> dict[str, float | int | str] | None:
    """Measures the EMA model; logs what it finds and writes a JSON file.

    By ``config.evaluation.features`` it measures samples against the data, and leaves a grid of the
    first ones beside the JSON file; by ``config.evaluation.split`` it measures the loss on held-out
    images, without loss weights: ``validation_loss``, the mean over the same timesteps and noise
    whatever the clusters. What an earlier call has drawn before it was killed is not drawn again.

    With ``config.evaluation.samples`` it measures the samples of that file and nothing else; then
    the workdir needs no run, and the result has no step.

    The JSON file has the figures and, as ``made_from``, what they depend on. Its name is
    the step, or that of the file of samples; a key follows where figures of something else have it.

    Several processes share the drawing; process 0 measures, and the others return None.

    Args:
      config: of the run.
      workdir: of the run.
      step: of the checkpoint; the newest by default.
      **given: ``model``, ``process`` and ``weighting`` that `train.train` was given.

    Returns:
      The figures.

    Raises:
      FileNotFoundError: if the workdir has no checkpoint (of that step).
      ConfigError: if the workdir is of another config, or names nothing to measure by, or what it
        names can't be used, or if the run learned from images that were given from Python, which
        this can't compare with.
      InUseError: if another job draws the same samples.
      FloatingPointError: if samples or the validation loss are not finite.
    """
    config_lib.validate(config)
    check(config)
    if config.evaluation.samples:
        return _of_file(config, workdir) if processes.is_first() else None
    _check_source(config, workdir)
    step, setup, state = results.restore_run(config, workdir, step, **given)
    made_from = results.run_origin(config, workdir, step, state)
    if not config.evaluation.features:
        if not processes.is_first():
            return None
        figures = {"step": step} | _validation(config, step, setup, state)
        _report(figures, _with_evaluation(made_from, config), config, workdir, [])
        return figures
    with cache.folder(workdir, made_from) as place:
        if not processes.is_first():
            _draw(config, place, step, setup, state)
            return None
        # Before the samples: held-out images that are not there must not cost hours of drawing.
        validation = _validation(config, step, setup, state)
        evaluator = measuring(config)
        _draw(config, place, step, setup, state)
        first = []
        batches = results.noting_first(cache.read(place, config.sample.num), first)
        try:
            figures = {"step": step} | evaluator.measure(batches) | validation
        except ValueError as error:
            raise ConfigError(f"samples of step {step} can't be evaluated: {error}") from error
        made_from = _with_evaluation(made_from, config) | evaluator.made_from
        _report(figures, made_from, config, workdir, first)
        shutil.rmtree(place, ignore_errors=True)
    return figures


def _check_source(config, workdir):
    before = workdir_lib.recorded(workdir)
    settings = config.evaluation
    by_reference = settings.reference and not settings.split
    if before is not None and "source" in before["given"] and not by_reference:
        raise ConfigError(
            f"the run in {workdir} learned from images that were given from Python, and would be "
            f"compared with those of config.data.name = {config.data.name!r}: set "
            "config.evaluation.reference to an .npz of images and config.evaluation.split = ''"
        )


class Measuring(NamedTuple):
    """What measures samples.

    Attributes:
      measure: From batches of samples to figures.
      made_from: What the figures depend on beside the samples and the settings.
    """

    measure: Callable[[Iterable[Batch]], dict[str, Any]]
    made_from: dict[str, Any]


def check(config: ConfigDict) -> None:
    """Checks what can be checked before a run is restored and samples are drawn.

    Raises:
      ConfigError: If there is nothing to measure, or what it would be measured by is not named, or
        is not there, or can't evaluate such images.
    """
    settings = config.evaluation
    if not settings.features and (settings.samples or not settings.split):
        split = "" if settings.samples else "; or config.evaluation.split the held-out images"
        raise ConfigError(
            "there is nothing to measure by: config.evaluation.features must be 'inception', or "
            f"'digits' for those{split}"
        )
    paths = ["samples"]
    if settings.features:
        if not settings.samples and config.sample.num < 2:
            raise ConfigError(f"config.sample.num = {config.sample.num}: figures need 2 samples")
        paths.append("reference")
    for name in paths:
        path = settings[name]
        if path and not user_path(path).is_file():
            raise ConfigError(f"config.evaluation.{name} = {path!r}: there is no such file")
    if settings.features:
        _metrics(settings.metrics)
        size, channels = config.data.image_size, 3 if config.autoencoder.name else None
        try:
            config_lib.build(config, "evaluation").check(size, size, channels)
        except ConfigError:
            raise
        except ValueError as error:
            own = config_lib.arguments(config, "evaluation")
            others = [f"config.evaluation.{name}" for name in own]
            raise ConfigError(
                f"config.evaluation.features = {settings.features!r} {error}: set "
                f"{' or '.join([*others, 'config.evaluation.features'])}"
            ) from error
    if settings.split and not settings.samples:
        try:
            dataset.open_data(config, settings.split)
        except ConfigError as error:
            raise ConfigError(f"config.evaluation.split = {settings.split!r}: {error}") from error


def _metrics(names):
    names = names or settings_lib.names_in(metrics, evaluation.Metric)
    try:
        return [settings_lib.resolve(metrics, name, evaluation.Metric)() for name in names]
    except ValueError as error:
        raise ConfigError(f"config.evaluation.metrics {error}") from error


def measuring(config: ConfigDict, names: Sequence[str] = ()) -> Measuring:
    """What ``config.evaluation`` measures samples by; the reference is worked off right away.

    Args:
      config: Of the run.
      names: Of metrics; () for ``config.evaluation.metrics``. Those for which the extractor or the
        reference has too little are left out.

    Raises:
      ConfigError: If a file that the config names is not what it should be.
    """
    settings, batch_size = config.evaluation, config.sample.batch_size
    every = _metrics(names or settings.metrics)
    try:
        evaluator = evaluation.build_evaluator(config_lib.build(config, "evaluation"), every)
    except ConfigError:
        raise
    except (ValueError, OSError) as error:
        raise ConfigError(f"config.evaluation.features = {settings.features!r}: {error}") from error
    if settings.reference:
        logging.info("reference: %s", settings.reference)
        try:
            reference = evaluation.read_reference(
                user_path(settings.reference), evaluator, batch_size
            )
        except (ValueError, OSError) as error:
            raise ConfigError(f"config.evaluation.reference: {error}") from error
    else:
        images = _images(config, config.data.split)
        held_out = _images(config, settings.split) if settings.split else None
        try:
            reference = evaluation.data_reference(evaluator, images, held_out, batch_size)
        except ValueError as error:
            raise ConfigError(f"config.data: {error}") from error
    measure = functools.partial(evaluation.measure, evaluator=evaluator, reference=reference)
    return Measuring(measure, {settings.features: evaluator.network.digest[:16]})


def _images(config, split):
    """The images of a split as they are: neither mirrored nor cropped at random."""
    settings = config.data
    source, place = dataset.open_images(config, split), settings.get("dir", "")
    crop = "none" if settings.crop == "none" else "center"
    key = {
        "name": dataset.source_name(config),
        "dir": str(user_path(place).absolute()) if place else "",
        "split": split,
        "num": len(source),
        "size": settings.image_size,
        "crop": crop,
        "exif": settings.get("exif", "ignore"),
    }
    pipeline = {
        "image_size": settings.image_size,
        "crop": crop,
        "replace_unreadable": settings.replace_unreadable,
        "num_workers": settings.num_workers,
    }
    name = f"{settings.name}[{split}]" if split else settings.name
    return evaluation.Images(name, source, pipeline, key)


def _of_file(config, workdir):
    samples = user_path(config.evaluation.samples)
    first = []
    try:
        num = sampling.num_samples(samples)
        evaluator = measuring(config)
        batches = sampling.read_samples(samples, config.sample.batch_size)
        figures = evaluator.measure(
            results.noting_first(with_time_left(batches, num, "samples evaluated"), first)
        )
    except ConfigError:
        raise
    except (ValueError, OSError) as error:
        raise ConfigError(f"config.evaluation.samples: {error}") from error
    made_from = {
        "samples": str(samples.absolute()),
        "samples_made_from": results.made_from(samples.with_suffix(".json")),
        # Of the reference, where it is the training images.
        "settings": {
            name: value
            for name, value in config_lib.affecting(config, Affects.PARAMETERS).items()
            if name.startswith("data.")
        },
    }
    made_from = _with_evaluation(made_from, config) | evaluator.made_from
    _report(figures, made_from, config, workdir, first)
    return figures


def _validation(config, step, setup, state):
    if not config.evaluation.split:
        return {}
    apply_fn = experiment.denoiser(setup, state.ema_params)
    everything = np.array([0, setup.process.span])
    (loss,) = validation_losses(config, setup, apply_fn, everything, timesteps_each=25)
    if not np.isfinite(loss):
        raise FloatingPointError(f"step {step}: the validation loss is {loss}")
    return {"validation_loss": float(loss)}


def _with_evaluation(made_from, config):
    """What figures depend on, from what their samples do."""
    # The digest of the weights says more than their place.
    settings = {
        f"evaluation.{name}": value
        for name, value in config.evaluation.items()
        if name not in ("weights", "samples")
    }
    return made_from | {"settings": made_from["settings"] | settings}


def _report(figures, made_from, config, workdir, first):
    samples = config.evaluation.samples
    name = f"samples-{Path(samples).stem}" if samples else f"{figures['step']:08d}"
    content = figures | {"made_from": made_from}
    path = results.write(workdir / "evaluation" / f"{name}.json", content, config, workdir)
    if first:
        results.save_grid(path, first)
    for name, value in figures.items():
        logging.info("%-28s %s", name, f"{value:.4f}" if isinstance(value, float) else value)
    if "fid" in figures:
        logging.info("%s", evaluation.table(figures))
    logging.info("%s", path)


def validation_losses(
    config: ConfigDict,
    setup: experiment.Setup,
    apply_fn: Partial,
    boundaries: np.ndarray,
    timesteps_each: int,
) -> np.ndarray:
    """(k,) mean loss of each interval on held-out images; see `evaluation.interval_losses`."""
    x0, labels = dataset.images(config, config.evaluation.split, _VALIDATION_IMAGES)
    return evaluation.interval_losses(
        apply_fn,
        setup.process,
        x0,
        jax.random.key(0),
        boundaries,
        y=labels if models.num_classes(setup.model) else None,
        timesteps_each=timesteps_each,
    )


def _draw(config, place, step, setup, state):
    """Draws the samples of the EMA that are not there yet."""
    # Named by the parameters and the decoder.
    processes.assert_equal(lambda: {"parameters of the run and of config.autoencoder": place.name})
    num = config.sample.num
    apply_fn = experiment.denoiser(setup, state.ema_params)
    draw = functools.partial(experiment.draw_samples, config, setup, apply_fn, num)
    try:
        batch_size = sampling.rounded_batch_size(config.sample.batch_size, num)
        cache.draw_missing(place, num, batch_size, draw)
    except FloatingPointError as error:
        raise FloatingPointError(f"step {step}: {error}") from error
