"""Samples of a trained run, and how good they are."""

import json
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from absl import logging
from jax.tree_util import Partial
from ml_collections import ConfigDict

from ant_jax import config as config_lib
from ant_jax import evaluation, experiment, sampling
from ant_jax.config import ConfigError
from ant_jax.files import write_bytes
from ant_jax.train_step import TrainState

_VALIDATION_IMAGES = 1000


def sample(config: ConfigDict, workdir: Path, step: int | None = None) -> Path:
    """Draws ``config.sample.num`` samples from the EMA into an ``.npz`` and a grid beside it.

    Raises:
      FileNotFoundError: if the workdir has no checkpoint (of that step).
      ConfigError: if the workdir is of another config.
    """
    step, pieces, state = restore_run(config, workdir, step)
    logging.info("drawing %d samples from step %d", config.sample.num, step)
    apply_fn = experiment.denoiser(pieces, state.ema_params)
    batches = list(sampling.sample_batches(config, pieces, apply_fn, config.sample.num))
    images = np.concatenate([images for images, _ in batches])
    labels = None if batches[0][1] is None else np.concatenate([labels for _, labels in batches])
    path = workdir / "samples" / f"{step:08d}.npz"
    sampling.save_npz(path, images, labels)
    sampling.save_png(path.with_suffix(".png"), sampling.image_grid(images[: sampling.GRID]))
    logging.info("%d samples: %s and %s", len(images), path, path.with_suffix(".png"))
    return path


def evaluate(config: ConfigDict, workdir: Path, step: int | None = None) -> dict[str, float]:
    """Measures the EMA model; logs what it finds and writes a JSON file.

    By ``config.evaluation.features`` it measures samples against the data, and leaves a grid of the
    first ones beside the JSON file; by ``config.evaluation.split`` it measures the loss on held-out
    images, without loss weights: ``validation_loss``, the mean over the same timesteps and noise
    whatever the clusters.

    Raises:
      FileNotFoundError: if the workdir has no checkpoint (of that step).
      ConfigError: if the workdir is of another config, or names nothing to measure by.
    """
    settings = config.evaluation
    if not settings.features and not settings.split:
        allowed = config_lib.RULES["evaluation.features"].allowed
        raise ConfigError(
            f"config.evaluation.features must name what to measure by, {allowed}, or "
            "config.evaluation.split held-out images"
        )
    step, pieces, state = restore_run(config, workdir, step)
    apply_fn = experiment.denoiser(pieces, state.ema_params)
    path = workdir / "evaluation" / f"{step:08d}.json"
    result = {"step": step}
    if settings.features:
        model = evaluation.extractor(settings.features)
        drawn = sampling.sample_batches(config, pieces, apply_fn, config.sample.num)
        result |= evaluation.sample_metrics(_with_grid(drawn, path.with_suffix(".png")), model)
        result |= {f"real_{name}": value for name, value in evaluation.real_floor(model).items()}
        logging.info("samples: %s", path.with_suffix(".png"))
    if settings.split:
        everything = np.array([0, pieces.process.num_timesteps])
        (loss,) = validation_losses(config, pieces, apply_fn, everything, timesteps_each=25)
        result["validation_loss"] = float(loss)
    write_bytes(path, (json.dumps(result, indent=1) + "\n").encode())
    for name, value in result.items():
        logging.info("%-28s %s", name, f"{value:.4f}" if isinstance(value, float) else value)
    return result


def validation_losses(
    config: ConfigDict,
    pieces: experiment.Experiment,
    apply_fn: Partial,
    boundaries: np.ndarray,
    timesteps_each: int,
) -> np.ndarray:
    """(k,) mean loss of each interval on held-out images; see `evaluation.interval_losses`."""
    x0, labels = experiment.images(config, config.evaluation.split, _VALIDATION_IMAGES)
    return evaluation.interval_losses(
        apply_fn,
        pieces.process,
        x0,
        jax.random.key(0),
        boundaries,
        y=labels if pieces.model.num_classes else None,
        timesteps_each=timesteps_each,
    )


def _with_grid(drawn: Iterator, path: Path) -> Iterator:
    for i, (images, labels) in enumerate(drawn):
        if i == 0:
            sampling.save_png(path, sampling.image_grid(images[: sampling.GRID]))
        yield images, labels


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
    pieces = experiment.build(config, **experiment.load_facts(workdir))
    restored = experiment.restore(config, pieces, workdir, step)
    if restored is None:
        raise FileNotFoundError(f"no checkpoint in {workdir}: train first")
    step, state = restored
    return step, pieces, state
