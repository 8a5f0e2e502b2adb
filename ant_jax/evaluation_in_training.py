"""Evaluations of a run while it trains."""

from ant_jax.runtime import extras

if _error := extras.missing("training"):
    raise _error

import contextlib
import functools
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from absl import logging
from ml_collections import ConfigDict

from ant_jax import evaluate, experiment, measuring, results
from ant_jax.config import ConfigError
from ant_jax.runtime import processes
from ant_jax.runtime.lock import InUseError
from ant_jax.sample import Stopped
from ant_jax.sampling import cache


class Evaluation(NamedTuple):
    """The result of an evaluation during training.

    Attributes:
      figures: by name; empty if the samples could not be evaluated.
      made_from: what the figures depend on besides the step and its parameters.
      best_by: the figure by which models are ranked, and -1 if its lowest value is the best or 1 if
        its highest is; None if there is no such figure.
    """

    figures: dict[str, Any]
    made_from: dict[str, Any]
    best_by: tuple[str, float] | None


def prepare(
    config: ConfigDict,
    setup: experiment.Setup,
    workdir: Path,
    run: str,
    given: Mapping[str, str],
) -> Callable[[int, dict], Evaluation | None]:
    """Prepares to evaluate a run while it trains.

    The extractor and the summary of the real images are loaded now, once for all evaluations.

    Args:
      config: of the run.
      setup: what the config describes.
      workdir: of the run.
      run: its id.
      given: names of the objects that replace those of the config; see `workdir.names_of`.

    Returns:
      ``(step, params) -> result``, which all processes call together. It writes the same files as
      `evaluate.evaluate`. If the figures of these parameters are there already, because the run was
      interrupted later, it reads them. It returns None after a signal that asks to stop.

    Raises:
      ConfigError: if this run can't be evaluated.
    """
    config = config.copy_and_resolve_references()
    if config.evaluation.num_in_training:
        config.sample.num = config.evaluation.num_in_training
    evaluate.check_source(config, workdir, given)
    build = functools.cache(lambda: measuring.build(config))
    if config.evaluation.features and processes.is_first():
        logging.info("preparing the evaluations during training ...")
        build()
    compiled = False

    def measure(step, params):
        nonlocal compiled
        origin = {"run": run} | results.origin(config, step, params)
        # The others have not loaded the extractor.
        in_first = processes.broadcast_from_first
        stopped, problem = False, ""
        figures = in_first(
            lambda: results.read(
                evaluate.path_of(workdir, step), evaluate.made_from(config, origin, build)
            )
        )
        if figures is None:
            try:
                figures = evaluate.measure_step(
                    config, workdir, step, setup, params, origin, build, compiled=compiled
                )
            except Stopped:
                stopped = True
            except (FloatingPointError, ConfigError) as error:
                problem = str(error)
                _forget(workdir, origin)
            except InUseError as error:
                problem = str(error)
            compiled = True

        def result():
            if stopped:
                return None
            if problem:
                logging.warning("no figures: %s", problem)
                return [{}, {}, None]
            made_from = evaluate.made_from(config, origin, build)
            others = {name: made_from[name] for name in made_from.keys() - {"step", "params"}}
            return [figures, others, _best_by(config, figures, build)]

        found = in_first(result)
        return found and Evaluation(*found)

    return measure


def _forget(workdir, origin):
    """Deletes samples that can't be measured: those of each evaluation would add up."""
    if processes.is_first():
        with contextlib.suppress(InUseError), cache.folder(workdir, origin) as place:
            shutil.rmtree(place, ignore_errors=True)


def _best_by(config, figures, build):
    signs = build().best_by if config.evaluation.features else {}
    signs = signs | {"validation_loss": -1.0}
    return next(([name, sign] for name, sign in signs.items() if name in figures), None)
