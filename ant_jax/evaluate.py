"""Samples of a trained run, and how good they are."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from ant_jax import config as config_lib
from ant_jax import evaluation, experiment, sampling
from ant_jax.config import ConfigError
from ant_jax.files import write_bytes


def sample(config: ConfigDict, workdir: Path, step: int | None = None) -> Path:
    """Draws ``config.sample.num`` samples from the EMA into an ``.npz`` and a grid beside it.

    Raises:
      FileNotFoundError: if the workdir has no checkpoint (of that step).
      ConfigError: if the workdir is of another config.
    """
    step, drawn = _draw(config, workdir, step)
    batches = list(drawn)
    images = np.concatenate([images for images, _ in batches])
    labels = None if batches[0][1] is None else np.concatenate([labels for _, labels in batches])
    path = workdir / "samples" / f"{step:08d}.npz"
    sampling.save_npz(path, images, labels)
    sampling.save_png(path.with_suffix(".png"), sampling.image_grid(images[: sampling.GRID]))
    logging.info("%d samples: %s and %s", len(images), path, path.with_suffix(".png"))
    return path


def evaluate(config: ConfigDict, workdir: Path, step: int | None = None) -> dict[str, float]:
    """Measures the distance of EMA samples to the data; logs it and writes a JSON file.

    A grid of the first samples lies beside the JSON file.

    Raises:
      FileNotFoundError: if the workdir has no checkpoint (of that step).
      ConfigError: if the workdir is of another config, or names no features to measure by.
    """
    if not config.evaluation.features:
        allowed = config_lib.RULES["evaluation.features"].allowed
        raise ConfigError(f"config.evaluation.features must name what to measure by: {allowed}")
    model = evaluation.extractor(config.evaluation.features)
    step, drawn = _draw(config, workdir, step)
    path = workdir / "evaluation" / f"{step:08d}.json"
    metrics = evaluation.sample_metrics(_with_grid(drawn, path.with_suffix(".png")), model)
    floor = evaluation.real_floor(model)
    result = {"step": step, **metrics, "real_frechet_distance": floor["frechet_distance"]}
    write_bytes(path, (json.dumps(result, indent=1) + "\n").encode())
    for name, value in result.items():
        logging.info("%-28s %s", name, f"{value:.4f}" if isinstance(value, float) else value)
    logging.info("samples: %s", path.with_suffix(".png"))
    return result


def _with_grid(drawn: Iterator, path: Path) -> Iterator:
    for i, (images, labels) in enumerate(drawn):
        if i == 0:
            sampling.save_png(path, sampling.image_grid(images[: sampling.GRID]))
        yield images, labels


def _draw(config, workdir, step):
    saved = config_lib.load(workdir)
    if saved is None:
        raise FileNotFoundError(f"no run in {workdir}: train first")
    config_lib.check_same(saved, config, workdir)
    pieces = experiment.build(config, **json.loads((workdir / "data.json").read_text()))
    restored = experiment.restore(config, pieces, workdir, step)
    if restored is None:
        raise FileNotFoundError(f"no checkpoint in {workdir}: train first")
    step, state = restored
    logging.info("drawing %d samples from step %d", config.sample.num, step)
    drawn = sampling.sample_batches(
        config,
        pieces.model,
        state.ema_params,
        pieces.process,
        pieces.image_shape,
        config.sample.num,
    )
    return step, drawn
