"""A config: groups of settings, and the components that they name.

A group such as ``config.method`` names a component. Its settings are those that all components
share (`config.shared_settings`) and the typed arguments of the component. `settings_of_config`
lists all settings of a config. Each setting says what it affects. Resuming, the cache of samples,
the compiled step and the experiments read it there.
"""

from ant_jax.config.components import (
    ConfigError,
    arguments,
    build,
    build_process,
    build_schedule,
    common,
    common_setting_names,
    component,
    component_names,
    flatten,
    schedule_needs_num_steps,
    settings_of_config,
    takes,
)
from ant_jax.config.editing import (
    AssignmentError,
    affecting,
    default_config,
    from_json,
    in_words,
    meaning,
    per_process_settings,
    program,
    update,
)
from ant_jax.config.groups import GROUPS
from ant_jax.config.validation import check_same, may_change, unknown_setting, validate, warnings_of

__all__ = [
    "GROUPS",
    "AssignmentError",
    "ConfigError",
    "affecting",
    "arguments",
    "build",
    "build_process",
    "build_schedule",
    "check_same",
    "common",
    "component",
    "component_names",
    "default_config",
    "flatten",
    "from_json",
    "in_words",
    "may_change",
    "meaning",
    "per_process_settings",
    "program",
    "schedule_needs_num_steps",
    "settings_of_config",
    "common_setting_names",
    "takes",
    "unknown_setting",
    "warnings_of",
    "update",
    "validate",
]
