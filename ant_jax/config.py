"""A config: groups of settings, and the components that they name.

A group such as ``config.method`` names a component. Its settings are those that all components
share (`setting_groups`) and the typed arguments of the component. `settings_of_config` lists all
settings of a config. Each setting says what it affects. Resuming, the cache of samples, the
compiled step and the experiments read it there.
"""

import difflib
import functools
import importlib
import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict
from ml_collections.config_dict import placeholder

from ant_jax import old_configs, settings
from ant_jax.setting_groups import GROUPS, Group
from ant_jax.settings import Affects, Check, Setting


class ConfigError(ValueError):
    """A setting is impossible, or does not fit the data, the devices or the workdir."""


_OF_NAMES = {group.name: group for group in GROUPS if group.folder}


def flatten(config: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings as {"group.name": value}."""
    flat = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict | Mapping):
            flat |= {f"{name}.{inner}": leaf for inner, leaf in flatten(value).items()}
        else:
            flat[name] = value
    return flat


def _makes(described):
    module, _, attribute = described.makes.partition(":")
    return getattr(importlib.import_module(module), attribute)


def component(group: str, name: str) -> Callable:
    """The component of a group by its name; see `settings.resolve`.

    Raises:
      ConfigError: naming the setting and what is allowed.
    """
    described = _OF_NAMES[group]
    folder = importlib.import_module(described.folder)
    try:
        if not isinstance(name, str):
            raise ValueError(f"must be a string, got {name!r}")
        return settings.resolve(folder, name, _makes(described))
    except ValueError as error:
        raise ConfigError(f"config.{group}.{described.key} {error}") from error


@functools.lru_cache(maxsize=256)
def _settings_of_component(group: str, name: str) -> dict[str, Setting]:
    described = _OF_NAMES[group]
    if name == described.none:
        return {}
    try:
        own = settings.settings_of(component(group, name), described.given, described.affects)
    except (TypeError, NameError) as error:
        raise ConfigError(f"config.{group}.{described.key} = {name!r}: {error}") from error
    both = own.keys() & {*_common_settings(described), described.key}
    if both:
        raise ConfigError(
            f"config.{group}.{described.key} = {name!r} has an argument {', '.join(sorted(both))}, "
            f"which is a setting of all of config.{group}: give it another name"
        )
    return own


@functools.cache
def _common_settings(group: Group) -> dict[str, Setting]:
    return settings.settings_of(group.common, (), group.affects) if group.common else {}


def common(config: ConfigDict, group: str) -> dict[str, Any]:
    """The settings of a group that all its components share, as keyword arguments."""
    return {name: config[group][name] for name in _common_settings(_OF_NAMES[group])}


def arguments(config: ConfigDict, group: str) -> dict[str, Any]:
    """The settings of a group that belong to its component, as keyword arguments."""
    values = config[group]
    return {name: values[name] for name in _settings_of_component(group, values[_key(group)])}


def _key(group):
    return _OF_NAMES[group].key


def build(config: ConfigDict | FrozenConfigDict, group: str, **given: Any) -> Any:
    """Calls the component of a group with its settings.

    Args:
      config: the run's config.
      group: its name.
      **given: arguments that the program gives; the component gets those that it has.

    Raises:
      ConfigError: naming the group, if the component raises a ValueError or an OSError.
    """
    found = component(group, config[group][_key(group)])
    takes = inspect.signature(found).parameters
    given = {name: value for name, value in given.items() if name in takes}
    try:
        made = found(**given, **arguments(config, group))
    except ConfigError:
        raise
    except (ValueError, OSError) as error:
        raise ConfigError(f"config.{group}: {error}") from error
    makes = _makes(_OF_NAMES[group])
    if not isinstance(made, makes):
        raise ConfigError(
            f"config.{group}.{_key(group)} = {config[group][_key(group)]!r} makes "
            f"{type(made).__name__}, not {makes.__name__}: see docs/adding.md"
        )
    return made


def settings_of_config(config: ConfigDict | Mapping[str, Any]) -> dict[str, Setting]:
    """All settings of a config with these components, by ``"group.name"``.

    Raises:
      ConfigError: if a component can't be found.
    """
    found = {}
    for group in GROUPS:
        dot = f"{group.name}." if group.name else ""
        values = config.get(group.name, {}) if group.name else config
        if group.folder:
            name = values.get(group.key) if isinstance(values, ConfigDict | Mapping) else None
            if name is None:
                old = "; this config is of version 0.1, see docs/settings.md" * (
                    "diffusion" in config
                )
                raise ConfigError(
                    f"missing setting config.{dot}{group.key}: a component, by default "
                    f"{group.default!r}{old}"
                )
            if not isinstance(name, str):
                raise ConfigError(f"config.{dot}{group.key} must be a string, got {name!r}")
            check = Check(lambda value: True, "a component")
            found[dot + group.key] = Setting((str,), check, None, group.affects)
            found |= {
                dot + each: setting
                for each, setting in _settings_of_component(group.name, name).items()
            }
        found |= {dot + each: setting for each, setting in _common_settings(group).items()}
    return found


def default_config(**names: str) -> ConfigDict:
    """A config with the default of every setting.

    Args:
      **names: components by group, as in ``default_config(method="pcgrad", model="unet")``. The
        other groups have their default component.
    """
    config = ConfigDict()
    for group in GROUPS:
        if group.name and group.name not in config:
            config[group.name] = ConfigDict()
        place = config[group.name] if group.name else config
        if group.folder:
            place[group.key] = names.get(group.name, group.default)
        for name, setting in _common_settings(group).items():
            place[name] = setting.default
        if group.folder:
            _fill(config, group.name)
    unknown = names.keys() - _OF_NAMES.keys()
    if unknown:
        raise ConfigError(f"no group of components: {', '.join(sorted(unknown))}")
    return config.lock()


def component_names() -> dict[str, str]:
    """The settings that name a component, ``"group.name"``, and their groups."""
    return {f"{group.name}.{group.key}": group.name for group in _OF_NAMES.values()}


def update(config: ConfigDict, changes: Mapping[str, Any]) -> None:
    """Changes settings by ``"group.name"``, in place.

    If the component of a group changes, the group gets the settings of the new component. It keeps
    the value of a setting that both components have with the same range and default.

    Raises:
      ConfigError: if there is no such component.
      KeyError: if there is no such setting.
      TypeError: if a value is of another type.
    """
    keys = component_names()
    for name, group in keys.items():
        if name in changes and changes[name] != config[group][_key(group)]:
            former = config[group][_key(group)]
            with config.unlocked():
                config[group][_key(group)] = changes[name]
                _fill(config, group, former)
    rest = {name: value for name, value in changes.items() if name not in keys}
    config.update_from_flattened_dict(rest)


def _fill(config, group, former=None):
    """Gives a group the settings of its component, and removes those of the former one."""
    place = config[group]
    own = _settings_of_component(group, place[_key(group)])
    before = {} if former is None else _settings_of_component(group, former)
    common = _common_settings(_OF_NAMES[group])
    # A setting of the same name may mean something else.
    kept = {name for name in own.keys() & before.keys() if _alike(own[name], before[name])}
    for name in [each for each in place if each not in (*kept, *common, _key(group))]:
        del place[name]
    for name, setting in own.items():
        if name not in place:
            required = setting.default is settings.REQUIRED
            place[name] = placeholder(setting.kinds[-1]) if required else setting.default


def _alike(one, other):
    parts = lambda setting: (setting.kinds, setting.check.allowed, setting.default)
    return parts(one) == parts(other)


def affecting(config: ConfigDict, affects: Affects) -> dict[str, Any]:
    """The values of the settings that affect any of these, by ``"group.name"``."""
    flat = flatten(config)
    return {
        name: flat[name]
        for name, setting in settings_of_config(config).items()
        if setting.affects & affects
    }


def meaning(config: ConfigDict) -> dict[str, Any]:
    """The values of the settings that decide what given parameters compute."""
    flat = flatten(config)
    return {
        name: flat[name]
        for name, setting in settings_of_config(config).items()
        if setting.affects == Affects.MEANING
    }


def program(config: ConfigDict) -> FrozenConfigDict:
    """The part of a config that the compiled step depends on; hashable."""
    found = ConfigDict()
    for group in (each for each in GROUPS if each.in_step):
        common = _common_settings(group)
        names = [name for name, setting in common.items() if not setting.traced]
        if not group.name:
            found.update({name: config[name] for name in names})
            continue
        if group.folder:
            names += [group.key, *_settings_of_component(group.name, config[group.name][group.key])]
        found[group.name] = ConfigDict({name: config[group.name][name] for name in names})
    if config.optimizer.schedule == "constant":
        del found["num_steps"]
    return FrozenConfigDict(found)


def of_a_process(config: ConfigDict) -> set[str]:
    """The settings that may differ between the processes of a run: paths, and data workers.

    The contents of the paths must be equal; the code that reads them compares them.
    """
    return {name for name, setting in settings_of_config(config).items() if setting.per_process}


def validate(config: ConfigDict) -> None:
    """Checks every setting.

    Raises:
      ConfigError: naming the setting and what is allowed, if a name is unknown or missing, a type
        or a value is wrong, or two settings exclude each other.
    """
    flat = flatten(config)
    known = settings_of_config(config)
    for name in sorted(flat.keys() - known.keys()):
        raise ConfigError(f"unknown setting config.{name}{_hint(name, known)}")
    for name, setting in known.items():
        if flat.get(name) is None:
            raise ConfigError(f"missing setting config.{name}: {setting.check.allowed}")
        allowed = setting.problem(flat[name])
        if allowed:
            raise ConfigError(f"config.{name} must be {allowed}, got {flat[name]!r}")
    _validate_together(flat)


def _hint(name, known):
    if name in old_configs.MOVED:
        return f"; it is config.{old_configs.MOVED[name]} now"
    group, _, leaf = name.partition(".")
    if leaf and leaf in _settings_of_others(group):
        key = f"{group}.{_key(group)}"
        return (
            f"; it belongs to another {key}: ant_jax.config.update(config, {{'{key}': ...}}) "
            "changes the component with its settings"
        )
    near = difflib.get_close_matches(name, known, 1)
    if near:
        return f"; did you mean config.{near[0]}?"
    there = [each for each in known if each.startswith(f"{group}.")]
    return f"; config.{group} has {', '.join(each.partition('.')[2] for each in there)}" * bool(
        there
    )


def _settings_of_others(group):
    """Names of the settings of all components of a group's folder."""
    if group not in _OF_NAMES:
        return set()
    described = _OF_NAMES[group]
    names = settings.names_in(importlib.import_module(described.folder), _makes(described))
    return {setting for name in names for setting in _settings_of_component(group, name)}


def _validate_together(flat):
    def at_most(name, limit):
        if limit in flat and flat[name] > flat[limit]:
            raise ConfigError(
                f"config.{name} = {flat[name]} must not exceed config.{limit} = {flat[limit]}"
            )

    at_most("clusters.k", "process.timesteps")
    at_most("sampler.num_steps", "process.timesteps")
    if "process.timesteps" in flat:
        from ant_jax.diffusion import spaced_timesteps

        try:
            spaced_timesteps(
                flat["process.timesteps"], flat["sampler.num_steps"], flat["sampler.spacing"]
            )
        except ValueError as error:
            raise ConfigError(f"config.sampler.spacing: {error}") from None
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
            "affinity; python -m experiments.task_affinity measures one"
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
    if flat["evaluation.features"] == "digits" and flat["data.name"] != "digits":
        raise ConfigError(
            f"config.evaluation.features = 'digits' can't evaluate config.data.name = "
            f"{flat['data.name']!r}: set it to 'inception' or ''"
        )


def surprises(config: ConfigDict, training: bool) -> list[str]:
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
            f"{show('optimizer.warmup_steps')} is as long as {show('num_steps')}: the learning "
            f"rate never reaches {flat['optimizer.learning_rate']}",
        ),
        (
            flat["checkpoint.keep_period"] % every,
            f"{show('checkpoint.keep_period')} is no multiple of {show('checkpoint.every')}: only "
            "the steps that both divide are kept",
        ),
        (
            flat["method.update_every"] >= steps > 1,
            f"{show('method.update_every')} is as long as {show('num_steps')}: the weights are "
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


def check_same(saved: ConfigDict, config: ConfigDict, workdir: str | os.PathLike) -> None:
    """Checks that a config describes the run in a workdir.

    Settings that do not affect the parameters, such as ``log_every``, may differ. ``num_steps`` may
    differ if the learning rate does not depend on it.

    Raises:
      ConfigError: naming the settings that differ and both values.
    """
    there, now = flatten(saved), flatten(config)
    known = settings_of_config(saved) | settings_of_config(config)
    free = {name for name, setting in known.items() if not setting.affects & Affects.PARAMETERS}
    if now["optimizer.schedule"] == "constant":
        free.add("num_steps")
    # If the components differ, the settings that only one of them has need no line.
    changed = [group for name, group in component_names().items() if there[name] != now[name]]
    others = {name for name in there.keys() ^ now.keys() if name.partition(".")[0] in changed}
    differing = [
        f"  config.{name}: {there.get(name, 'not set')!r} there, {now.get(name, 'not set')!r} now"
        for name in sorted(there.keys() | now.keys())
        if there.get(name) != now.get(name) and name not in free and name not in others
    ]
    if differing:
        raise ConfigError(
            f"the run in {workdir} has another config:\n"
            + "\n".join(differing)
            + "\nchoose another --workdir, or the same settings"
        )


def from_json(values: Mapping[str, Any]) -> ConfigDict:
    """The inverse of `ConfigDict.to_dict` and JSON.

    A config of an earlier version is migrated: names become those of today, and settings that did
    not exist yet get the value that does the same as that version.

    Raises:
      TypeError: if ``values`` is not a mapping.
    """
    if not isinstance(values, Mapping):
        raise TypeError(f"{type(values).__name__} instead of settings by name")
    return ConfigDict(old_configs.migrated(_with_tuples(values))).lock()


def _with_tuples(value):
    """Tuples instead of lists, because JSON has lists only."""
    if isinstance(value, Mapping):
        return {name: _with_tuples(inner) for name, inner in value.items()}
    return tuple(value) if isinstance(value, list) else value
