"""The parameters that a run begins with, and what a file of them does not tell.

A file of weights determines the shapes of a network, not what it computes: the same shapes may have
other attention heads, or another order of the channels of query, key and value. So a file is used
if it says what it is, as our exports do, if its network is a DiT of a published size, or if
``config.init_facts`` says what the file does not.
"""

import json
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.tree_util import keystr
from ml_collections import ConfigDict

from ant_jax import builders, experiment, interop
from ant_jax import config as config_lib
from ant_jax import workdir as workdir_lib
from ant_jax.config import ConfigError
from ant_jax.models import dit
from ant_jax.runtime import checkpoint
from ant_jax.runtime.files import user_path

# Of a safetensors file, where our exports say what they are.
_METADATA = "ant_jax"
# The network whose weights diffusers has taken over from the paper's authors.
_CONVERTED = "XL"


def initial_params(config: ConfigDict, pieces: experiment.Experiment) -> dict | None:
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
            return _ema_of_run(path, config, pieces)
        return _of_file(path, config, pieces)
    except (OSError, ValueError, checkpoint.CheckpointError) as error:
        raise ConfigError(f"config.init_from = {config.init_from!r}: {error}") from error


def export_names(config: ConfigDict) -> interop.Names:
    """What others call the parameters of the network that a config names."""
    settings = config.model
    if settings.name == "dit":
        return interop.dit_names(settings.patch)
    return interop.unet_names("heads_first")


def export_metadata(config: ConfigDict) -> dict[str, str]:
    """What an exported file says of itself: the settings that decide what its parameters do."""
    settings = config_lib.flatten(config)
    meaning = {name: settings[name] for name in builders.meaning_of_params(config)}
    return {_METADATA: json.dumps(meaning)}


def _of_file(path, config, pieces):
    metadata = interop.read_metadata(path).get(_METADATA)
    state = interop.read_state(path)
    template = experiment.abstract_params(pieces)
    if metadata is not None:
        if config.init_facts:
            raise ValueError("the file says itself what it is: leave config.init_facts empty")
        try:
            settings = dict(json.loads(metadata))
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError("what the file says of itself is damaged") from error
        _check_meaning(settings, config)
        return interop.from_torch(state, template, export_names(config))
    facts = _facts(config)
    read = _dit if config.model.name == "dit" else _unet
    params = read(state, template, facts, config, pieces)
    _check_null_row(params, config)
    return params


def _facts(config):
    """What ``config.init_facts`` says, such as {"qkv_first": "", "num_heads": "4"}."""
    parts = [part for part in config.init_facts.split(",") if part]
    facts = dict(part.partition("=")[::2] for part in parts)
    known = config_lib.INIT_FACTS[config.model.name]
    if not facts.keys() <= {fact.removesuffix("=N") for fact in known} or len(facts) < len(parts):
        raise ValueError(
            f"config.init_facts = {config.init_facts!r}: of a {config.model.name} it may say "
            f"{', '.join(sorted(known))}, each once"
        )
    return facts


def _dit(state, template, facts, config, pieces):
    settings = config.model
    rows, columns = (side // settings.patch for side in pieces.image_shape[:2])
    positions = dit.positions(rows, columns, settings.width)
    tables = [table for name, table in state.items() if name.endswith("embedding_table.weight")]
    classes = pieces.model.num_classes
    without_null = bool(classes) and {table.shape[:1] for table in tables} == {(classes,)}
    if "no_null_row" in facts and not without_null:
        raise ValueError(
            "no_null_row in config.init_facts is of a label table with as many rows as classes"
        )
    if without_null and "no_null_row" not in facts:
        raise ValueError(
            f"its label table has {classes} rows, one less than classes and null class here: if it "
            f"is of these {classes} classes and none were dropped in its training, say so by "
            "no_null_row in config.init_facts"
        )
    names = interop.dit_names(settings.patch, positions, "no_null_row" not in facts)
    params = interop.from_torch(state, template, names)
    of_diffusers = interop.names_of_diffusers(state)
    # Diffusers leaves it out of its files.
    if not (of_diffusers or interop.has_positions(state) or "no_pos_embed" in facts):
        raise ValueError(
            "it has no pos_embed, which files of the paper's code have: if its network has the "
            "same sines and cosines, say so by no_pos_embed in config.init_facts"
        )
    sizes = {(size["width"], size["depth"]): name for name, size in dit.SIZES.items()}
    size = sizes.get((settings.width, settings.depth))
    if of_diffusers and size != _CONVERTED:
        raise ValueError(
            "diffusers' own DiT encodes timesteps otherwise than the paper's code and this one do; "
            f"known to be converted from that code is DiT-{_CONVERTED} alone"
        )
    if "heads" in facts:
        heads = int(facts["heads"])
    elif size:
        heads = dit.SIZES[size]["heads"]
    else:
        raise ValueError(
            "a file does not tell the attention heads of a DiT, and this one is of no published "
            "size: say them by config.init_facts = 'heads=N'"
        )
    _check_meaning(_with_given(config, {"model.heads": heads}), config)
    return params


def _unet(state, template, facts, config, pieces):
    orders = [name for name in interop.ORDERS if name in facts]
    heads = {name: int(facts[name]) for name in ("num_heads", "head_channels") if name in facts}
    # First whether it fits at all, then what it is.
    first = interop.from_torch(state, template, interop.unet_names("heads_first"))
    published = interop.published_unet(template)
    hint = published and "; {}, of this size, is said to be {!r}".format(*published)
    if len(orders) != 1 or len(heads) != 1:
        raise ValueError(
            "a file does not tell how the attention of a UNet is laid out: say it by "
            "config.init_facts = 'ORDER,HEADS' with ORDER heads_first or, if it was trained with "
            "use_new_attention_order, qkv_first, and HEADS num_heads=N or head_channels=N"
            + (hint or "")
        )
    stated = {"model.num_heads": 0, "model.head_channels": 0}
    stated |= {f"model.{name}": number for name, number in heads.items()}
    _check_meaning(_with_given(config, stated), config)
    _check_last_row(state, facts, pieces.model.num_classes)
    if published and not set(published[1].split(",")) <= set(config.init_facts.split(",")):
        logging.warning("config.init_facts = %r%s", config.init_facts, hint)
    # LDM stores it where it scales latents by their own standard deviation.
    scale = state.get("scale_factor")
    if config.autoencoder.name and scale is not None and scale.size == 1:
        theirs, ours = scale.item(), config.autoencoder.scale
        if not abs(theirs - ours) < 1e-3 * ours:
            raise ValueError(
                f"its latents are scaled by {theirs:.5g}, those here by config.autoencoder.scale = "
                f"{ours:.5g}"
            )
    if orders == ["heads_first"]:
        return first
    return interop.from_torch(state, template, interop.unet_names("qkv_first", **heads))


def _check_last_row(state, facts, classes):
    """The papers' code of UNets has no null class, but with one class more it can be given one."""
    # The second is the name in LDM's moving average.
    names = ("label_emb.weight", "label_embweight")
    rows = {table.shape[:1] for name, table in state.items() if name.endswith(names)}
    longer = bool(classes) and rows == {(classes + 1,)}
    if longer and "null_row" not in facts:
        raise ValueError(
            f"its label table has {classes + 1} rows, one more than classes here: if the last is "
            "that of a null class, say so by null_row in config.init_facts"
        )
    if "null_row" in facts and not longer:
        raise ValueError(
            "null_row in config.init_facts is of a label table with one row more than classes"
        )


def _with_given(config, given):
    """The settings that decide what parameters do: those given, and the others as they are here."""
    settings = config_lib.flatten(config)
    return {name: settings[name] for name in builders.meaning_of_params(config)} | given


def _check_meaning(theirs, config):
    ours = config_lib.flatten(config)
    # JSON has lists only.
    plain = lambda value: list(value) if isinstance(value, tuple) else value
    differing = [
        f"config.{name}: {theirs.get(name, 'not set')!r} there, {ours[name]!r} here"
        for name in builders.meaning_of_params(config)
        if plain(theirs.get(name)) != plain(ours[name])
    ]
    if differing:
        raise ValueError(
            f"its parameters mean something else: {'; '.join(differing)}; set them as there"
        )


def _check_null_row(params, config):
    """A row of zeros for the null class is none that was trained."""
    if "label_embedding" not in params or params["label_embedding"]["embedding"][-1].any():
        return
    if not config.label_dropout:
        return
    if (
        config.optimizer.frozen
        and builders.frozen(params, config.optimizer.frozen)["label_embedding"]["embedding"]
    ):
        raise ValueError(
            "it has no row for the null class, and config.optimizer.frozen keeps that from being "
            "learned: guidance would mix with a network that nobody trained. Leave "
            "label_embedding free, or set config.label_dropout = 0"
        )
    logging.warning(
        "%s has no row for the null class: it begins as zeros and learns from the labels dropped; "
        "guidance needs that training",
        config.init_from,
    )


def _ema_of_run(workdir, wanted, pieces):
    config = workdir_lib.load_config(workdir)
    if config is None:
        raise FileNotFoundError("it is a folder without a run")
    _check_meaning(config_lib.flatten(config), wanted)
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
    theirs, ours = shapes(state.ema_params), shapes(experiment.abstract_params(pieces))
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
