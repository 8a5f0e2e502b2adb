"""Samples of a trained run, and how good they are."""

import functools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.tree_util import Partial
from ml_collections import ConfigDict

from ant_jax import config as config_lib
from ant_jax import evaluation, experiment, models, sampling
from ant_jax import workdir as workdir_lib
from ant_jax.config import ConfigError
from ant_jax.evaluation import evaluator
from ant_jax.latents import dataset
from ant_jax.runtime import processes
from ant_jax.runtime.files import user_path, write_bytes, write_new
from ant_jax.runtime.progress import with_time_left
from ant_jax.runtime.tree_hash import tree_hash
from ant_jax.sampling import cache
from ant_jax.train_step import TrainState

_VALIDATION_IMAGES = 1000

# What samples of given parameters don't depend on. Batches say themselves how large they are.
_NO_MATTER = ("log_every", "tensorboard", "profile_steps", "checkpoint.", "evaluation.")
_NO_MATTER += ("data.num_workers", "data.dir", "sample.every", "sample.batch_size")
_NO_MATTER += ("autoencoder.latents", "autoencoder.weights", "autoencoder.batch_size")
_NO_MATTER += ("init_from", "init_facts", "num_steps")


def sample(config: ConfigDict, workdir: Path, step: int | None = None) -> Path:
    """Draws ``config.sample.num`` samples from the EMA into an ``.npz``.

    Beside it are a grid of the first ones and a JSON file that says what they were made from. Their
    name is the step; a key follows where samples of other settings, or the trainer's picture of
    them, have that name. What an earlier call has drawn before it was killed is not drawn again.
    Several processes share the drawing; the files are made by process 0.

    Returns:
      The ``.npz`` file.

    Raises:
      FileNotFoundError: if the workdir has no checkpoint (of that step).
      ConfigError: if the workdir is of another config.
      InUseError: if another job draws the same samples.
      FloatingPointError: if samples have numbers that are not finite.
    """
    step, pieces, state = restore_run(config, workdir, step)
    made_from, num = _origin(config, workdir, step, state), config.sample.num
    with cache.folder(workdir, made_from) as place:
        logging.info("drawing %d samples from step %d", num, step)
        _draw(config, place, step, pieces, state)
        plain = workdir / "samples" / f"{step:08d}.npz"
        content = {"num_samples": num, "made_from": made_from}
        place_of = lambda: _write_result(plain.with_suffix(".json"), content, config, workdir).stem
        path = plain.with_stem(processes.broadcast_from_first(place_of))
        if processes.is_first():
            first = []
            evaluation.write_samples(path, _watched(cache.read(place, num), first), num)
            _save_grid(path, first)
            shutil.rmtree(place, ignore_errors=True)
    logging.info("%d samples: %s, .png and .json", num, path)
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

    The JSON file has the figures and, as ``made_from``, what they depend on. Its name is
    the step, or that of the file of samples; a key follows where figures of something else have it.

    Several processes share the drawing; process 0 measures, and the others return None.

    Returns:
      The figures.

    Raises:
      FileNotFoundError: if the workdir has no checkpoint (of that step).
      ConfigError: if the workdir is of another config, or names nothing to measure by, or what it
        names can't be used.
      InUseError: if another job draws the same samples.
      FloatingPointError: if samples or the validation loss are not finite.
    """
    config_lib.validate(config)
    evaluator.check(config)
    if config.evaluation.samples:
        return _of_file(config, workdir) if processes.is_first() else None
    step, pieces, state = restore_run(config, workdir, step)
    made_from = _origin(config, workdir, step, state)
    if not config.evaluation.features:
        if not processes.is_first():
            return None
        figures = {"step": step} | _validation(config, step, pieces, state)
        _report(figures, _with_evaluation(made_from, config), config, workdir, [])
        return figures
    with cache.folder(workdir, made_from) as place:
        if not processes.is_first():
            _draw(config, place, step, pieces, state)
            return None
        # Before the samples: held-out images that are not there must not cost hours of drawing.
        validation = _validation(config, step, pieces, state)
        judging = evaluator.build(config)
        _draw(config, place, step, pieces, state)
        first = []
        batches = _watched(cache.read(place, config.sample.num), first)
        try:
            figures = {"step": step} | judging.measure(batches) | validation
        except ValueError as error:
            raise ConfigError(f"samples of step {step} can't be judged: {error}") from error
        made_from = _with_evaluation(made_from, config) | judging.made_from
        _report(figures, made_from, config, workdir, first)
        shutil.rmtree(place, ignore_errors=True)
    return figures


def _of_file(config, workdir):
    samples = user_path(config.evaluation.samples)
    first = []
    try:
        num = evaluation.num_samples(samples)
        judging = evaluator.build(config)
        batches = evaluation.read_samples(samples, config.sample.batch_size)
        figures = judging.measure(_watched(with_time_left(batches, num, "samples judged"), first))
    except ConfigError:
        raise
    except (ValueError, OSError) as error:
        raise ConfigError(f"config.evaluation.samples: {error}") from error
    made_from = {
        "samples": str(samples.absolute()),
        "samples_made_from": _made_from(samples.with_suffix(".json")),
        # Of the reference, where it is the training images.
        "settings": {
            name: value
            for name, value in sample_settings(config).items()
            if name.startswith("data.")
        },
    }
    made_from = _with_evaluation(made_from, config) | judging.made_from
    _report(figures, made_from, config, workdir, first)
    return figures


def _origin(config, workdir, step, state):
    run = {"run": workdir_lib.recorded(workdir)["id"]}
    return run | origin(config, step, state.ema_params)


def sample_settings(config: ConfigDict) -> dict[str, Any]:
    """The settings that samples depend on, flat."""
    return {
        name: value
        for name, value in config_lib.flatten(config).items()
        if not config_lib.is_among(name, _NO_MATTER)
    }


def origin(config: ConfigDict, step: int, params: Any) -> dict[str, Any]:
    """What samples depend on, as JSON can hold it; others have another one.

    Args:
      config: the run's.
      step: of the checkpoint.
      params: those the samples are drawn with.
    """
    # The weights may be others under the same name, or the same under another.
    decoder = dataset.open_codec(config).digest if config.autoencoder.name else ""
    tree = {"step": step, "params": tree_hash(params)[:16], "decoder": decoder}
    return json.loads(json.dumps(tree | {"settings": sample_settings(config)}))


def _validation(config, step, pieces, state):
    if not config.evaluation.split:
        return {}
    apply_fn = experiment.denoiser(pieces, state.ema_params)
    everything = np.array([0, pieces.process.span])
    (loss,) = validation_losses(config, pieces, apply_fn, everything, timesteps_each=25)
    if not np.isfinite(loss):
        raise FloatingPointError(f"step {step}: the validation loss is {loss}")
    return {"validation_loss": float(loss)}


def _with_evaluation(made_from, config):
    """What figures depend on, from what their samples do."""
    # The digest of the weights says more than their place.
    settings = {
        f"evaluation.{name}": value
        for name, value in config.evaluation.items()
        if name not in ("inception", "samples")
    }
    return made_from | {"settings": made_from["settings"] | settings}


def _report(figures, made_from, config, workdir, first):
    samples = config.evaluation.samples
    name = f"samples-{Path(samples).stem}" if samples else f"{figures['step']:08d}"
    content = figures | {"made_from": made_from}
    path = _write_result(workdir / "evaluation" / f"{name}.json", content, config, workdir)
    if first:
        _save_grid(path, first)
    for name, value in figures.items():
        logging.info("%-28s %s", name, f"{value:.4f}" if isinstance(value, float) else value)
    if "fid" in figures:
        logging.info("%s", evaluator.table(figures))
    logging.info("%s", path)


def _write_result(path, content, config, workdir):
    """Writes the JSON file of a result: at its place, or by a key where that has another's."""
    made_from = json.loads(json.dumps(content["made_from"]))
    encoded = (json.dumps(content, indent=1) + "\n").encode()
    keyed = path.with_stem(f"{path.stem}-{cache.key(made_from)[:8]}")
    if _made_from(path) == made_from:
        write_bytes(path, encoded)
        return path
    # Samples that say nothing, or a picture of the trainer's, which may still be to come.
    others = path.with_suffix(".npz").exists()
    picture = path.with_suffix(".png").exists() or _is_picture(path, workdir)
    others |= picture and not _looks_own(config, workdir)
    if not others and write_new(path, encoded):
        return path
    logging.info(
        "%s stays, for it is of other settings; this result is %s (made_from in each says of what)",
        path,
        keyed,
    )
    write_bytes(keyed, encoded)
    return keyed


def _made_from(path):
    """What a result was made from; None if there is none that says it."""
    if not path.is_file():
        # A pipe would be waited for.
        return None
    try:
        return json.loads(path.read_text())["made_from"]
    # What isn't ours surfaces as almost any type of error.
    except Exception:
        return None


def _is_picture(path, workdir):
    """Whether the trainer draws a picture of this name."""
    saved = workdir_lib.load_config(workdir)
    return (
        saved is not None
        and path.parent.name == "samples"
        and sampling.grid_is_due(int(path.stem), saved.sample.every, saved.num_steps)
    )


def _looks_own(config, workdir):
    """Whether the first samples are those of the trainer's pictures."""
    saved = workdir_lib.load_config(workdir)
    if saved is None or saved.autoencoder.weights != config.autoencoder.weights:
        return False
    there, now = sample_settings(saved), sample_settings(config)
    return all(there.get(name) == now[name] for name in now if name != "sample.num")


def validation_losses(
    config: ConfigDict,
    pieces: experiment.Experiment,
    apply_fn: Partial,
    boundaries: np.ndarray,
    timesteps_each: int,
) -> np.ndarray:
    """(k,) mean loss of each interval on held-out images; see `evaluation.interval_losses`."""
    x0, labels = dataset.images(config, config.evaluation.split, _VALIDATION_IMAGES)
    return evaluation.interval_losses(
        apply_fn,
        pieces.process,
        x0,
        jax.random.key(0),
        boundaries,
        y=labels if models.num_classes(pieces.model) else None,
        timesteps_each=timesteps_each,
    )


def _draw(config, place, step, pieces, state):
    """Draws the samples of the EMA that are not there yet."""
    # Named by the parameters and the decoder.
    processes.assert_equal(lambda: {"parameters of the run and of config.autoencoder": place.name})
    num = config.sample.num
    apply_fn = experiment.denoiser(pieces, state.ema_params)
    draw = functools.partial(experiment.draw_samples, config, pieces, apply_fn, num)
    try:
        batch_size = sampling.rounded_batch_size(config.sample.batch_size, num)
        cache.draw_missing(place, num, batch_size, draw)
    except FloatingPointError as error:
        raise FloatingPointError(f"step {step}: {error}") from error


def _watched(batches: Iterator, first: list[np.ndarray]) -> Iterator:
    """Passes batches on, and keeps the images that a grid shows."""
    for images, labels in batches:
        if sum(map(len, first)) < sampling.GRID:
            first.append(images)
        yield images, labels


def _save_grid(path, first):
    grid = sampling.image_grid(np.concatenate(first)[: sampling.GRID])
    sampling.save_png(path.with_suffix(".png"), grid)


def restore_run(
    config: ConfigDict, workdir: Path, step: int | None = None, *, draws: bool = True, **given: Any
) -> tuple[int, experiment.Experiment, TrainState]:
    """A run's step, what its config describes, and its state then.

    Args:
      config: of the run.
      workdir: of the run.
      step: of the checkpoint; the newest by default.
      draws: whether samples are to be drawn, which takes the autoencoder that the run has.
      **given: ``model``, ``process`` and ``weighting`` that `train.train` was given.

    Raises:
      FileNotFoundError: if the workdir has no checkpoint (of that step).
      ConfigError: if the workdir is of another config, or was given other things.
    """
    before = workdir_lib.recorded(workdir)
    if before is None:
        raise FileNotFoundError(f"no run in {workdir}: give its --workdir, or train first")
    # Without what it learned from: what there is to know of that are facts.
    built = {name: kind for name, kind in before["given"].items() if name != "source"}
    workdir_lib.check_run(before | {"given": built}, config, workdir_lib.names_of(given), workdir)
    if draws:
        workdir_lib.check_encoder(config, workdir)
    pieces = experiment.build(config, **workdir_lib.load_facts(workdir), **given)
    restored = workdir_lib.restore(config, pieces, workdir, step)
    if restored is None:
        raise FileNotFoundError(f"no checkpoint in {workdir}: train first")
    step, state = restored
    return step, pieces, state
