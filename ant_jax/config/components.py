"""Components and their settings: what the names in a config mean."""

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict, FrozenConfigDict

from ant_jax import settings
from ant_jax.config.groups import GROUPS, Group
from ant_jax.runtime.files import words_of
from ant_jax.settings import Check, Setting

if TYPE_CHECKING:
    # It imports JAX, and a command line must be read fast.
    from ant_jax.diffusion.process import Process


class ConfigError(ValueError):
    """A setting is impossible, or does not fit the data, the devices or the workdir."""


NAMED_GROUPS = {group.name: group for group in GROUPS if group.folder}


def flatten(config: ConfigDict | Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings as {"group.name": value}."""
    flat = {}
    for name, value in config.items():
        if isinstance(value, ConfigDict | Mapping):
            flat |= {f"{name}.{inner}": leaf for inner, leaf in flatten(value).items()}
        else:
            flat[name] = value
    return flat


def made_type(described: Group) -> type:
    """The type that the components of a group return."""
    module, _, attribute = described.makes.partition(":")
    return getattr(importlib.import_module(module), attribute)


def component(group: str, name: str) -> Callable:
    """The component of a group by its name; see `settings.resolve`.

    Raises:
      ConfigError: naming the setting and what is allowed.
    """
    described = NAMED_GROUPS[group]
    folder = importlib.import_module(described.folder)
    try:
        if not isinstance(name, str):
            raise ValueError(f"must be a string, got {name!r}")
        return settings.resolve(folder, name, made_type(described))
    except ValueError as error:
        elsewhere = _elsewhere(group, name)
        raise ConfigError(f"config.{group}.{described.key} {error}{elsewhere}") from error


# What others call our noise processes.
_PROCESSES = {
    "gaussian": ("ddpm", "iddpm", "diffusion", "vp"),
    "flow": ("flow_matching", "rectified_flow", "sit"),
}


def _elsewhere(group, name):
    """Where else a name that is no component of a group may belong."""
    if group == "method" and name in importlib.import_module("ant_jax.mtl").__all__:
        aggregators = importlib.import_module("ant_jax.mtl.aggregators").__all__
        kind = "an aggregator " if name in aggregators else ""
        return f": it is {kind}for your own training loop, see docs/methods.md"
    if group == "process":
        for ours, theirs in _PROCESSES.items():
            if name in theirs:
                return f"; its name here is {ours!r}"
    for other, described in NAMED_GROUPS.items():
        folder = importlib.import_module(described.folder)
        if other != group and name in settings.names_in(folder, made_type(described)):
            return f"; {name!r} is a config.{other}.{described.key}"
    return ""


@functools.lru_cache(maxsize=256)
def settings_of_component(group: str, name: str) -> dict[str, Setting]:
    """The settings of one component of a group, without those that all components share."""
    described = NAMED_GROUPS[group]
    if name == described.none:
        return {}
    try:
        own = settings.settings_of(component(group, name), described.given, described.affects)
    except (TypeError, NameError) as error:
        raise ConfigError(f"config.{group}.{described.key} = {name!r}: {error}") from error
    both = own.keys() & {*common_settings(described), described.key}
    if both:
        raise ConfigError(
            f"config.{group}.{described.key} = {name!r} has an argument {', '.join(sorted(both))}, "
            f"which is a setting of all of config.{group}: give it another name"
        )
    return own


@functools.cache
def common_settings(group: Group) -> dict[str, Setting]:
    """The settings that all components of a group share."""
    return settings.settings_of(group.common, (), group.affects) if group.common else {}


def common_setting_names() -> list[str]:
    """The settings that do not depend on components, by ``"group.name"``."""
    return [
        f"{group.name}.{name}".lstrip(".") for group in GROUPS for name in common_settings(group)
    ]


def common(config: ConfigDict, group: str) -> dict[str, Any]:
    """The settings of a group that all its components share, as keyword arguments."""
    return {name: config[group][name] for name in common_settings(NAMED_GROUPS[group])}


def arguments(config: ConfigDict, group: str) -> dict[str, Any]:
    """The settings of a group that belong to its component, as keyword arguments."""
    values = config[group]
    return {name: values[name] for name in settings_of_component(group, values[key_of(group)])}


def key_of(group: str) -> str:
    """The setting that names the component of a group, such as "name"."""
    return NAMED_GROUPS[group].key


def build(config: ConfigDict | FrozenConfigDict, group: str, **given: Any) -> Any:
    """Calls the component of a group with its settings.

    Args:
      config: the run's config.
      group: its name.
      **given: arguments that the program gives; the component gets those that it has.

    Raises:
      ConfigError: naming the group, if the component raises a ValueError or an OSError.
    """
    found = component(group, config[group][key_of(group)])
    takes = inspect.signature(found).parameters
    given = {name: value for name, value in given.items() if name in takes}
    try:
        made = found(**given, **arguments(config, group))
    except ConfigError:
        raise
    except (ValueError, OSError) as error:
        raise ConfigError(f"config.{group}: {words_of(error)}") from error
    makes = made_type(NAMED_GROUPS[group])
    if not isinstance(made, makes):
        raise ConfigError(
            f"config.{group}.{key_of(group)} = {config[group][key_of(group)]!r} makes "
            f"{type(made).__name__}, not {makes.__name__}: see docs/adding.md"
        )
    return made


def build_process(config: ConfigDict | FrozenConfigDict) -> "Process":
    """The noise process with its loss weight; equal settings give equal processes."""
    weight = None
    if config.loss_weight.name != "none":
        weight = build(config, "loss_weight")
    return build(config, "process", loss_weight=weight)


def build_schedule(config: ConfigDict | FrozenConfigDict, learning_rate: Any) -> Callable:
    """The learning rate of each step after the warm-up.

    Args:
      config: the run's config, or the part of it that decides the program.
      learning_rate: the value after the warm-up; may be traced.
    """
    # The program has no `num_steps` if the schedule does not depend on it.
    steps = max(config.get("num_steps", 0) - config.optimizer.warmup_steps, 1)
    return build(config, "schedule", learning_rate=learning_rate, num_steps=steps)


def schedule_needs_num_steps(config: ConfigDict) -> bool:
    """Whether the learning rates depend on the number of steps."""
    return takes(config, "schedule", "num_steps")


def takes(config: ConfigDict, group: str, argument: str) -> bool:
    """Whether the component of a group has this argument."""
    found = component(group, config[group][key_of(group)])
    return argument in inspect.signature(found).parameters


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
                old = (
                    "; this config is of version 0.1, and ant_jax.config.from_json migrates it"
                    * ("diffusion" in config)
                )
                raise ConfigError(
                    f"missing setting config.{dot}{group.key}: a component, by default "
                    f"{group.default!r}{old}"
                )
            if not isinstance(name, str):
                raise ConfigError(f"config.{dot}{group.key} must be a string, got {name!r}")
            check = Check(lambda value: True, "a component")
            affects = group.affects | group.key_affects
            found[dot + group.key] = Setting((str,), check, None, affects)
            found |= {
                dot + each: setting
                for each, setting in settings_of_component(group.name, name).items()
            }
        found |= {dot + each: setting for each, setting in common_settings(group).items()}
    return found


def component_names() -> dict[str, str]:
    """The settings that name a component, ``"group.name"``, and their groups."""
    return {f"{group.name}.{group.key}": group.name for group in NAMED_GROUPS.values()}
