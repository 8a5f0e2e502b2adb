"""Reads what a report shows of a run."""

import itertools
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from ant_jax import config as config_lib
from ant_jax import workdir as workdir_lib
from ant_jax.config import ConfigError
from ant_jax.runtime import checkpoint, logs
from ant_jax.tasks.clusters import levels

# Beyond these, the ends of a continuous process, there is only data or only noise.
_LOG_SNR = (-20.0, 20.0)
# Figures that do not depend on the run.
_OF_THE_REFERENCE = ("real_", "num_", "classifier_", "nfe")


class Task(NamedTuple):
    """An interval of noise levels: levels and log-SNR at its ends."""

    low: float
    high: float
    log_snr: tuple[float, float] | None


class Measured(NamedTuple):
    """Figures of one kind of samples, at the steps of checkpoints.

    Attributes:
      label: the settings that tell these samples from others of the run; "" if there are no others.
      rows: the figures by name, and "step", in the order of the steps.
      has_best: whether the best step was chosen by these figures.
    """

    label: str
    rows: list[dict[str, float]]
    has_best: bool


class Best(NamedTuple):
    """The step that ``best/`` keeps, and the figure that chose it."""

    step: int
    figure: str
    value: float


class Run(NamedTuple):
    """What a report shows of a run.

    Attributes:
      workdir: its folder.
      config: its config.
      tasks: its intervals; () if they are not known.
      logged: the content of ``metrics.jsonl``; see `logs.columns`.
      seconds: (lines,) of training until each line, as far as the log has the speed.
      measured: the results of ``--mode evaluate`` and of evaluations during training.
      best: the best step; None if none is kept.
      grids: the files of sample grids, by step.
    """

    workdir: Path
    config: ConfigDict
    tasks: tuple[Task, ...]
    logged: dict[str, np.ndarray]
    seconds: np.ndarray
    measured: list[Measured]
    best: Best | None
    grids: dict[int, Path]


def read(workdir: Path) -> Run | None:
    """Reads a run, which may still train; None if there is none.

    Raises:
      ConfigError: if its config is damaged.
    """
    known = workdir_lib.recorded(workdir)
    if known is None:
        return None
    config = config_lib.from_json(known["config"])
    path = workdir / "metrics.jsonl"
    logged = logs.columns(path) if path.exists() else {}
    best = (checkpoint.read_record(workdir / "best", run=known["id"]) or {}).get("best")
    return Run(
        workdir,
        config,
        _tasks(workdir, config, known["given"]),
        logged,
        logs.seconds(logged),
        _measured(workdir / "evaluation", best["made_from"]["settings"] if best else None),
        Best(best["step"], best["figure"], best["value"]) if best else None,
        _grids(workdir),
    )


def _tasks(workdir, config, given):
    try:
        boundaries = workdir_lib.facts_of(workdir)["boundaries"]
    except ConfigError:
        return ()
    ends = list(itertools.pairwise(boundaries))
    if "process" in given:
        return tuple(Task(low, high, None) for low, high in ends)
    try:
        config_lib.validate(config)
        process = config_lib.build_process(config)
    except ConfigError as error:
        logging.warning("%s is shown without log-SNR: %s", workdir, error)
        return tuple(Task(low, high, None) for low, high in ends)
    inside = levels(process)
    at = np.clip(np.array(boundaries), inside[0], inside[-1])
    log_snr = np.clip(np.asarray(process.log_snr(at), float), *_LOG_SNR).tolist()
    return tuple(
        Task(low, high, pair)
        for (low, high), pair in zip(ends, itertools.pairwise(log_snr), strict=True)
    )


def _measured(folder, best):
    groups = {}
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_bytes())
            row = {"step": int(content["step"])} | {
                name: value
                for name, value in content.items()
                if type(value) in (int, float)
                and name != "step"
                and not name.startswith(_OF_THE_REFERENCE)
            }
            made_from = dict(content["made_from"]["settings"])
        except (ValueError, TypeError, KeyError, OSError):
            # Also figures of a file of samples, which have no step.
            continue
        groups.setdefault(json.dumps(made_from, sort_keys=True), []).append(row)
    settings = [json.loads(each) for each in groups]
    names = sorted(set().union(*settings))
    differ = [name for name in names if len({str(each.get(name)) for each in settings}) > 1]
    return [
        Measured(
            ", ".join(f"{name}={each.get(name)}" for name in differ),
            sorted(rows, key=lambda row: row["step"]),
            each == best,
        )
        for each, rows in zip(settings, groups.values(), strict=True)
    ]


def _grids(workdir):
    """Those of the trainer; without any, those of evaluations."""
    for name in ("samples", "evaluation"):
        paths = sorted((workdir / name).glob("*.png"))
        if grids := {int(path.stem): path for path in paths if path.stem.isdecimal()}:
            return grids
    return {}
