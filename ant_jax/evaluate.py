"""Samples of a trained run, and how good they are."""

import functools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from absl import logging
from jax.tree_util import Partial
from ml_collections import ConfigDict

from ant_jax import config as config_lib
from ant_jax import drawn, evaluation, experiment, inputs, judge, processes, sampling
from ant_jax.config import ConfigError
from ant_jax.files import user_path, write_bytes
from ant_jax.metrics import with_time_left
from ant_jax.train_step import TrainState

_VALIDATION_IMAGES = 1000


def sample(config: ConfigDict, workdir: Path, step: int | None = None) -> Path:
    """Draws ``config.sample.num`` samples from the EMA into an ``.npz`` and a grid beside it.

    What an earlier call has drawn before it was killed is not drawn again. Several processes share
    the drawing; the files are made by process 0.

    Raises:
      FileNotFoundError: if the workdir has no checkpoint (of that step).
      ConfigError: if the workdir is of another config.
    """
    step, pieces, state = restore_run(config, workdir, step)
    logging.info("drawing %d samples from step %d", config.sample.num, step)
    path = workdir / "samples" / f"{step:08d}.npz"
    place = _draw(config, workdir, step, pieces, state)
    if processes.is_first():
        batches = _with_grid(drawn.read(place, config.sample.num), path.with_suffix(".png"))
        evaluation.write_samples(path, batches, config.sample.num)
        shutil.rmtree(place, ignore_errors=True)
    logging.info("%d samples: %s and %s", config.sample.num, path, path.with_suffix(".png"))
    return path


def evaluate(
    config: ConfigDict, workdir: Path, step: int | None = None
) -> dict[str, float | int | str] | None:
    """Measures the EMA model; logs what it finds and writes a JSON file.

    By ``config.evaluation.features`` it measures samples against the data, and leaves a grid of the
    first ones beside the JSON file; by ``config.evaluation.split`` it measures the loss on held-out
    images, without loss weights: ``validation_loss``, the mean over the same timesteps and noise
    whatever the clusters. What an earlier call has drawn before it was killed is not drawn again.

    With ``config.evaluation.samples`` it measures the samples of that file and nothing else; then
    the workdir needs no run, and the result has no step.

    Several processes share the drawing; process 0 measures, and the others return None.

    Raises:
      FileNotFoundError: if the workdir has no checkpoint (of that step).
      ConfigError: if the workdir is of another config, or names nothing to measure by, or what it
        names can't be used.
    """
    config_lib.validate(config)
    judge.check(config)
    settings = config.evaluation
    if settings.samples:
        return _of_file(config, workdir) if processes.is_first() else None
    step, pieces, state = restore_run(config, workdir, step)
    if not processes.is_first():
        if settings.features:
            _draw(config, workdir, step, pieces, state)
        return None
    result = {"step": step}
    path = workdir / "evaluation" / f"{step:08d}.json"
    validation = {}
    # Before the samples: held-out images that are not there must not cost hours of drawing.
    if settings.split:
        apply_fn = experiment.denoiser(pieces, state.ema_params)
        everything = np.array([0, pieces.process.num_timesteps])
        (loss,) = validation_losses(config, pieces, apply_fn, everything, timesteps_each=25)
        validation = {"validation_loss": float(loss)}
    if not settings.features:
        result |= validation
        _report(result, path)
        return result
    measure = judge.build(config)
    place = _draw(config, workdir, step, pieces, state)
    batches = _with_grid(drawn.read(place, config.sample.num), path.with_suffix(".png"))
    result |= measure(batches) | validation
    _report(result, path)
    shutil.rmtree(place, ignore_errors=True)
    return result


def _of_file(config, workdir):
    samples = user_path(config.evaluation.samples)
    path = workdir / "evaluation" / f"samples-{samples.stem}.json"
    try:
        num = evaluation.num_samples(samples)
        measure = judge.build(config)
        batches = evaluation.read_samples(samples, config.sample.batch_size)
        batches = with_time_left(batches, num, "samples judged")
        result = measure(_with_grid(batches, path.with_suffix(".png")))
    except ConfigError:
        raise
    except (ValueError, OSError) as error:
        raise ConfigError(f"config.evaluation.samples: {error}") from error
    _report(result, path)
    return result


def _report(result, path):
    write_bytes(path, (json.dumps(result, indent=1) + "\n").encode())
    for name, value in result.items():
        logging.info("%-28s %s", name, f"{value:.4f}" if isinstance(value, float) else value)
    if "fid" in result:
        logging.info("%s", judge.table(result))
    logging.info("%s", path)


def validation_losses(
    config: ConfigDict,
    pieces: experiment.Experiment,
    apply_fn: Partial,
    boundaries: np.ndarray,
    timesteps_each: int,
) -> np.ndarray:
    """(k,) mean loss of each interval on held-out images; see `evaluation.interval_losses`."""
    x0, labels = inputs.images(config, config.evaluation.split, _VALIDATION_IMAGES)
    return evaluation.interval_losses(
        apply_fn,
        pieces.process,
        x0,
        jax.random.key(0),
        boundaries,
        y=labels if pieces.model.num_classes else None,
        timesteps_each=timesteps_each,
    )


def _draw(config, workdir, step, pieces, state):
    """Draws samples of the EMA and gives the folder where they are kept."""
    params, num = state.ema_params, config.sample.num
    place = drawn.folder(workdir, config, step, params)
    apply_fn = experiment.denoiser(pieces, params)
    draw = functools.partial(sampling.sample_batches, config, pieces, apply_fn, num)
    drawn.draw_missing(place, num, sampling.batch_size(config, num), draw)
    return place


def _with_grid(batches: Iterator, path: Path) -> Iterator:
    first = []
    for images, labels in batches:
        if sum(map(len, first)) < sampling.GRID:
            first.append(images)
        yield images, labels
    sampling.save_png(path, sampling.image_grid(np.concatenate(first)[: sampling.GRID]))


def restore_run(
    config: ConfigDict, workdir: Path, step: int | None = None
) -> tuple[int, experiment.Experiment, TrainState]:
    """A run's step, what its config describes, and its state then.

    Raises:
      FileNotFoundError: if the workdir has no checkpoint (of that step).
      ConfigError: if the workdir is of another config.
    """
    saved = config_lib.load(workdir)
    if saved is None:
        raise FileNotFoundError(f"no run in {workdir}: train first")
    config_lib.check_same(saved, config, workdir)
    experiment.check_encoder(config, workdir)
    pieces = experiment.build(config, **experiment.load_facts(workdir))
    restored = experiment.restore(config, pieces, workdir, step)
    if restored is None:
        raise FileNotFoundError(f"no checkpoint in {workdir}: train first")
    step, state = restored
    return step, pieces, state
