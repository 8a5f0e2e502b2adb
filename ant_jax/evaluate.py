"""The modes that draw samples from a trained run and measure them."""

from ant_jax.runtime import extras

if _error := extras.missing("training"):
    raise _error

import functools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from ant_jax import config as config_lib
from ant_jax import evaluation, experiment, measuring, results, sampling
from ant_jax import workdir as workdir_lib
from ant_jax.config import ConfigError
from ant_jax.runtime import logs, processes
from ant_jax.runtime.files import user_path
from ant_jax.runtime.progress import with_time_left
from ant_jax.sampling import cache
from ant_jax.settings import Affects


def sample(config: ConfigDict, workdir: str | Path, step: int | None = None, **given: Any) -> Path:
    """Draws ``config.sample.num`` samples from the EMA into an ``.npz``.

    Beside the ``.npz`` are a grid of the first samples and a JSON file that says what the samples
    were made from. The files are named by the step. A key is added to the name if samples of other
    settings, or the trainer's picture of them, already have that name. Samples that an earlier call
    drew before it was killed are not drawn again. Several processes share the drawing, and process
    0 writes the files.

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
    logs.show_progress()
    workdir = user_path(workdir)
    step, setup, params = results.restore_run(config, workdir, step, **given)
    made_from, num = results.run_origin(config, workdir, step, params), config.sample.num
    with cache.folder(workdir, made_from) as place:
        _draw(config, place, step, setup, params)
        plain = workdir / "samples" / f"{step:08d}.npz"
        content = {"num_samples": num, "made_from": made_from}
        place_of = lambda: results.write(plain.with_suffix(".json"), content, config, workdir).stem
        path = plain.with_stem(processes.broadcast_from_first(place_of))
        if processes.is_first():
            first = []
            sampling.write_samples(path, results.keep_first(cache.read(place, num), first), num)
            results.save_grid(path, first)
            shutil.rmtree(place, ignore_errors=True)
    logging.info("%d samples: %s, .png and .json", num, path)
    return path


def evaluate(
    config: ConfigDict, workdir: str | Path, step: int | None = None, **given: Any
) -> dict[str, float | int | str] | None:
    """Measures the EMA model, logs the figures and writes them to a JSON file.

    If ``config.evaluation.features`` is set, this compares samples with the data, and writes a grid
    of the first samples beside the JSON file. If ``config.evaluation.split`` is set, this measures
    ``validation_loss``: the mean loss on held-out images, without loss weights. It is always of the
    same timesteps and noise, whatever the clusters. ``nfe`` counts the calls of the network for a
    sample; with guidance each has a doubled batch. Samples that an earlier call drew before it was
    killed are not drawn again.

    If ``config.evaluation.samples`` is set, this measures the samples of that file and nothing
    else. Then the workdir needs no run, and the result has no step.

    The JSON file has the figures, and under ``made_from`` what they depend on. It is named by the
    step, or by the file of samples. A key is added to the name if other figures already have it.

    Several processes share the drawing. Process 0 measures, and the others return None.

    Args:
      config: of the run.
      workdir: of the run.
      step: of the checkpoint; the newest by default.
      **given: ``model``, ``process`` and ``weighting`` that `train.train` was given.

    Returns:
      The figures.

    Raises:
      FileNotFoundError: if the workdir has no checkpoint (of that step).
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
    measuring.check(config, before and before["facts"].get("channels"))
    if config.evaluation.samples:
        return _of_file(config, workdir) if processes.is_first() else None
    _check_source(config, workdir, before)
    step, setup, params = results.restore_run(config, workdir, step, **given)
    made_from = results.run_origin(config, workdir, step, params)
    if not config.evaluation.features:
        if not processes.is_first():
            return None
        figures = {"step": step} | _validation(config, step, setup, params)
        _report(figures, _with_evaluation(made_from, config), config, workdir, [])
        return figures
    with cache.folder(workdir, made_from) as place:
        if not processes.is_first():
            _draw(config, place, step, setup, params)
            return None
        # First, so that missing held-out images are found before hours of drawing.
        validation = _validation(config, step, setup, params)
        measure, measured_by = measuring.build(config)
        _draw(config, place, step, setup, params)
        first = []
        batches = results.keep_first(cache.read(place, config.sample.num), first)
        try:
            figures = {"step": step, "nfe": experiment.nfe(config)} | measure(batches) | validation
        except ValueError as error:
            raise ConfigError(f"samples of step {step} can't be evaluated: {error}") from error
        made_from = _with_evaluation(made_from, config) | measured_by
        _report(figures, made_from, config, workdir, first)
        shutil.rmtree(place, ignore_errors=True)
    return figures


def _check_source(config, workdir, before):
    settings = config.evaluation
    by_reference = settings.reference and not settings.split
    if before is not None and "source" in before["given"] and not by_reference:
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
        measure, measured_by = measuring.build(config)
        batches = sampling.read_samples(samples, config.sample.batch_size)
        figures = measure(
            results.keep_first(with_time_left(batches, num, "samples evaluated"), first)
        )
    except ConfigError:
        raise
    except (ValueError, OSError) as error:
        raise ConfigError(f"config.evaluation.samples: {error}") from error
    made_from = {
        "samples": str(samples.absolute()),
        "samples_made_from": results.made_from(samples.with_suffix(".json")),
        # The reference depends on these if it is the training images.
        "settings": {
            name: value
            for name, value in config_lib.affecting(config, Affects.PARAMETERS).items()
            if name.startswith("data.")
        },
    }
    made_from = _with_evaluation(made_from, config) | measured_by
    _report(figures, made_from, config, workdir, first)
    return figures


def _validation(config, step, setup, params):
    if not config.evaluation.split:
        return {}
    apply_fn = experiment.denoiser(setup, params)
    everything = np.array([0, setup.process.span])
    logging.info(
        "validation loss on the images of %r; it compiles first ...", config.evaluation.split
    )
    (loss,) = measuring.validation_losses(config, setup, apply_fn, everything, timesteps_each=25)
    if not np.isfinite(loss):
        raise FloatingPointError(f"step {step}: the validation loss is {loss}")
    return {"validation_loss": float(loss)}


def _with_evaluation(made_from, config):
    """What figures depend on, given what their samples depend on."""
    # The digest in `Measuring.made_from` identifies the weights, which their path does not.
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


def _draw(config, place, step, setup, params):
    """Draws the samples of the EMA that are not drawn yet."""
    # The folder's name depends on the parameters and the decoder.
    processes.assert_equal(lambda: {"parameters of the run and of config.autoencoder": place.name})
    num = config.sample.num
    logging.info("drawing %d samples of step %d; the sampler compiles first ...", num, step)
    apply_fn = experiment.denoiser(setup, params)
    draw = functools.partial(experiment.draw_samples, config, setup, apply_fn, num)
    try:
        batch_size = sampling.rounded_batch_size(config.sample.batch_size, num)
        cache.draw_missing(place, num, batch_size, draw)
    except FloatingPointError as error:
        raise FloatingPointError(f"step {step}: {error}") from error
