"""Samples of a trained model, and how good they are."""

import json
from pathlib import Path

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from ant_jax import config as config_lib
from ant_jax import evaluation, sampling, train
from ant_jax.files import write_bytes


def sample(config: ConfigDict, workdir: Path, step: int | None = None) -> Path:
    """Draws ``config.sample.num`` samples from the EMA into an ``.npz`` and a grid beside it.

    Raises:
      FileNotFoundError: if the workdir has no checkpoint (of that step).
      ValueError: if the workdir is of another config.
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
    """Measures the distance of EMA samples to the data; prints it and writes a JSON file.

    Raises:
      FileNotFoundError: if the workdir has no checkpoint (of that step).
      ValueError: if the workdir is of another config, or names no features to measure by.
    """
    if not config.evaluation.features:
        raise ValueError("config.evaluation.features names nothing to measure the distance by")
    model = evaluation.extractor(config.evaluation.features)
    step, drawn = _draw(config, workdir, step)
    result = {"step": step, **evaluation.sample_metrics(drawn, model)}
    result["real_frechet_distance"] = evaluation.real_floor(model)["frechet_distance"]
    write_bytes(
        workdir / "evaluation" / f"{step:08d}.json", (json.dumps(result, indent=1) + "\n").encode()
    )
    for name, value in result.items():
        logging.info("%-28s %s", name, f"{value:.4f}" if isinstance(value, float) else value)
    return result


def _draw(config, workdir, step):
    saved = config_lib.load(workdir)
    if saved is None:
        raise FileNotFoundError(f"no run in {workdir}: train first")
    config_lib.check_same(saved, config, workdir)
    experiment = train.build(config)
    step, params = train.restore_ema(config, experiment, workdir, step)
    logging.info("drawing %d samples from step %d", config.sample.num, step)
    drawn = sampling.sample_batches(
        config,
        experiment.model,
        params,
        experiment.process,
        experiment.image_shape,
        config.sample.num,
    )
    return step, drawn
