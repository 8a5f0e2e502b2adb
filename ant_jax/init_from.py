"""Starts a run from the parameters of another run or of a file.

A file of weights determines the shapes of a network, but not what it computes: networks with the
same shapes may differ in the number of attention heads, or in the order of the query, key and value
channels. So a file needs metadata, which our exports have. Without them, the module of the
network's published weights (see `ant_jax.models`) and ``config.init_facts`` must supply the rest.
"""

import functools
import json
import operator
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.tree_util import keystr
from ml_collections import ConfigDict

from ant_jax import config as config_lib
from ant_jax import experiment, interop, models, optimizers
from ant_jax import workdir as workdir_lib
from ant_jax.config import ConfigError, migration
from ant_jax.published_weights import OWN_NAMES, Names
from ant_jax.runtime import checkpoint
from ant_jax.runtime.files import user_path, words_of

# The key of our metadata in a safetensors file.
_METADATA = "ant_jax"
# Of the exports for diffusers, whose weights may be other than those of the published code.
DIFFUSERS_METADATA = {_METADATA: "diffusers"}


def initial_params(config: ConfigDict, setup: experiment.Setup) -> dict | None:
    """Reads the parameters that ``config.init_from`` names, as NumPy arrays; None if it is empty.

    Raises:
      ConfigError: if they can't be read, don't fit the network or are not finite, or if their
        network computes, or may compute, something else than this one.
    """
    if not config.init_from:
        return None
    path = user_path(config.init_from)
    try:
        workdir, step = _run_at(path)
        if workdir.is_dir():
            if config.init_facts:
                raise ValueError("a run has its own config: leave config.init_facts empty")
            return _ema_of_run(workdir, step, config, setup)
        return _of_file(path, config, setup)
    except (OSError, ValueError, checkpoint.CheckpointError) as error:
        said = words_of(error)
        raise ConfigError(f"config.init_from = {config.init_from!r}: {said}") from error


def export_names(setup: experiment.Setup, settings: Mapping[str, Any]) -> Names:
    """The names of parameters in exported files: those of the published code, if there is one.

    Args:
      setup: of the run.
      settings: what `config.meaning` returns.
    """
    weights = models.weights_module(type(setup.model))
    if weights is None:
        return OWN_NAMES
    process = {
        name.removeprefix("process."): value
        for name, value in settings.items()
        if name.startswith("process.")
    }
    return weights.exported(setup.model, setup.image_shape, process)


def export_metadata(settings: Mapping[str, Any]) -> dict[str, str]:
    """The metadata of an exported file."""
    return {_METADATA: json.dumps(settings)}


def _of_file(path, config, setup):
    if not path.exists():
        raise FileNotFoundError("there is no file and no run of that name")
    metadata = interop.read_metadata(path).get(_METADATA)
    state = interop.read_state(path)
    template = experiment.abstract_params(setup)
    if metadata is None:
        return _of_others(state, template, config, setup)
    if metadata == DIFFUSERS_METADATA[_METADATA]:
        raise ValueError(
            "it was exported for diffusers: start from the .safetensors file that --mode export "
            "writes without --layout"
        )
    if config.init_facts:
        raise ValueError("the file has metadata: leave config.init_facts empty")
    try:
        names = {"model": config.model.name}
        settings = migration.of_today(dict(json.loads(metadata)), names)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError("the metadata of the file are damaged") from error
    _check_meaning(settings, config_lib.meaning(config), config)
    names = export_names(setup, settings)
    # They belong to the image size of the file, and the one here may differ.
    weights = {name: value for name, value in state.items() if name not in names.constants}
    return interop.from_torch(weights, template, names)


def _of_others(state, template, config, setup):
    model = setup.model
    weights = models.weights_module(type(model))
    if weights is None:
        raise ValueError(
            "it has no metadata, as files of --mode export have, and no published weights are "
            f"known for config.model.name = {config.model.name!r}: a module "
            f"{type(model).__module__}_weights can describe them, see ant_jax.models"
        )
    found = weights.recognise(state, template, model, setup.image_shape, _facts(config, model))
    stated = {f"model.{name}": value for name, value in found.fields.items()}
    stated |= {f"process.{name}": value for name, value in found.process.items()}
    # Settings that follow from shapes are the same here, because the shapes fit.
    ours = config_lib.meaning(config)
    _check_meaning(ours | stated, ours, config)
    if found.remark:
        logging.warning("config.init_facts = %r; %s", config.init_facts, found.remark)
    _check_scale(found.latent_scale, config)
    params = interop.from_torch(state, template, found.names)
    if found.untrained:
        _check_untrained(found.untrained, params, config)
    return params


def _facts(config, model):
    """Parses ``config.init_facts``, to a dict such as {"qkv_first": "", "num_heads": "4"}."""
    parts = [part for part in config.init_facts.split(",") if part]
    facts = dict(part.partition("=")[::2] for part in parts)
    known = models.facts_of(type(model))
    said = {name + "=N" * bool(value) for name, value in facts.items()}
    if not said <= set(known) or len(facts) < len(parts):
        raise ValueError(
            f"config.init_facts = {config.init_facts!r}: for a {config.model.name} the known facts "
            f"are {', '.join(sorted(known)) or 'none'}, each at most once"
        )
    return facts


def _check_scale(theirs, config):
    ours = config.autoencoder.scale
    if config.autoencoder.name and theirs is not None and not abs(theirs - ours) < 1e-3 * ours:
        raise ValueError(
            f"its latents are scaled by {theirs:.5g}, the latents here by "
            f"config.autoencoder.scale = {ours:.5g}"
        )


def _check_meaning(theirs, ours, config):
    other_network = theirs.get("model.name", config.model.name) != config.model.name
    # JSON has no tuples.
    plain = lambda value: list(value) if isinstance(value, tuple) else value
    differing = [
        f"config.{name}: {theirs.get(name, 'not set')!r} there, {value!r} here"
        for name, value in ours.items()
        if plain(theirs.get(name)) != plain(value) and (name in theirs or not other_network)
    ]
    if differing:
        raise ValueError(
            f"it was trained with other settings: {'; '.join(differing)}; use the same settings"
        )


def _check_untrained(name, params, config):
    """Warns that the row of the null class starts as zeros; raises an error if it is frozen."""
    if not config.label_dropout:
        return
    pattern = config.optimizer.frozen
    frozen = optimizers.matching(params, pattern) if pattern else {}
    if frozen and functools.reduce(operator.getitem, name.split("/"), frozen):
        raise ValueError(
            "it has no row for the null class, and config.optimizer.frozen keeps that from being "
            "learned: guidance would use an untrained network. Unfreeze "
            f"{name}, or set config.label_dropout = 0"
        )
    logging.warning(
        "%s has no row for the null class: it starts as zeros and learns by label dropout; "
        "guidance needs that training",
        config.init_from,
    )


def _run_at(path):
    """The workdir and the step that a path names: the newest, or the best of WORKDIR/best."""
    is_run = lambda folder: workdir_lib.load_config(folder) is not None
    if path.name == "best" and not is_run(path) and is_run(path.parent):
        return path.parent, "best"
    return path, None


def _ema_of_run(workdir, step, wanted, setup):
    config = workdir_lib.load_config(workdir)
    if config is None:
        raise FileNotFoundError("it is a folder without a run")
    _check_meaning(config_lib.meaning(config), config_lib.meaning(wanted), wanted)
    restored = workdir_lib.restore_average(workdir, step, workdir_lib.run_id(workdir))
    if restored is None:
        raise FileNotFoundError("the run has no checkpoint yet")
    step, params = restored
    shapes = lambda tree: {
        keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree.leaves_with_path(tree)
    }
    theirs, ours = shapes(params), shapes(experiment.abstract_params(setup))
    differing = [
        f"{name}: {theirs.get(name, 'none')} there, {ours.get(name, 'none')} here"
        for name in sorted(theirs.keys() | ours.keys())
        if theirs.get(name) != ours.get(name)
    ]
    if differing:
        raise ValueError(
            f"{len(differing)} of its parameters don't fit config.model: "
            + "; ".join(differing[:5])
        )
    _check_finite(params)
    logging.info("starting from the EMA of step %d of %s", step, workdir)
    return params


def _check_finite(params: Any) -> None:
    for path, leaf in jax.tree.leaves_with_path(params):
        if not np.isfinite(leaf).all():
            name = keystr(path, simple=True, separator="/")
            raise ValueError(f"its parameter {name} has values that are NaN or infinite")
