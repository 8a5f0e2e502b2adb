"""Draws samples from a run."""

from ant_jax.runtime import extras

if _error := extras.missing("training"):
    raise _error

import shutil
from pathlib import Path
from typing import Any

from absl import logging
from ml_collections import ConfigDict

from ant_jax import experiment, results, sampling
from ant_jax.runtime import logs, processes, signals
from ant_jax.runtime.files import user_path
from ant_jax.sampling import cache
from ant_jax.workdir import Step


class Stopped(Exception):
    """A signal has asked to stop, and the program saves its state first."""


def sample(config: ConfigDict, workdir: str | Path, step: Step = None, **given: Any) -> Path:
    """Draws ``config.sample.num`` samples from the EMA into an ``.npz``.

    Beside the ``.npz`` are a grid of the first samples and a JSON file that says what the samples
    were made from. The files are named by the step. A key is added to the name if samples of other
    settings, or the trainer's picture of them, already have that name. Samples that an earlier call
    drew before it was killed are not drawn again. Several processes share the drawing, and process
    0 writes the files.

    Args:
      config: of the run.
      workdir: of the run.
      step: of the checkpoint, or "best"; the newest by default.
      **given: ``model``, ``process`` and ``weighting`` that `train.train` was given.

    Returns:
      The ``.npz`` file.

    Raises:
      FileNotFoundError: if the workdir has no such checkpoint.
      ConfigError: if the workdir is of another config.
      InUseError: if another job draws the same samples.
      FloatingPointError: if samples have numbers that are not finite.
    """
    logs.show_progress()
    workdir = user_path(workdir)
    step, setup, params = results.restore_run(config, workdir, step, **given)
    made_from, num = results.run_origin(config, workdir, step, params), config.sample.num
    with cache.folder(workdir, made_from) as place:
        draw(config, place, step, setup, params)
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


def draw(
    config: ConfigDict,
    place: Path,
    step: int,
    setup: experiment.Setup,
    params: Any,
    *,
    compiled: bool = False,
) -> None:
    """Draws the samples of a step that are not drawn yet; all processes call it together.

    Args:
      config: of the run.
      place: the folder of the samples; see `cache.folder`.
      step: of the parameters.
      setup: what the config describes.
      params: of the network that draws.
      compiled: whether an earlier call has compiled the sampler.

    Raises:
      FloatingPointError: if samples have numbers that are not finite.
      Stopped: after a signal, if it does not end the program.
    """
    # The folder's name depends on the parameters and the decoder.
    processes.assert_equal(lambda: {"parameters of the run and of config.autoencoder": place.name})
    num = config.sample.num
    wait = "" if compiled else "; the sampler compiles first ..."
    logging.info("drawing %d samples of step %d%s", num, step, wait)
    apply_fn = experiment.denoiser(setup, params)
    problem = ""

    def missing(first, stop):
        nonlocal problem
        if problem or signals.asked():
            return
        try:
            drawn = experiment.draw_samples(config, setup, apply_fn, num, first, stop)
            for batch in drawn:
                yield batch
                if signals.asked():
                    return
        except FloatingPointError as error:
            problem = f"step {step}: {error}"

    batch_size = sampling.rounded_batch_size(config.sample.batch_size, num)
    cache.draw_missing(place, num, batch_size, missing)
    ended = processes.all_gather([problem, signals.asked()])
    if found := next((each for each, _ in ended if each), None):
        raise FloatingPointError(found)
    if any(asked for _, asked in ended):
        raise Stopped
