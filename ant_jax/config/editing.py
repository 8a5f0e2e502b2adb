"""Configs with their defaults, changes of them, and the parts that others depend on."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict
from ml_collections.config_dict import placeholder

from ant_jax import settings
from ant_jax.config import migration
from ant_jax.config.components import (
    NAMED_GROUPS,
    ConfigError,
    common_settings,
    component_names,
    flatten,
    key_of,
    schedule_needs_num_steps,
    settings_of_component,
    settings_of_config,
)
from ant_jax.config.groups import GROUPS
from ant_jax.config.validation import group_not_setting, unknown_setting
from ant_jax.settings import Affects


class AssignmentError(ConfigError):
    """A setting can't have this value."""


class UnknownSettingError(AssignmentError, AttributeError):
    """There is no such setting."""


class Config(ConfigDict):
    """A config, or a group of it.

    If the component of a group changes, the group gets the settings of the new component. It keeps
    the value of a setting that both components have with the same range and default. An unknown
    setting, or a value of another type, is a ConfigError.
    """

    _group = ""

    def __init__(self, *values: Any, group: str = "", **options: Any):
        """Makes a config from values by name; the group ``group`` of a config if that is not ""."""
        super().__init__(*values, **options)
        object.__setattr__(self, "_group", group)

    def __getattr__(self, name: str) -> Any:
        """Returns a setting."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            # What copy and pickle ask for is not meant for a user.
            if name.startswith("_"):
                raise
            raise self._unknown(name) from None

    def _unknown(self, name):
        if "." in name and not self._group:
            words = f"a key has no dot: write config.{name} instead of config[{name!r}]"
            return UnknownSettingError(words)
        dot = f"{self._group}." if self._group else ""
        known = {dot + each for each in self}
        return UnknownSettingError(unknown_setting(dot + name, known))

    def __setitem__(self, key: str, value: Any) -> None:
        """Changes a setting."""
        if key not in self:
            if self.is_locked:
                raise self._unknown(key)
            return super().__setitem__(key, value)
        before = self[key]
        if isinstance(before, ConfigDict) and not isinstance(value, Mapping | ConfigDict):
            raise AssignmentError(group_not_setting(key))
        if isinstance(before, Config) and not isinstance(value, Config):
            value = Config(value, group=key)
            if self.is_locked:
                value.lock()
        names_component = self._group in NAMED_GROUPS and key == key_of(self._group)
        if names_component and isinstance(value, str) and value != before:
            # Before anything has changed.
            try:
                settings_of_component(self._group, value)
            except ConfigError as error:
                raise AssignmentError(str(error)) from error
            super().__setitem__(key, value)
            with self.unlocked():
                _fill(self, self._group, before)
            return None
        try:
            return super().__setitem__(key, value)
        except TypeError:
            name, kind = f"{self._group}.{key}".lstrip("."), self.get_type(key).__name__
            words = f"config.{name} must be of type {kind}, got {value!r}"
            raise AssignmentError(words) from None

    def copy_and_resolve_references(self, visit_map: Mapping[int, Any] | None = None) -> "Config":
        """See `ConfigDict`."""
        copy = super().copy_and_resolve_references(visit_map)
        object.__setattr__(copy, "_group", self._group)
        return copy

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        object.__setattr__(self, "_group", state.get("_group", ""))


def default_config(**names: str) -> ConfigDict:
    """A config with the default of every setting.

    Args:
      **names: components by group, as in ``default_config(method="pcgrad", model="unet")``. The
        other groups have their default component.
    """
    config = Config()
    for group in GROUPS:
        if group.name and group.name not in config:
            config[group.name] = Config(group=group.name)
        place = config[group.name] if group.name else config
        if group.folder:
            place[group.key] = names.get(group.name, group.default)
        for name, setting in common_settings(group).items():
            place[name] = setting.default
        if group.folder:
            _fill(place, group.name)
    unknown = names.keys() - NAMED_GROUPS.keys()
    if unknown:
        raise ConfigError(f"no group of components: {', '.join(sorted(unknown))}")
    return config.lock()


def update(config: ConfigDict, changes: Mapping[str, Any]) -> None:
    """Changes settings by ``"group.name"``, in place.

    Components change first, whatever the order of the changes; see `Config`.

    Raises:
      ConfigError: if there is no such setting or component, or a value is of another type.
    """
    known = flatten(config)
    keys = component_names()
    for name in sorted(changes, key=lambda name: name not in keys):
        *groups, leaf = name.split(".")
        place = config
        for group in groups:
            place = place.get(group)
            if not isinstance(place, ConfigDict):
                raise UnknownSettingError(unknown_setting(name, known))
        former = place.get(leaf)
        place[leaf] = changes[name]
        if name in keys and former != changes[name] and not isinstance(place, Config):
            # A plain `ConfigDict` does not do it by itself.
            with place.unlocked():
                _fill(place, keys[name], former)


def _fill(place, group, former=None):
    """Gives a group the settings of its component, and removes those of the former one."""
    own = settings_of_component(group, place[key_of(group)])
    before = {} if former is None else settings_of_component(group, former)
    common = common_settings(NAMED_GROUPS[group])
    # A setting of the same name may mean something else.
    kept = {name for name in own.keys() & before.keys() if _alike(own[name], before[name])}
    for name in [each for each in place if each not in (*kept, *common, key_of(group))]:
        del place[name]
    for name, setting in own.items():
        if name not in place:
            required = setting.default is settings.REQUIRED
            place[name] = placeholder(setting.kinds[-1]) if required else setting.default


def _alike(one, other):
    parts = lambda setting: (setting.kinds, setting.check.allowed, setting.default)
    return parts(one) == parts(other)


def in_words(
    config: ConfigDict, changes: Mapping[str, Any], shown: Callable[[str], str] = str
) -> list[str]:
    """Changed settings as words for the name of a folder, such as "seed=3".

    Other values are other words, except that of a path only the last part counts, without the
    suffix of a file.

    Args:
      config: has the settings.
      changes: their values, by ``"group.name"``.
      shown: from the name of a setting to that in its word.
    """
    paths = per_process_settings(config)
    return [f"{shown(name)}={_word(value, name in paths)}" for name, value in changes.items()]


def _word(value, is_path):
    if not (is_path and isinstance(value, str)):
        parts = value if isinstance(value, tuple) else (value,)
        # A name of a folder has no slash.
        return ",".join(map(str, parts)).replace("/", "%2F")
    path = Path(value)
    # Of `init_from`, the best step of a run: every run has a folder of that name.
    if path.name == "best" and len(path.parts) > 1:
        return f"{path.parent.name}-best"
    # The name of a run may end in a number, as "learning_rate=0.01" does.
    return path.stem if path.suffix[1:].isidentifier() else path.name


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
        common = common_settings(group)
        names = [name for name, setting in common.items() if not setting.traced]
        if not group.name:
            found.update({name: config[name] for name in names})
            continue
        if group.folder:
            names += [group.key, *settings_of_component(group.name, config[group.name][group.key])]
        found[group.name] = ConfigDict({name: config[group.name][name] for name in names})
    if not schedule_needs_num_steps(config):
        del found["num_steps"]
    return FrozenConfigDict(found)


def per_process_settings(config: ConfigDict) -> set[str]:
    """The settings that may differ between the processes of a run: paths, and data workers.

    The contents of the paths must be equal; the code that reads them compares them.
    """
    return {name for name, setting in settings_of_config(config).items() if setting.per_process}


def from_json(values: Mapping[str, Any]) -> ConfigDict:
    """The inverse of `ConfigDict.to_dict` and JSON.

    A config of an earlier version is migrated: names become those of today, and settings that did
    not exist yet get the value that does the same as that version.

    Raises:
      TypeError: if ``values`` is not a mapping.
    """
    if not isinstance(values, Mapping):
        raise TypeError(f"{type(values).__name__} instead of settings by name")
    content = migration.migrated(_with_tuples(values))
    groups = {
        name: Config(value, group=name) if isinstance(value, Mapping) else value
        for name, value in content.items()
    }
    return Config(groups).lock()


def _with_tuples(value):
    """Tuples instead of lists, because JSON has lists only."""
    if isinstance(value, Mapping):
        return {name: _with_tuples(inner) for name, inner in value.items()}
    return tuple(value) if isinstance(value, list) else value
