"""Checks of a config, of its settings alone and together."""

import difflib
import importlib
import os
from collections.abc import Collection

from ml_collections import ConfigDict

from ant_jax import settings
from ant_jax.config import migration
from ant_jax.config.components import (
    NAMED_GROUPS,
    ConfigError,
    build,
    build_process,
    build_schedule,
    component_names,
    flatten,
    key_of,
    made_type,
    schedule_needs_num_steps,
    settings_of_component,
    settings_of_config,
)
from ant_jax.settings import Affects


def validate(config: ConfigDict) -> None:
    """Checks every setting.

    Raises:
      ConfigError: naming the setting and what is allowed, if a name is unknown or missing, a type
        or a value is wrong, or two settings exclude each other.
    """
    flat = flatten(config)
    known = settings_of_config(config)
    for name in sorted(flat.keys() - known.keys()):
        raise ConfigError(unknown_setting(name, known))
    for name, setting in known.items():
        if flat.get(name) is None:
            raise ConfigError(f"missing setting config.{name}: {setting.check.allowed}")
        allowed = setting.problem(flat[name])
        if allowed:
            raise ConfigError(f"config.{name} must be {allowed}, got {flat[name]!r}")
    _validate_together(flat)
    _validate_optimizer(config)
    _validate_sampler(config)


def unknown_setting(name: str, known: Collection[str]) -> str:
    """Says that there is no such setting, and where it may be.

    Args:
      name: ``"group.name"``.
      known: the settings of the config, or of the group.
    """
    return f"unknown setting config.{name}{_hint(name, known)}"


def group_not_setting(name: str) -> str:
    """Says that a name is that of a group, and which setting may have been meant."""
    key = next((key for key, group in component_names().items() if group == name), None)
    return f"config.{name} is a group of settings: set config.{key or f'{name}.SETTING'}"


def _hint(name, known):
    if name in migration.MOVED:
        return f"; it is config.{migration.MOVED[name]} now"
    group, _, leaf = name.partition(".")
    if owners := _components_with(group, leaf):
        key = f"{group}.{key_of(group)}"
        return (
            f"; it belongs to config.{key} = {' or '.join(map(repr, owners))}: "
            f"--config.{key}=NAME, or config.{key} = NAME in Python, changes the component with "
            "its settings"
        )
    near = difflib.get_close_matches(name, known, 1)
    if near:
        return f"; did you mean config.{near[0]}?"
    there = [each for each in known if each.startswith(f"{group}.")]
    return f"; config.{group} has {', '.join(each.partition('.')[2] for each in there)}" * bool(
        there
    )


def _components_with(group, setting):
    """The components of a group's folder that have a setting."""
    if group not in NAMED_GROUPS:
        return []
    described = NAMED_GROUPS[group]
    names = settings.names_in(importlib.import_module(described.folder), made_type(described))
    return [name for name in names if setting in settings_of_component(group, name)]


def _validate_together(flat):
    def at_most(name, limit):
        if limit in flat and flat[name] > flat[limit]:
            raise ConfigError(
                f"config.{name} = {flat[name]} must not exceed config.{limit} = {flat[limit]}"
            )

    at_most("clusters.k", "process.timesteps")
    at_most("sampler.num_steps", "process.timesteps")
    levels = flat.get("process.timesteps")
    if levels and flat.get("model.routing", 1) < 1 and flat["model.routing_levels"] != levels:
        raise ConfigError(
            f"config.model.routing_levels = {flat['model.routing_levels']} must be "
            f"config.process.timesteps = {levels}"
        )
    if flat["autoencoder.name"]:
        for name, what in (("latents", "DIR of"), ("weights", "PATH of")):
            if not flat[f"autoencoder.{name}"]:
                raise ConfigError(
                    f"config.autoencoder.name = {flat['autoencoder.name']!r} needs "
                    f"config.autoencoder.{name} = {what} its {name}"
                )
    if flat["data.name"] == "folder" and not flat["data.dir"]:
        raise ConfigError("config.data.name = 'folder' needs config.data.dir = PATH of the folder")
    if flat["clusters.name"] == "gradient" and not flat["clusters.affinity"]:
        raise ConfigError(
            "config.clusters.name = 'gradient' needs config.clusters.affinity = PATH of a task "
            "affinity; in a clone, python -m experiments.task_affinity measures one"
        )
    if flat["clusters.specialist"] >= flat["clusters.k"]:
        raise ConfigError(
            f"config.clusters.specialist = {flat['clusters.specialist']} must be below "
            f"config.clusters.k = {flat['clusters.k']}"
        )
    for name in ("method.weight_by_interval_size", "method.cosines"):
        if flat[name] and (flat["method.name"] == "vanilla" or flat["clusters.specialist"] >= 0):
            raise ConfigError(
                f"config.{name} = True needs tasks to weigh: another config.method.name than "
                "'vanilla' and config.clusters.specialist = -1"
            )
    for name in ("method.curriculum_steps", "method.pike"):
        if flat[name] and flat["clusters.specialist"] >= 0:
            raise ConfigError(
                f"config.{name} = {flat[name]} needs all tasks: set config.clusters.specialist = -1"
            )
    if flat["method.pike"] and (
        flat["method.curriculum_steps"] or flat["method.draw"] == "uniform"
    ):
        raise ConfigError(
            f"config.method.pike = {flat['method.pike']} chooses the tasks of the examples: it "
            "needs config.method.draw = 'stratified' or 'auto' and "
            "config.method.curriculum_steps = 0"
        )
    if flat["sampler.guidance"] != 1 and not (
        flat["model.conditional"] and 0 < flat["label_dropout"] < 1
    ):
        raise ConfigError(
            f"config.sampler.guidance = {flat['sampler.guidance']} needs config.model.conditional "
            "= True and 0 < config.label_dropout < 1, which train the model with and without labels"
        )
    decay = flat["optimizer.weight_decay"]
    if decay * flat["optimizer.learning_rate"] >= 1:
        raise ConfigError(
            f"config.optimizer.weight_decay = {decay} times config.optimizer.learning_rate = "
            f"{flat['optimizer.learning_rate']} must be below 1: each step removes that share of "
            "each parameter"
        )
    if flat["evaluation.every"] and flat["evaluation.samples"]:
        raise ConfigError(
            f"config.evaluation.every = {flat['evaluation.every']} draws samples from the run: set "
            "config.evaluation.samples = '', or config.evaluation.every = 0"
        )
    if flat["evaluation.num_in_training"] == 1:
        raise ConfigError("config.evaluation.num_in_training = 1: metrics need 2 samples")
    if flat["evaluation.features"] == "digits" and flat["data.name"] != "digits":
        raise ConfigError(
            f"config.evaluation.features = 'digits' can't evaluate config.data.name = "
            f"{flat['data.name']!r}: set it to 'classifier', which needs labels, to 'inception', "
            "which needs config.evaluation.weights, or to '' for none"
        )


def _validate_optimizer(config):
    schedule = build_schedule(config, config.optimizer.learning_rate)
    decay = config.optimizer.weight_decay
    build(config, "optimizer", learning_rate=schedule, weight_decay=decay, mask=None)


def _validate_sampler(config):
    build(config, "sampler")
    settings = config.sampler
    try:
        build_process(config).steps(settings.num_steps, settings.spacing)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"config.sampler.spacing: {error}") from None
    if settings.guidance_low >= settings.guidance_high:
        raise ConfigError(
            f"config.sampler.guidance_low = {settings.guidance_low} must be below "
            f"config.sampler.guidance_high = {settings.guidance_high}"
        )


def warnings_of(config: ConfigDict, training: bool) -> list[str]:
    """Warnings about a valid config that may not do what its author wants, a line each."""
    flat = flatten(config)
    show = lambda name: f"config.{name} = {flat[name]!r}"
    every, steps = flat["checkpoint.every"], flat["num_steps"]
    lines = [
        (
            flat["sampler.clip_x0"] and flat["autoencoder.name"],
            f"{show('sampler.clip_x0')} clips latents, which are not within [-1, 1]",
        ),
    ]
    lines_of_training = [
        (
            flat["optimizer.warmup_steps"] >= steps,
            f"{show('optimizer.warmup_steps')} is at least {show('num_steps')}: the learning "
            f"rate never reaches {flat['optimizer.learning_rate']}",
        ),
        (
            flat["optimizer.decay_mask"] and not flat["optimizer.weight_decay"],
            f"{show('optimizer.decay_mask')} has no effect: {show('optimizer.weight_decay')}",
        ),
        (
            flat["optimizer.name"] == "schedule_free" and flat["schedule.name"] != "constant",
            f"{show('optimizer.name')} averages the parameters instead of lowering the learning "
            f"rate, and {show('schedule.name')} lowers it too",
        ),
        (
            flat["checkpoint.keep_period"] % every,
            f"{show('checkpoint.keep_period')} is no multiple of {show('checkpoint.every')}: only "
            "the steps that both divide are kept",
        ),
        (
            flat["method.update_every"] >= steps > 1,
            f"{show('method.update_every')} is at least {show('num_steps')}: the weights are "
            "never renewed",
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
    ]
    return [line for holds, line in lines + lines_of_training * training if holds]


def may_change(config: ConfigDict) -> set[str]:
    """The settings, by ``"group.name"``, that may change when a run goes on."""
    known = settings_of_config(config)
    free = {name for name, setting in known.items() if not setting.affects & Affects.PARAMETERS}
    return free | (set() if schedule_needs_num_steps(config) else {"num_steps"})


def check_same(saved: ConfigDict, config: ConfigDict, workdir: str | os.PathLike) -> None:
    """Checks that a config describes the run in a workdir.

    Settings that do not affect the parameters, such as ``log_every``, may differ. ``num_steps`` may
    differ if the learning rate does not depend on it.

    Raises:
      ConfigError: naming the settings that differ and both values.
    """
    there, now = flatten(saved), flatten(config)
    free = may_change(saved) | may_change(config)
    # If the components differ, the settings that only one of them has need no line.
    changed = [group for name, group in component_names().items() if there[name] != now[name]]
    others = {name for name in there.keys() ^ now.keys() if name.partition(".")[0] in changed}
    differing = [
        f"  config.{name}: {there.get(name, 'not set')!r} there, {now.get(name, 'not set')!r} now"
        for name in sorted(there.keys() | now.keys())
        if there.get(name) != now.get(name) and name not in free and name not in others
    ]
    if differing:
        way = "choose another --workdir, or the same settings"
        if there["num_steps"] != now["num_steps"] and "num_steps" not in free:
            way += (
                f". With config.schedule.name = {now['schedule.name']!r} the learning "
                "rates depend on config.num_steps: to train on, choose another --workdir and "
                f"config.init_from = '{workdir}'"
            )
        raise ConfigError(
            f"the run in {workdir} has another config:\n" + "\n".join(differing) + f"\n{way}"
        )
