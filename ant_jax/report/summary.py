"""The content of a report, as values of JSON: thinned curves and small pictures."""

import base64
import functools
import io
import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from PIL import Image

from ant_jax import config as config_lib
from ant_jax.report.runs import Run

_POINTS = 1000  # of a curve, at most
_NUMBERS = 240_000  # in all curves: about 1.6 MB
_PICTURES = 1_050_000  # bytes of all pictures, before base64
_CURVES = ("loss", "grad_norm", "conflict", "cluster_losses", "weights", "cosines")
_ALWAYS = ("method.name", "clusters.name", "clusters.k")
# How many grids of a run and how many pixels wide: the first that fits.
_SIZES = ((16, 640), (8, 512), (6, 400), (4, 320), (3, 240), (2, 200), (1, 160))
_SOURCE = "data:image/webp;base64,"


def summarize(runs: Sequence[Run]) -> dict[str, Any]:
    """The content of the report of these runs."""
    names = _names([run.workdir for run in runs])
    points = min(_POINTS, max(20, _NUMBERS // sum(_width(run.logged) for run in runs)))
    content = [
        {
            "name": name,
            "workdir": str(run.workdir.absolute()),
            "num_steps": run.config.num_steps,
            "tasks": [
                {"low": task.low, "high": task.high, "log_snr": task.log_snr} for task in run.tasks
            ],
            "curves": _curves(run, points),
            "measured": [_figures(run, each) for each in run.measured],
            "best": run.best and run.best._asdict(),
            "samples": samples,
        }
        for name, run, samples in zip(names, runs, _pictures(runs), strict=True)
    ]
    return {"runs": content, "settings": _settings(runs)}


def _names(workdirs):
    """The paths from the folder that all have in common."""
    paths = [str(workdir.absolute()) for workdir in workdirs]
    if len(paths) == 1:
        return [Path(paths[0]).name]
    return [os.path.relpath(path, os.path.commonpath(paths)) for path in paths]


def _width(logged):
    """How many numbers a point of all curves of a run has."""
    return 5 + sum(math.prod(logged[name].shape[1:]) for name in _CURVES if name in logged)


def _curves(run, points):
    """Each point is the mean of equally many logged lines, at the step of the last one."""
    logged = run.logged
    lines = len(logged.get("step", ()))
    edges = np.unique(np.linspace(0, lines, min(lines, points) + 1).round().astype(int))
    starts, ends = edges[:-1], edges[1:] - 1
    if not len(starts):
        return {"step": [], "per_point": 0}
    curves = {
        "step": logged["step"][ends].tolist(),
        "seconds": _numbers(run.seconds[ends]),
        "per_point": -(-lines // len(starts)),
    }
    for name in _CURVES:
        if name in logged and logged[name].shape[1:] != (0,):
            curves[name] = _numbers(_means(logged[name], starts, edges[1:]).T)
    if curves["per_point"] > 1:
        curves["loss_low"] = _numbers(np.fmin.reduceat(logged["loss"], starts))
        curves["loss_high"] = _numbers(np.fmax.reduceat(logged["loss"], starts))
    return curves


def _means(values, starts, ends):
    with warnings.catch_warnings():
        # A mean of nothing but NaN is NaN, which is right.
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.array([np.nanmean(values[a:b], 0) for a, b in zip(starts, ends, strict=True)])


def _numbers(values):
    """Nested lists with four digits, and None for what is not finite, which JSON does not have."""
    if np.ndim(values):
        return [_numbers(value) for value in values]
    return float(f"{values:.4g}") if np.isfinite(values) else None


def _figures(run, measured):
    steps = [row["step"] for row in measured.rows]
    names = dict.fromkeys(name for row in measured.rows for name in row if name != "step")
    logged = run.logged.get("step", np.zeros(0))
    known = np.isfinite(run.seconds)
    at = np.full(len(steps), np.nan)
    if known.any():
        at = np.interp(steps, logged[known], run.seconds[known])
    return {
        "label": measured.label,
        "has_best": measured.has_best,
        "step": steps,
        "seconds": _numbers(at),
        "figures": {
            name: _numbers(np.array([row.get(name, np.nan) for row in measured.rows], float))
            for name in names
        },
    }


def _settings(runs):
    """The method, the clusters and the settings that differ; of a single run, from the defaults."""
    flat = [config_lib.flatten(run.config) for run in runs]
    others = flat[1:] or [_defaults(runs[0].config)]
    names = [
        name
        for name in dict.fromkeys([*_ALWAYS, *(name for each in flat for name in each)])
        if name in _ALWAYS or len({str(each.get(name)) for each in [flat[0], *others]}) > 1
    ]
    text = lambda value: f"{value:.6g}" if isinstance(value, float) else str(value)
    return [
        {"name": name, "values": [text(each[name]) if name in each else None for each in flat]}
        for name in names
    ]


def _defaults(config):
    groups = {group.name: group.key for group in config_lib.GROUPS if group.folder}
    named = {name: config[name][key] for name, key in groups.items() if name in config}
    try:
        flat = config_lib.flatten(config_lib.default_config(**named))
    except config_lib.ConfigError as error:
        logging.warning("all settings are shown, because defaults are unknown: %s", error)
        return {}
    usual = {group.name: group.default for group in config_lib.GROUPS if group.folder}
    return flat | {f"{name}.{key}": usual[name] for name, key in groups.items()}


def _pictures(runs):
    """The grids of each run, ``{"step", "source"}``, in one size for all runs."""
    opened = functools.cache(_opened)
    chosen = lambda count: [_spread(sorted(run.grids), count) for run in runs]

    def fits(count, width):
        # All grids of a run have about the size of the last one.
        sizes = [
            len(steps) * len(_encoded(opened(run.grids[steps[-1]]), width))
            for run, steps in zip(runs, chosen(count), strict=True)
            if steps
        ]
        return sum(sizes) <= _PICTURES

    count, width = next((size for size in _SIZES if fits(*size)), _SIZES[-1])
    return [
        [
            {"step": step, "source": _SOURCE + base64.b64encode(picture).decode()}
            for step in steps
            if (picture := _encoded(opened(run.grids[step]), width))
        ]
        for run, steps in zip(runs, chosen(count), strict=True)
    ]


def _spread(steps, count):
    """At most so many of the steps, evenly, with the first and the last."""
    if len(steps) <= count:
        return steps
    return [steps[i] for i in np.linspace(len(steps) - 1, 0, count).round().astype(int)[::-1]]


def _opened(path):
    """A picture, not larger than needed; None if it can't be read."""
    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except OSError as error:
        logging.warning("left out: %s", error)
        return None
    return _shrunk(image, _SIZES[0][1])


def _shrunk(image, width):
    if image.width <= width:
        return image
    height = round(image.height * width / image.width)
    return image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3)


def _encoded(image, width):
    """A picture as WebP, lossless where that is smaller; b"" if there is none."""
    if image is None:
        return b""
    encoded = []
    for options in ({"quality": 75}, {"lossless": True, "quality": 20}):
        stream = io.BytesIO()
        _shrunk(image, width).save(stream, format="webp", method=1, **options)
        encoded.append(stream.getvalue())
    return min(encoded, key=len)
