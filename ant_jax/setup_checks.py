"""Checks of a config against its data, its network and this machine; all raise a ConfigError."""

import itertools
import math
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ant_jax import mtl, optimizers
from ant_jax.config import ConfigError
from ant_jax.diffusion import Process
from ant_jax.mtl.combine import weigh


def check_labels(config: ConfigDict, num_classes: int) -> None:
    """Raises an error if ``sample.labels`` are no classes of the network, which has so many."""
    labels = config.sample.labels
    if labels and not num_classes:
        raise ConfigError(
            f"config.sample.labels = {labels} needs a network that gets labels, by "
            "config.model.conditional = True: set it to ()"
        )
    if labels and max(labels) >= num_classes:
        raise ConfigError(
            f"config.sample.labels = {labels} must be classes of the network: 0 to "
            f"{num_classes - 1}"
        )


def check_memory(
    config: ConfigDict, group: str, name: str, image_shape: tuple[int, int, int]
) -> None:
    """Raises an error if the images of a batch, as float32, need more memory than there is."""
    need = 4 * config[group][name] * math.prod(image_shape)
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if need > there:
        raise ConfigError(
            f"config.{group}.{name} = {config[group][name]} images of "
            f"{'x'.join(map(str, image_shape))} take {need >> 30} GiB, more than the "
            f"{there >> 30} GiB of this machine"
        )


def check_pattern(config: ConfigDict, name: str, params: Any) -> None:
    """Raises an error if a pattern of ``config.optimizer`` matches none of the parameters.

    One that freezes all of them is an error too.
    """
    pattern = config.optimizer[name]
    names = jax.tree.leaves(optimizers.matching(params, pattern))
    if not any(names) or (all(names) and name == "frozen"):
        raise ConfigError(
            f"config.optimizer.{name} = {pattern!r} matches {'all' if any(names) else 'none'} of "
            "the parameters; with --verbosity=1 the log of a run begins with a table of their names"
        )


def check_boundaries(config: ConfigDict, boundaries: Sequence[float], process: Process) -> None:
    """Raises an error if the boundaries of a run are not those of the config's tasks."""
    k, last = config.clusters.k, process.span
    one = config.clusters.specialist >= 0
    if (
        len(boundaries) != (2 if one else k + 1)
        or any(low >= high for low, high in itertools.pairwise(boundaries))
        or not (boundaries[0] >= 0 and boundaries[-1] <= last)
        or not (one or boundaries[-1] - boundaries[0] == last)
    ):
        raise ConfigError(
            f"the boundaries {list(boundaries)} of facts.json are not those of "
            f"{'one of ' if one else ''}config.clusters.k = {k} tasks of the {last} noise levels "
            "of config.process"
        )


def check_weigh(weighting: mtl.Weighting, what: str) -> None:
    """Raises an error if a user's method returns something wrong, before the wrappers use it."""
    k = weighting.k
    stats = mtl.TaskStats(jnp.ones(k), jnp.eye(k), jnp.ones(k))
    try:
        jax.eval_shape(lambda: weigh(weighting, stats, weighting.init()))
    except mtl.WeighError as error:
        raise ConfigError(f"{what}: {error}") from error
