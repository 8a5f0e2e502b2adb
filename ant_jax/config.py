"""What a config may hold, checked before anything is compiled.

`configs/digits.py` documents every option; this module knows the allowed values, so that a typo or
an impossible setting is one clear error.
"""

import difflib
import os
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from ant_jax.diffusion import spaced_timesteps
from ant_jax.latents import autoencoder
from ant_jax.models.attention import ATTENTION
from ant_jax.models.remat import REMAT
from ant_jax.mtl.backward import FORMS
from ant_jax.runtime.files import user_path
from ant_jax.tasks import clustering, clusters


class ConfigError(ValueError):
    """A setting that can't be, or doesn't fit the data, the devices or the workdir."""


class Rule(NamedTuple):
    """What a setting must be: its types, a test and the words for it."""

    kinds: tuple[type, ...]
    holds: Callable[[Any], bool]
    allowed: str


# Counters of steps and samples are 32 bits wide on the devices, and so are floating-point numbers.
_LARGEST_COUNT = 2**31 - 1
_LARGEST, _SMALLEST = 3.4e38, 1.2e-38


def _one_of(*values):
    return Rule((str,), lambda value: value in values, "one of " + ", ".join(map(repr, values)))


def _integer(low, high=None):
    words = f"an integer >= {low}" + ("" if high is None else f" and <= {high}")
    return Rule((int,), lambda value: value >= low and (high is None or value <= high), words)


def _number(low, high=_LARGEST, *, above=False):
    words = f"a number {'>' if above else '>='} {low:g}"
    if high < _LARGEST:
        words += f" and <= {high:g}"
    least = low + _SMALLEST if above else low
    return Rule((int, float), lambda value: least <= value <= high, words)


def _multiples(high):
    return Rule(
        (tuple,),
        lambda values: (
            bool(values)
            and all(type(value) in (int, float) and 0 < value <= high for value in values)
        ),
        f"numbers > 0 and <= {high} as '(1, 2)'",
    )


def _is_pattern(text):
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def _is_path(text):
    try:
        user_path(text)
    except OSError:
        return False
    return "\0" not in text


_BOOL = Rule((bool,), lambda value: True, "True or False")
_TEXT = Rule((str,), lambda value: True, "a string")
_PATH = Rule((str,), _is_path, "a path, in which ~ is a home that there is")


def _are_weights(text):
    try:
        weights = [float(part) for part in text.split(",")] if text else [1.0]
    except ValueError:
        return False
    return all(0 <= weight <= _LARGEST for weight in weights) and max(weights) >= _SMALLEST


# Which of them a network knows is its own affair; see `ant_jax.models`.
_INIT_FACT = re.compile("[a-z_]+(=[1-9][0-9]{0,5})?")

RULES = {
    # PCGrad adds 2**30 to it, on the device in 32 bits.
    "seed": _integer(0, 2**30 - 1),
    "num_steps": _integer(1, _LARGEST_COUNT),
    "data.name": Rule(
        (str,),
        lambda name: ":" in name or name in ("digits", "folder"),
        "digits, folder, tfds:BUILDER, or your own 'package.module:function'",
    ),
    "data.split": _TEXT,
    "data.dir": _PATH,
    "data.image_size": _integer(1),
    "data.crop": _one_of("none", "center", "random"),
    "data.exif": _one_of("ignore", "apply"),
    "data.flip": _BOOL,
    "data.replace_unreadable": _BOOL,
    "data.batch_size": _integer(1),
    "data.num_workers": _integer(0, 1024),
    "diffusion.timesteps": _integer(1, clustering.MAX_TIMESTEPS),
    "diffusion.schedule": _one_of("cosine", "linear", "ldm"),
    "diffusion.variance": _one_of("fixed_small", "fixed_large", "learned_range"),
    "diffusion.prediction": _one_of("epsilon", "v"),
    "diffusion.loss_weight": _one_of("none", "p2", "min_snr"),
    "diffusion.p2_k": _number(0, above=True),
    "diffusion.p2_gamma": _number(0),
    "diffusion.min_snr_gamma": _number(0, above=True),
    "diffusion.clip_x0": _BOOL,
    "model.name": Rule(
        (str,),
        lambda name: ":" in name or name in ("dit", "unet"),
        "dit, unet, or your own 'package.module:Class'",
    ),
    "model.width": _integer(4, 2**16),
    "model.depth": _integer(1, 1024),
    "model.heads": _integer(1),
    "model.patch": Rule((int,), lambda value: value in (1, 2, 4, 8), "one of 1, 2, 4, 8"),
    "model.channel_mult": _multiples(64),
    "model.num_res_blocks": _integer(1, 64),
    "model.attention_factors": Rule(
        (tuple,),
        lambda factors: all(type(factor) is int and factor >= 1 for factor in factors),
        "integers >= 1 as '(2, 4)'",
    ),
    "model.head_channels": _integer(0),
    "model.num_heads": _integer(0),
    "model.scale_shift_norm": _BOOL,
    "model.resblock_updown": _BOOL,
    "model.conditional": _BOOL,
    "model.dtype": _one_of("float32", "bfloat16"),
    "model.remat": _one_of(*REMAT),
    "model.attention": _one_of(*ATTENTION),
    "autoencoder.name": _one_of("", *autoencoder.VARIANTS),
    "autoencoder.weights": _PATH,
    "autoencoder.latents": _PATH,
    "autoencoder.scale": _number(0, above=True),
    "autoencoder.batch_size": Rule(
        (int,),
        lambda value: 1 <= value <= 1024 and value.bit_count() == 1,
        "a power of 2 of at most 1024",
    ),
    "init_from": _PATH,
    "init_facts": Rule(
        (str,),
        lambda text: not text or all(map(_INIT_FACT.fullmatch, text.split(","))),
        "'' or facts such as 'heads_first,num_heads=4', joined by commas",
    ),
    "clusters.k": _integer(1),
    "clusters.cost": _one_of("snr", "timestep", "gradient", "random"),
    "clusters.affinity": _PATH,
    "clusters.only": _integer(-1),
    "method.name": _one_of("vanilla", "linear", "uncertainty", "pcgrad", "nash"),
    "method.linear_weights": Rule(
        (str,), _are_weights, "'' or k numbers >= 0 as '0.3,0.7', not all 0"
    ),
    "method.uncertainty_learning_rate": _number(0, above=True),
    "method.nash_update_every": _integer(1, _LARGEST_COUNT),
    "method.nash_max_norm": _number(0, above=True),
    "method.share_weighted": _BOOL,
    "method.cosines": _BOOL,
    "method.timesteps": _one_of(*clusters.DRAWS),
    "method.gradient_form": _one_of(*FORMS),
    "optimizer.learning_rate": _number(0, above=True),
    "optimizer.warmup_steps": _integer(0, _LARGEST_COUNT),
    "optimizer.schedule": _one_of("constant", "cosine"),
    "optimizer.weight_decay": _number(0),
    "optimizer.clip_norm": _number(0),
    "optimizer.microbatches": _integer(1),
    "optimizer.nonfinite": _one_of("stop", "skip"),
    "optimizer.frozen": Rule((str,), _is_pattern, "a regular expression, or '' for none"),
    "ema_decay": _number(0, 1),
    "label_dropout": _number(0, 1),
    "log_every": _integer(1),
    "tensorboard": _BOOL,
    "profile_steps": _integer(0, 1000),
    "checkpoint.every": _integer(1),
    "checkpoint.keep": _integer(1),
    "checkpoint.keep_period": _integer(0),
    # A larger one would draw the samples of its last 32 bits.
    "sample.seed": _integer(0, 2**32 - 1),
    "sample.every": _integer(0),
    "sample.sampler": _one_of("ddim", "ddpm"),
    "sample.num_steps": _integer(1),
    "sample.spacing": _TEXT,
    "sample.eta": _number(0, 1),
    "sample.guidance": _number(0, 1000),
    "sample.guidance_channels": _integer(0),
    "sample.batch_size": _integer(1),
    "sample.num": _integer(1, _LARGEST_COUNT),
    "evaluation.split": _TEXT,
    "evaluation.features": _one_of("digits", "inception", ""),
    "evaluation.inception": _PATH,
    "evaluation.reference": _PATH,
    "evaluation.samples": _PATH,
}

# Settings that a restart in the same workdir may change: they don't touch the parameters. A dot at
# the end stands for a whole group.
_FREE = ("log_every", "tensorboard", "profile_steps", "checkpoint.", "sample.", "evaluation.")
# A run keeps the clusters that it has begun with, wherever the affinity lies now.
_FREE += ("data.num_workers", "data.dir", "diffusion.clip_x0", "clusters.affinity")
# A run that has stopped at a loss that is not finite may go on and skip it.
_FREE += ("optimizer.nonfinite", "model.remat", "model.attention")
_FREE += ("autoencoder.weights", "autoencoder.latents", "autoencoder.batch_size")

# What a run did that was begun before there was such a setting.
BEFORE = {
    "data.exif": "ignore",
    "model.num_heads": 0,
    "init_facts": "",
    "sample.spacing": "even",
}


def flatten(config: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings as {"group.name": value}."""
    flat = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict | Mapping):
            flat |= {f"{name}.{inner}": leaf for inner, leaf in flatten(value).items()}
        else:
            flat[name] = value
    return flat


def is_among(name: str, names: Collection[str]) -> bool:
    """Whether a setting is one of some, of which those that end with a dot are whole groups."""
    return name in names or f"{name.partition('.')[0]}." in names


def is_of_a_process(name: str) -> bool:
    """Whether each process of a run may have its own: where things lie there, and its workers.

    What lies at the paths must be the same, and is compared where it is read.
    """
    return RULES.get(name) is _PATH or name == "data.num_workers"


def validate(config: ConfigDict) -> None:
    """Checks every setting.

    Raises:
      ConfigError: naming the setting and what is allowed, for unknown or missing names, wrong types
        or values, and combinations that can't work.
    """
    flat = flatten(config)
    for name in flat.keys() - RULES.keys():
        near = difflib.get_close_matches(name, RULES, 1)
        hint = f"; did you mean config.{near[0]}?" if near else ""
        raise ConfigError(f"unknown setting config.{name}{hint}")
    for name, rule in RULES.items():
        if name not in flat:
            raise ConfigError(f"missing setting config.{name}: {rule.allowed}")
        value = flat[name]
        # bool is a subclass of int, and True no number of steps.
        of_kind = isinstance(value, rule.kinds) and (bool in rule.kinds) == isinstance(value, bool)
        if not of_kind or not rule.holds(value):
            raise ConfigError(f"config.{name} must be {rule.allowed}, got {value!r}")
    _validate_together(flat)


def _validate_together(flat):
    def at_most(name, limit):
        if flat[name] > flat[limit]:
            raise ConfigError(
                f"config.{name} = {flat[name]} must not exceed config.{limit} = {flat[limit]}"
            )

    at_most("clusters.k", "diffusion.timesteps")
    at_most("sample.num_steps", "diffusion.timesteps")
    try:
        spaced_timesteps(
            flat["diffusion.timesteps"], flat["sample.num_steps"], flat["sample.spacing"]
        )
    except ValueError as error:
        raise ConfigError(f"config.sample.spacing: {error}") from None
    if flat["autoencoder.name"]:
        for name, what in (("latents", "DIR of"), ("weights", "PATH of")):
            if not flat[f"autoencoder.{name}"]:
                raise ConfigError(
                    f"config.autoencoder.name = {flat['autoencoder.name']!r} needs "
                    f"config.autoencoder.{name} = {what} its {name}"
                )
    if (
        (flat["method.name"] in ("pcgrad", "nash") or flat["method.cosines"])
        and flat["method.timesteps"] == "uniform"
        and flat["method.gradient_form"] != "masked"
    ):
        raise ConfigError(
            f"config.method.timesteps = 'uniform' with config.method.name = "
            f"{flat['method.name']!r} needs config.method.gradient_form = 'masked'"
        )
    if flat["data.name"] == "folder" and not flat["data.dir"]:
        raise ConfigError("config.data.name = 'folder' needs config.data.dir = PATH of the folder")
    if flat["data.exif"] == "apply" and flat["data.name"] != "folder":
        raise ConfigError("config.data.exif = 'apply' needs config.data.name = 'folder'")
    if flat["clusters.cost"] == "gradient" and not flat["clusters.affinity"]:
        raise ConfigError(
            "config.clusters.cost = 'gradient' needs config.clusters.affinity = PATH of a task "
            "affinity; python -m experiments.task_affinity measures one"
        )
    if flat["clusters.only"] >= flat["clusters.k"]:
        raise ConfigError(
            f"config.clusters.only = {flat['clusters.only']} must be below config.clusters.k = "
            f"{flat['clusters.k']}"
        )
    weights = flat["method.linear_weights"]
    if weights and (
        flat["method.name"] != "linear" or weights.count(",") + 1 != flat["clusters.k"]
    ):
        raise ConfigError(
            f"config.method.linear_weights = {weights!r} needs config.method.name = 'linear' and "
            f"one weight for each of config.clusters.k = {flat['clusters.k']} clusters"
        )
    for name in ("method.share_weighted", "method.cosines"):
        if flat[name] and (flat["method.name"] == "vanilla" or flat["clusters.only"] >= 0):
            raise ConfigError(
                f"config.{name} = True needs clusters to weigh: another config.method.name than "
                "'vanilla' and config.clusters.only = -1"
            )
    if flat["sample.guidance"] != 1 and not (
        flat["model.conditional"] and 0 < flat["label_dropout"] < 1
    ):
        raise ConfigError(
            f"config.sample.guidance = {flat['sample.guidance']} needs config.model.conditional = "
            "True and 0 < config.label_dropout < 1, which train the model with and without labels"
        )
    decay = flat["optimizer.weight_decay"]
    if decay * flat["optimizer.learning_rate"] >= 1:
        raise ConfigError(
            f"config.optimizer.weight_decay = {decay} times config.optimizer.learning_rate = "
            f"{flat['optimizer.learning_rate']} must be below 1: each step takes that share of "
            "each parameter away"
        )
    if flat["evaluation.features"] == "digits" and flat["data.name"] != "digits":
        raise ConfigError(
            f"config.evaluation.features = 'digits' can't judge config.data.name = "
            f"{flat['data.name']!r}: set it to 'inception' or ''"
        )


def surprises(config: ConfigDict, training: bool) -> list[str]:
    """What a valid config may mean, but not everybody does: a line each."""
    flat = flatten(config)
    show = lambda name: f"config.{name} = {flat[name]!r}"
    every, steps = flat["checkpoint.every"], flat["num_steps"]
    lines = [
        (
            flat["diffusion.clip_x0"] and flat["autoencoder.name"],
            f"{show('diffusion.clip_x0')} clips latents, which are not within [-1, 1]",
        ),
        (
            flat["sample.eta"] and flat["sample.sampler"] == "ddpm",
            f"{show('sample.eta')} is of 'ddim', and {show('sample.sampler')}",
        ),
    ]
    lines_of_training = [
        (
            flat["optimizer.warmup_steps"] >= steps,
            f"{show('optimizer.warmup_steps')} is as long as {show('num_steps')}: the learning "
            f"rate never reaches {flat['optimizer.learning_rate']}",
        ),
        (
            flat["checkpoint.keep_period"] % every,
            f"{show('checkpoint.keep_period')} is no multiple of {show('checkpoint.every')}: only "
            "the steps that both divide are kept",
        ),
        (
            flat["method.name"] == "nash" and flat["method.nash_update_every"] >= steps > 1,
            f"{show('method.nash_update_every')} is as long as {show('num_steps')}: Nash's weights "
            "are never renewed",
        ),
        (
            flat["label_dropout"] == 1 and flat["model.conditional"],
            f"{show('label_dropout')} leaves no label to learn from",
        ),
        (
            flat["profile_steps"] and steps < 10,
            f"{show('profile_steps')} begins at step 10, and {show('num_steps')}",
        ),
        (
            flat["autoencoder.latents"] and not flat["autoencoder.name"],
            f"{show('autoencoder.latents')} is not used: {show('autoencoder.name')} is diffusion "
            "in pixels",
        ),
        (
            flat["clusters.affinity"] and flat["clusters.cost"] != "gradient",
            f"{show('clusters.affinity')} is not used: {show('clusters.cost')}",
        ),
    ]
    return [line for holds, line in lines + lines_of_training * training if holds]


def check_same(saved: ConfigDict, config: ConfigDict, workdir: str | os.PathLike) -> None:
    """Checks that a config describes the run that a workdir holds.

    Settings that don't change the parameters, such as ``log_every``, may differ; so may
    ``num_steps`` where the learning rate does not depend on it.

    Raises:
      ConfigError: naming the settings that differ and both values.
    """
    there, now = flatten(saved), flatten(config)
    free = _FREE + (("num_steps",) if now["optimizer.schedule"] == "constant" else ())
    differing = [
        f"  config.{name}: {there.get(name, 'not set')!r} there, {now.get(name, 'not set')!r} now"
        for name in sorted(there.keys() | now.keys())
        if there.get(name) != now.get(name) and not is_among(name, free)
    ]
    if differing:
        raise ConfigError(
            f"the run in {workdir} has another config:\n"
            + "\n".join(differing)
            + "\nchoose another --workdir, or the same settings"
        )


def from_json(settings: Mapping[str, Any]) -> ConfigDict:
    """The config that `ConfigDict.to_dict` and JSON have made a mapping of lists.

    Settings that were not there yet when it was written are set to what was done then.
    """
    if not isinstance(settings, Mapping):
        raise TypeError(f"{type(settings).__name__} instead of settings by name")
    config = ConfigDict(_with_tuples(settings))
    for name, value in BEFORE.items():
        group, _, leaf = name.rpartition(".")
        place = config.get(group) if group else config
        # Of a damaged file a group may be missing, or be none: `validate` says so.
        if isinstance(place, ConfigDict) and leaf not in place:
            place[leaf] = value
    return config


def _with_tuples(value):
    """JSON has lists only."""
    if isinstance(value, dict):
        return {name: _with_tuples(inner) for name, inner in value.items()}
    return tuple(value) if isinstance(value, list) else value
