"""The parameters that a run begins with, and what a file of them does not tell.

A file of weights determines the shapes of a network, not what it computes: the same shapes may have
other attention heads, or another order of the channels of query, key and value. So a file is used
if it says what it is, as our exports do, or if what is known of the network's published weights
(see `ant_jax.models`) and ``config.init_facts`` say the rest.
"""

import functools
import json
import operator
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from absl import logging
from jax.tree_util import keystr
from ml_collections import ConfigDict

from ant_jax import config as config_lib
from ant_jax import experiment, interop, models, old_configs, optimizer
from ant_jax import workdir as workdir_lib
from ant_jax.config import ConfigError
from ant_jax.published_weights import OWN_NAMES, Names
from ant_jax.runtime import checkpoint
from ant_jax.runtime.files import user_path

# Of a safetensors file, where our exports say what they are.
_METADATA = "ant_jax"


def initial_params(config: ConfigDict, setup: experiment.Setup) -> dict | None:
    """The parameters that ``config.init_from`` names, as NumPy arrays; None for fresh ones.

    Raises:
      ConfigError: if they can't be read, don't fit the network, are not finite, or if it can't be
        known that the network they are of computes what this one does.
    """
    if not config.init_from:
        return None
    path = user_path(config.init_from)
    try:
        if path.is_dir():
            if config.init_facts:
                raise ValueError("a run says itself what it is: leave config.init_facts empty")
            return _ema_of_run(path, config, setup)
        return _of_file(path, config, setup)
    except (OSError, ValueError, checkpoint.CheckpointError) as error:
        raise ConfigError(f"config.init_from = {config.init_from!r}: {error}") from error


def export_names(model: nn.Module) -> Names:
    """What an exported file calls the parameters: as the published code does, if there is one."""
    weights = models.weights_module(type(model))
    return OWN_NAMES if weights is None else weights.names(model)


def export_metadata(config: ConfigDict) -> dict[str, str]:
    """What an exported file says of itself: the settings that decide what its parameters do."""
    return {_METADATA: json.dumps(config_lib.meaning(config))}


def _of_file(path, config, setup):
    metadata = interop.read_metadata(path).get(_METADATA)
    state = interop.read_state(path)
    template = experiment.abstract_params(setup)
    if metadata is None:
        return _of_others(state, template, config, setup)
    if config.init_facts:
        raise ValueError("the file says itself what it is: leave config.init_facts empty")
    try:
        settings = old_configs.renamed(dict(json.loads(metadata)))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError("what the file says of itself is damaged") from error
    _check_meaning(settings, config)
    return interop.from_torch(state, template, export_names(setup.model))


def _of_others(state, template, config, setup):
    model = setup.model
    weights = models.weights_module(type(model))
    if weights is None:
        raise ValueError(
            "it does not say what it is, as files of --mode export do, and nothing is known of "
            f"weights of others for config.model.name = {config.model.name!r}: a module "
            f"{type(model).__module__}_weights can say it, see ant_jax.models"
        )
    found = weights.recognise(state, template, model, setup.image_shape, _facts(config, model))
    stated = {f"model.{name}": value for name, value in found.fields.items()}
    # What shapes tell is as it is here.
    _check_meaning(config_lib.meaning(config) | stated, config)
    if found.remark:
        logging.warning("config.init_facts = %r; %s", config.init_facts, found.remark)
    _check_scale(found.latent_scale, config)
    params = interop.from_torch(state, template, found.names)
    if found.untrained:
        _check_untrained(found.untrained, params, config)
    return params


def _facts(config, model):
    """What ``config.init_facts`` says, such as {"qkv_first": "", "num_heads": "4"}."""
    parts = [part for part in config.init_facts.split(",") if part]
    facts = dict(part.partition("=")[::2] for part in parts)
    known = models.facts_of(type(model))
    said = {name + "=N" * bool(value) for name, value in facts.items()}
    if not said <= set(known) or len(facts) < len(parts):
        raise ValueError(
            f"config.init_facts = {config.init_facts!r}: of a {config.model.name} it may say "
            f"{', '.join(sorted(known)) or 'nothing'}, each once"
        )
    return facts


def _check_scale(theirs, config):
    ours = config.autoencoder.scale
    if config.autoencoder.name and theirs is not None and not abs(theirs - ours) < 1e-3 * ours:
        raise ValueError(
            f"its latents are scaled by {theirs:.5g}, those here by config.autoencoder.scale = "
            f"{ours:.5g}"
        )


def _check_meaning(theirs, config):
    ours = config_lib.meaning(config)
    other_network = theirs.get("model.name", config.model.name) != config.model.name
    # JSON has lists only.
    plain = lambda value: list(value) if isinstance(value, tuple) else value
    differing = [
        f"config.{name}: {theirs.get(name, 'not set')!r} there, {value!r} here"
        for name, value in ours.items()
        if plain(theirs.get(name)) != plain(value) and (name in theirs or not other_network)
    ]
    if differing:
        raise ValueError(
            f"its parameters mean something else: {'; '.join(differing)}; set them as there"
        )


def _check_untrained(name, params, config):
    """A row of zeros for the null class is none that was trained."""
    if not config.label_dropout:
        return
    frozen = optimizer.frozen(params, config.optimizer.frozen) if config.optimizer.frozen else {}
    if frozen and functools.reduce(operator.getitem, name.split("/"), frozen):
        raise ValueError(
            "it has no row for the null class, and config.optimizer.frozen keeps that from being "
            "learned: guidance would mix with a network that nobody trained. Leave "
            f"{name} free, or set config.label_dropout = 0"
        )
    logging.warning(
        "%s has no row for the null class: it begins as zeros and learns from the labels dropped; "
        "guidance needs that training",
        config.init_from,
    )


def _ema_of_run(workdir, wanted, setup):
    config = workdir_lib.load_config(workdir)
    if config is None:
        raise FileNotFoundError("it is a folder without a run")
    _check_meaning(config_lib.meaning(config), wanted)
    # Its own config, because a checkpoint is restored as a whole.
    theirs = experiment.build(config, **workdir_lib.load_facts(workdir))
    restored = workdir_lib.restore(config, theirs, workdir)
    if restored is None:
        raise FileNotFoundError("the run has no checkpoint yet")
    step, state = restored
    shapes = lambda tree: {
        keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree.leaves_with_path(tree)
    }
    theirs, ours = shapes(state.ema_params), shapes(experiment.abstract_params(setup))
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
    params = jax.device_get(state.ema_params)
    _check_finite(params)
    logging.info("beginning with the EMA of step %d of %s", step, workdir)
    return params


def _check_finite(params: Any) -> None:
    for path, leaf in jax.tree.leaves_with_path(params):
        if not np.isfinite(leaf).all():
            name = keystr(path, simple=True, separator="/")
            raise ValueError(f"its parameter {name} has values that are NaN or infinite")
