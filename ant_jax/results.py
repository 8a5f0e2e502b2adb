"""What the modes that use a trained run share: restoring the run, and writing results."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from ant_jax import config as config_lib
from ant_jax import dataset, experiment, sampling
from ant_jax import workdir as workdir_lib
from ant_jax.runtime import progress
from ant_jax.runtime.files import write_bytes, write_new
from ant_jax.runtime.tree_hash import tree_hash
from ant_jax.sampling import cache
from ant_jax.settings import Affects
from ant_jax.workdir import Step, compatibility


def restore_run(
    config: ConfigDict,
    workdir: Path,
    step: Step = None,
    *,
    draws: bool = True,
    average: bool = True,
    **given: Any,
) -> tuple[int, experiment.Setup, dict]:
    """Restores the parameters of a run from a checkpoint.

    Args:
      config: of the run.
      workdir: of the run.
      step: of the checkpoint, or "best"; the newest by default.
      draws: whether samples will be drawn. Then the config must have the autoencoder of the run.
      average: whether to restore the moving average of the parameters.
      **given: ``model``, ``process`` and ``weighting`` that `train.train` was given.

    Returns:
      The step of the checkpoint, what the config describes, and the parameters at that step.

    Raises:
      FileNotFoundError: if the workdir has no such checkpoint.
      ConfigError: if the workdir is of another config, or was given other things.
    """
    before = workdir_lib.recorded(workdir)
    if before is None:
        raise FileNotFoundError(f"no run in {workdir}: give its --workdir, or train first")
    # The source of images is not needed: the facts hold what the setup needs of it.
    built = {name: kind for name, kind in before["given"].items() if name != "source"}
    names = workdir_lib.names_of(given)
    compatibility.check_config(before | {"given": built}, config, names, workdir)
    if draws:
        compatibility.check_encoder(config, workdir)
    setup = experiment.build(config, **workdir_lib.load_facts(workdir), **given)
    restored = workdir_lib.restore_params(config, setup, workdir, step, average=average)
    if restored is None:
        raise FileNotFoundError(f"no checkpoint in {workdir}: train first")
    step, params = restored
    return step, setup, params


def origin(config: ConfigDict, step: int, params: Any) -> dict[str, Any]:
    """What samples depend on, as values that JSON can hold. Other samples have another origin.

    Args:
      config: of the run.
      step: of the checkpoint.
      params: of the network that draws the samples.
    """
    # The digest, because the same path may hold other weights later.
    decoder = dataset.open_codec(config).digest if config.autoencoder.name else ""
    settings = config_lib.affecting(config, Affects.SAMPLES)
    if not settings["sample.labels"]:
        # Samples of an earlier version, which did not have this setting, are the same.
        del settings["sample.labels"]
    tree = {"step": step, "params": digest(params), "decoder": decoder, "settings": settings}
    return json.loads(json.dumps(tree))


def digest(params: Any) -> str:
    """A short hash of parameters, as an `origin` has it."""
    return tree_hash(params)[:16]


def run_origin(config: ConfigDict, workdir: Path, step: int, params: Any) -> dict[str, Any]:
    """The `origin` of samples that the EMA of a run draws at a step, and the run's id."""
    run = {"run": workdir_lib.run_id(workdir)}
    return run | origin(config, step, params)


def keep_first(batches: Iterator, first: list[np.ndarray]) -> Iterator:
    """Yields the batches, and appends the images that a grid shows to ``first``."""
    for images, labels in batches:
        if sum(map(len, first)) < sampling.GRID:
            first.append(images)
        yield images, labels


def save_grid(path: Path, first: list[np.ndarray]) -> None:
    """Writes the grid of the first images beside a result."""
    grid = sampling.image_grid(np.concatenate(first)[: sampling.GRID])
    sampling.save_png(path.with_suffix(".png"), grid)


def write(path: Path, content: dict[str, Any], config: ConfigDict, workdir: Path) -> Path:
    """Writes the JSON file of a result, without overwriting a result of other settings.

    A result of other parameters of the same step is overwritten: the run was interrupted later and
    has repeated the step, on a device that does not repeat every bit.

    Args:
      path: Where to write. If this file is of other settings, a key is added to the name.
      content: Of the file; ``made_from`` says what the result depends on.
      config: Of the run.
      workdir: Of the run.

    Returns:
      The path of the written file.
    """
    ours = json.loads(json.dumps(content["made_from"]))
    encoded = (json.dumps(content, indent=1) + "\n").encode()
    keyed = _keyed(path, ours)
    there = made_from(path)
    if there is not None and {**there, "params": ""} == {**ours, "params": ""}:
        write_bytes(path, encoded)
        return path
    # Samples without a JSON file, or a picture of the trainer, may have this name. The trainer may
    # still have to draw its picture.
    others = path.with_suffix(".npz").exists()
    picture = path.with_suffix(".png").exists() or _is_picture(path, workdir)
    others |= picture and not _looks_own(config, workdir)
    if not others and write_new(path, encoded):
        return path
    names = path, path.with_suffix(".npz"), path.with_suffix(".png")
    there = next((each for each in names if each.exists()), path)
    logging.info("%s is of other settings and is kept; this result is %s", there, keyed)
    write_bytes(keyed, encoded)
    return keyed


def read(path: Path, ours: dict[str, Any]) -> dict[str, Any] | None:
    """Reads the content of a result that `write` wrote, but for ``made_from``.

    Args:
      path: As `write` was given it.
      ours: What the result must depend on.

    Returns:
      The content; None if there is no such result.
    """
    for each in (path, _keyed(path, ours)):
        if made_from(each) == ours:
            return {k: v for k, v in json.loads(each.read_text()).items() if k != "made_from"}
    return None


def _keyed(path, ours):
    """The path of a result whose path a result of other settings has."""
    return path.with_stem(f"{path.stem}-{cache.key(ours)[:8]}")


def made_from(path: Path) -> dict[str, Any] | None:
    """What a result was made from; None if there is no file, or it does not say."""
    if not path.is_file():
        # Reading a pipe would block.
        return None
    try:
        return dict(json.loads(path.read_text())["made_from"])
    # A file of another program can raise almost any error.
    except Exception:
        return None


def _is_picture(path, workdir):
    """Whether the trainer draws a picture of this name."""
    saved = workdir_lib.load_config(workdir)
    return (
        saved is not None
        and path.parent.name == "samples"
        and progress.is_due(int(path.stem), saved.sample.every, saved.num_steps)
    )


def _looks_own(config, workdir):
    """Whether the trainer's pictures show the first of these samples."""
    saved = workdir_lib.load_config(workdir)
    if saved is None or saved.autoencoder.weights != config.autoencoder.weights:
        return False
    there, now = (config_lib.affecting(each, Affects.SAMPLES) for each in (saved, config))
    return all(there.get(name) == now[name] for name in now if name != "sample.num")
