"""Sizes of the experiments: the data, the model, the number of steps and seeds."""

from collections.abc import Callable
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from ant_jax.config import update
from configs import digits, fashion, imagenet64


class Preset(NamedTuple):
    """The size of an experiment.

    Attributes:
      name: name of its output folder.
      config: the ``get_config`` of a config file, called with ``"METHOD,CLUSTERS"``.
      settings: changes of this config, by ``"group.name"``.
      methods: the multi-task methods to compare.
      seeds: the seeds of every setting.
      measurements: number of evenly spaced steps at which a run is measured.
      affinity_grid: number of timesteps between which the task affinity is measured.
      affinity_images: number of training images for the task affinity.
      seconds_per_step: on two CPU cores, including all measurements, to estimate a plan's time;
        None if not timed.
    """

    name: str
    config: Callable[[str], ConfigDict]
    settings: dict[str, Any]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    measurements: int
    affinity_grid: int
    affinity_images: int
    seconds_per_step: float | None


METHODS = ("linear", "uncertainty", "pcgrad", "nash")
_ALWAYS = {"log_to": (), "sample.every": 0}

# Other metrics take longer on 60 000 images, and no table shows them.
_FASHION = {"evaluation.metrics": ("frechet", "label_accuracy")}

PRESETS = {
    "smoke": Preset(
        "smoke",
        digits.get_config,
        {
            "num_steps": 8,
            "clusters.k": 2,
            "data.batch_size": 32,
            "process.timesteps": 40,
            "model.width": 8,
            "model.depth": 1,
            "model.heads": 1,
            "optimizer.warmup_steps": 2,
            "log_every": 2,
            "sampler.num_steps": 4,
            "sample.num": 100,
            "sample.batch_size": 100,
        },
        ("nash",),
        (0,),
        2,
        12,
        32,
        0.5,
    ),
    "digits": Preset(
        "digits",
        digits.get_config,
        {"num_steps": 2000, "log_every": 50, "sampler.num_steps": 25},
        METHODS,
        (0, 1, 2),
        4,
        100,
        240,
        0.02,
    ),
    "imagenet64": Preset(
        "imagenet64",
        imagenet64.get_config,
        {"log_every": 500},
        METHODS,
        (0, 1, 2),
        8,
        100,
        240,
        None,
    ),
    "fashion": Preset(
        "fashion",
        lambda argument: fashion.get_config(f"{argument},14"),
        {"log_every": 50, "sampler.num_steps": 25} | _FASHION,
        METHODS,
        (0, 1, 2),
        4,
        100,
        240,
        0.075,
    ),
    "fashion32": Preset(
        "fashion32",
        lambda argument: fashion.get_config(f"{argument},32"),
        {"num_steps": 20_000} | _FASHION,
        METHODS,
        (0, 1, 2),
        4,
        100,
        240,
        None,
    ),
}


def make_config(
    preset: Preset, method: str, clusters: str, seed: int, settings: dict[str, Any] | None = None
) -> ConfigDict:
    """The config of one run; ``settings`` override those of the preset."""
    config = preset.config(f"{method},{clusters}")
    update(config, _ALWAYS | preset.settings | {"seed": seed} | (settings or {}))
    return config
