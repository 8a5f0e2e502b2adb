"""Builds what ``config.evaluation`` describes: a function that measures samples."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from jax.tree_util import Partial
from ml_collections import ConfigDict

from ant_jax import config as config_lib
from ant_jax import dataset, evaluation, experiment, models
from ant_jax import settings as settings_lib
from ant_jax.config import ConfigError
from ant_jax.evaluation import metrics
from ant_jax.evaluation.summary import Batch
from ant_jax.runtime.files import user_path, words_of

_VALIDATION_IMAGES = 1000


class Measuring(NamedTuple):
    """A function that measures samples, and what it was made from.

    Attributes:
      measure: From batches of samples to figures by name; see `evaluation.measure`.
      made_from: What the figures depend on besides the samples and the settings.
      best_by: Figures by which models are ranked; see `evaluation.best_by`.
    """

    measure: Callable[[Iterable[Batch]], dict[str, Any]]
    made_from: dict[str, Any]
    best_by: dict[str, float]


def check(config: ConfigDict, channels: int | None = None) -> None:
    """Checks what can be checked before a run is restored and samples are drawn.

    Args:
      config: Of the run.
      channels: Of the data, images or latents; None if they are not known yet.

    Raises:
      ConfigError: If ``config.evaluation`` names nothing to measure by, names a file that does not
        exist, an extractor that can't evaluate such images, or a metric whose outputs the extractor
        does not have.
    """
    settings = config.evaluation
    if not settings.features and (settings.samples or not settings.split):
        split = "" if settings.samples else ", or set config.evaluation.split to held-out images"
        able = "'classifier', which needs labels, or 'inception', which needs its weights"
        if config.data.name == "digits":
            able = "'digits'"
        raise ConfigError(
            f"there is nothing to measure by: set config.evaluation.features to {able}{split}"
        )
    paths = ["samples"]
    if settings.features:
        if not settings.samples and config.sample.num < 2:
            raise ConfigError(f"config.sample.num = {config.sample.num}: metrics need 2 samples")
        paths.append("reference")
    for name in paths:
        path = settings[name]
        if path and not user_path(path).is_file():
            raise ConfigError(f"config.evaluation.{name} = {path!r}: there is no such file")
    if settings.features:
        every = _metrics(settings.metrics)
        size = config.data.image_size
        if config.autoencoder.name:
            channels = 3
        try:
            extractor = _extractor(config)
            extractor.check(size, size, channels)
        except ConfigError:
            raise
        except ValueError as error:
            own = config_lib.arguments(config, "evaluation")
            ways = [f"set config.evaluation.{name}" for name in own]
            if settings.features != "classifier":
                ways.append("use 'classifier', which needs images with labels")
            if not own:
                ways.append("use 'inception', which needs config.evaluation.weights")
            ways.append("use '' and measure the loss on the images of config.evaluation.split")
            raise ConfigError(
                f"config.evaluation.features = {settings.features!r} {error}: {', or '.join(ways)}"
            ) from error
        if settings.metrics:
            _check_metrics(settings, every, extractor)
    if settings.split and not settings.samples:
        try:
            dataset.open_data(config, settings.split)
        except ConfigError as error:
            raise ConfigError(f"config.evaluation.split = {settings.split!r}: {error}") from error


def build(config: ConfigDict, names: Sequence[str] = ()) -> Measuring:
    """Builds what ``config.evaluation`` describes, the summary of the reference included.

    Args:
      config: Of the run.
      names: Of metrics; () for ``config.evaluation.metrics``. Metrics are left out if the extractor
        or the reference lacks what they need.

    Raises:
      ConfigError: If a file that the config names can't be used.
    """
    settings, batch_size = config.evaluation, config.sample.batch_size
    if config.sample.labels and not settings.samples:
        logging.warning(
            "samples of the classes config.sample.labels = %s are compared with real images of all "
            "classes",
            config.sample.labels,
        )
    every = _metrics(names or settings.metrics)
    try:
        evaluator = evaluation.build_evaluator(_extractor(config), every)
    except ConfigError:
        raise
    except (ValueError, OSError) as error:
        raise ConfigError(
            f"config.evaluation.features = {settings.features!r}: {words_of(error)}"
        ) from error
    if settings.reference:
        logging.info("reference: %s", settings.reference)
        try:
            reference = evaluation.read_reference(
                user_path(settings.reference), evaluator, batch_size
            )
        except (ValueError, OSError) as error:
            raise ConfigError(f"config.evaluation.reference: {words_of(error)}") from error
    else:
        images = _images(config, config.data.split)
        held_out = _images(config, settings.split) if settings.split else None
        try:
            reference = evaluation.data_reference(evaluator, images, held_out, batch_size)
        except ValueError as error:
            raise ConfigError(f"config.data: {error}") from error
    measure = functools.partial(evaluation.measure, evaluator=evaluator, reference=reference)
    made_from = {settings.features: evaluator.network.digest[:16]}
    return Measuring(measure, made_from, evaluation.best_by(evaluator))


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
        batch_size=config.sample.batch_size,
    )


def _extractor(config):
    training = functools.partial(_images, config, config.data.split, as_in_training=True)
    return config_lib.build(config, "evaluation", training=functools.cache(training))


def _check_metrics(settings, every, extractor):
    """Metrics that the config names must not be left out."""
    for name, metric in zip(settings.metrics, every, strict=True):
        missing = (metric.moments | metric.samples | metric.real) - extractor.shapes.keys()
        if missing:
            raise ConfigError(
                f"config.evaluation.metrics: {name!r} needs the output "
                f"{', '.join(map(repr, sorted(missing)))}, but config.evaluation.features = "
                f"{settings.features!r} has only {', '.join(map(repr, sorted(extractor.shapes)))}"
            )


def _metrics(names):
    names = names or settings_lib.names_in(metrics, evaluation.Metric)
    try:
        return [settings_lib.resolve(metrics, name, evaluation.Metric)() for name in names]
    except ValueError as error:
        raise ConfigError(f"config.evaluation.metrics {error}") from error


def _images(config, split, as_in_training=False):
    """The images of a split; unless as in training, neither mirrored nor cropped at random."""
    settings = config.data
    source = dataset.open_images(config, split)
    flip = settings.flip and as_in_training
    crop = settings.crop if as_in_training or settings.crop == "none" else "center"
    own = config_lib.arguments(config, "data")
    for name, value in own.items():
        if value and config_lib.settings_of_config(config)[f"data.{name}"].per_process:
            own[name] = str(user_path(value).absolute())
    key = {
        "name": settings.name,
        **own,
        "split": split,
        "num": len(source),
        "size": settings.image_size,
        "crop": crop,
        "flip": flip,
        # Other images may come to the same place. Some sources have no fingerprint.
        **{name: fact for name, fact in source.facts().items() if name == "fingerprint"},
    }
    pipeline = {
        "image_size": settings.image_size,
        "crop": crop,
        "flip": flip,
        "replace_unreadable": settings.replace_unreadable,
        "num_workers": settings.num_workers,
    }
    name = f"{settings.name}[{split}]" if split else settings.name
    return evaluation.Images(name, source, pipeline, key)
