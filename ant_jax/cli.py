"""The command line: the config, the workdir, and errors of one line."""

import contextlib
import difflib
import hashlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import flags
from ml_collections import ConfigDict, config_flags

from ant_jax import config as config_lib
from ant_jax.config import ConfigError
from ant_jax.config import file as config_file
from ant_jax.runtime.files import user_path, words_of

# What ml_collections raises where an override fits no setting.
_BAD_OVERRIDE = (AttributeError, KeyError, TypeError, ValueError)


class _ConfigFileParser(flags.ArgumentParser):
    # The last config that was read, before the settings of the command line.
    config: ConfigDict | None = None

    def parse(self, argument):
        workdir, of_run = _names_of_run(sys.argv)
        names = of_run | names_in(sys.argv)
        try:
            self.config = config_file.read(argument, names)
        except ConfigError as error:
            if any(f"config.{name} " in str(error) for name in of_run):
                raise ConfigError(f"the run in {workdir}: {error}") from error
            raise
        except OSError as error:
            # absl expects a ValueError from a flag.
            raise ValueError(str(error)) from error
        return self.config


_parser = _ConfigFileParser()


def _flags_in(arguments):
    """The flags of a command line, ``--NAME=VALUE``, by name; the last of equal ones."""
    found = {}
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if match := re.fullmatch(r"--?([\w.]+)(?:=(.*))?", argument, re.DOTALL):
            found[match[1]] = following if match[2] is None else match[2]
    return found


def _settings_in(arguments):
    """The settings of a command line, ``--config.NAME=VALUE``, by name."""
    each = ((name.partition("config."), value) for name, value in _flags_in(arguments).items())
    return {name: value for (before, _, name), value in each if name and not before}


def names_in(arguments: Sequence[str]) -> dict[str, str]:
    """The components that a command line names, ``--config.GROUP.name=VALUE``, by setting."""
    given, known = _settings_in(arguments), config_lib.component_names()
    return {name: value for name, value in given.items() if name in known}


def _has_config(arguments):
    return "config" in _flags_in(arguments)


def _names_of_run(arguments):
    """``--workdir`` and the components of its run, if the command line has no ``--config``."""
    from ant_jax import workdir as workdir_lib

    workdir = _flags_in(arguments).get("workdir")
    if not workdir or _has_config(arguments):
        return None, {}
    # Opening the run later gives the error, if there is one.
    with contextlib.suppress(ConfigError, OSError):
        saved = workdir_lib.load_config(user_path(workdir))
        if saved is not None:
            flat = config_lib.flatten(saved)
            known = config_lib.component_names()
            return workdir, {name: flat[name] for name in known if name in flat}
    return None, {}


def define_config() -> flags.FlagHolder:
    """Defines ``--config``; exits with a message if the file or a ``--config.NAME`` is wrong."""
    holder = config_flags.DEFINE_config_file(
        "config",
        None,
        "Config file; FILE:METHOD,CLUSTERS passes an argument to it. Without --config: the config "
        "of the run in --workdir; for a new run configs/digits.py. Those of the package are "
        f"{', '.join(config_file.names())}.",
    )
    # The parser of ml_collections does not find relative imports, and shows tracebacks.
    flags.FLAGS["config"].parser = _parser
    try:
        # Without --config, this reads the default file and applies the overrides.
        flags.set_default(holder, config_file.DEFAULT)
    except (flags.Error, *_BAD_OVERRIDE) as error:
        _refuse_flags(error)
    return holder


def define_processes() -> None:
    """Defines the flags of `processes`."""
    flags.DEFINE_bool(
        "distributed", False, "Whether this is one process of many, on a TPU slice or under SLURM."
    )
    flags.DEFINE_string(
        "coordinator", None, "HOST:PORT of process 0, where neither a TPU slice nor SLURM tells."
    )
    flags.DEFINE_integer("num_processes", None, "How many; with --coordinator.", lower_bound=1)
    flags.DEFINE_integer(
        "process_id", None, "Which one, from 0; with --coordinator.", lower_bound=0
    )


@contextlib.contextmanager
def processes() -> Iterator[None]:
    """Makes this process one of several if the flags ask for it; see `exit_all_on_error`."""
    # Importing JAX is slow.
    from ant_jax.runtime import connection
    from ant_jax.runtime.logs import quiet_console
    from ant_jax.runtime.process_failure import exit_all_on_error

    quiet_console()
    by_hand = [flags.FLAGS[name].value for name in ("coordinator", "num_processes", "process_id")]
    if flags.FLAGS.distributed or any(value is not None for value in by_hand):
        try:
            connection.initialize(*by_hand)
        except ValueError as error:
            refuse(error)
    with exit_all_on_error():
        yield


def parse_flags(arguments: Sequence[str]) -> list[str]:
    """Parses the flags; returns the other arguments."""
    try:
        return flags.FLAGS(arguments)
    except (flags.Error, *_BAD_OVERRIDE) as error:
        _refuse_flags(error)


def refuse(problem: object) -> NoReturn:
    """Ends the program with one line about a mistake of its user."""
    sys.exit(f"error: {problem}")


def _refuse_flags(error) -> NoReturn:
    """Refuses a wrong setting, or else says what is wrong in the words of the error."""
    config = _parser.config
    if problem := config and _problem(_settings_in(sys.argv), config, error):
        refuse(f"{problem} (docs/settings.md has every setting)")
    if isinstance(error, flags.UnrecognizedFlagError):
        refuse(f"unknown flag --{error.flagname}{_hint(error.flagname, config)}")
    message = " ".join(str(error).split())
    if isinstance(error, flags.Error):
        message = message.removeprefix("flag ")
        default = f"--config={config_file.DEFAULT}: "
        refuse(message if _has_config(sys.argv) else message.removeprefix(default))
    refuse(f"--config: {message} (docs/settings.md has every setting)")


def _hint(flag, config):
    """Which flag may have been meant by an unknown one."""
    known = {} if config is None else config_lib.settings_of_config(config)
    keys = {} if config is None else config_lib.component_names()
    found = [flag] if flag in known else [key for key, group in keys.items() if group == flag]
    if found := found or [name for name in known if _leaf(name) == flag]:
        given = re.search(rf" --?{re.escape(flag)}[= ](?!-)(\S*)", " ".join(sys.argv))
        value = given[1] if given else "VALUE"
        return f"; write {' or '.join(f'--config.{name}={value}' for name in found)}"
    names = {each.name: each.name for each in flags.FLAGS.get_key_flags_for_module(sys.argv[0])}
    for name in known:
        names[f"config.{name}"] = f"config.{name}"
        # Of equal names, that of the group that comes first.
        names.setdefault(_leaf(name), f"config.{name}")
    near = difflib.get_close_matches(flag, names, 1)
    return f"; did you mean --{names[near[0]]}?" if near else "; --help lists the flags"


def _problem(given, config, error):
    """What is wrong with the settings of a command line, as far as one of them shows it."""
    known, keys = config_lib.settings_of_config(config), config_lib.component_names()
    groups = {group.name for group in config_lib.GROUPS if group.name}
    wrong = re.match(r"flag --config\.([\w.]+)=", str(error))
    for name, value in given.items():
        if name in groups:
            key = next((key for key, group in keys.items() if group == name), None)
            way = f"--config.{key}={value}" if key else f"--config.{name}.SETTING=VALUE"
            return f"config.{name} is a group of settings: write {way}"
        if name not in known:
            return config_lib.unknown_setting(name, known)
        if wrong and wrong[1] == name:
            return f"config.{name} must be {known[name].check.allowed}, got {value!r}"
    return None


def config_of(workdir: Path | None) -> tuple[ConfigDict, Path | None]:
    """The config of the command line; without ``--config``, that of the run in the workdir.

    Returns:
      The config, and the file that it comes from if that is not of ``--config``.
    """
    from ant_jax import workdir as workdir_lib

    flag = flags.FLAGS["config"]
    if not flag.using_default_value:
        return flags.FLAGS.config, None
    saved = None if workdir is None else workdir_lib.load_config(workdir)
    if workdir is None or saved is None:
        return flags.FLAGS.config, Path(config_flags.get_config_filename(flag))
    config_lib.validate(saved)
    file = workdir / "config.json"
    try:
        with saved.ignore_type():
            # A whole number in the file may be a fraction now.
            config_lib.update(saved, config_flags.get_override_values(flag))
    except _BAD_OVERRIDE as error:
        refuse(f"{file} does not have what is set by hand: {error}")
    return saved, file


def usable_workdir(name: str | None) -> Path:
    """The workdir; the default name has the config file, and what the command line changes in it.

    Raises:
      ConfigError: if no file can be written there.
    """
    flag = flags.FLAGS["config"]
    if name is None:
        config_lib.validate(flags.FLAGS.config)
        name, former = (f"runs/{_name_of_run(flag, names)}" for names in (_short_name, _full_name))
        # Names used to have the groups of all settings.
        name = former if os.path.exists(former) and not os.path.exists(name) else name
    workdir = user_path(name)
    above = next(each for each in (workdir, *workdir.absolute().parents) if os.path.exists(each))
    if not above.is_dir():
        raise ConfigError(f"--workdir={name}: {above} is not a folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ConfigError(f"--workdir={name}: nothing can be written in {above}")
    return workdir


# The path of the data may change, but other data are another run.
_PLACES = {"data.dir", "data.file"}

# In bytes: a name of a folder has at most 255.
_LONGEST = 200


def _name_of_run(flag, setting_name):
    """A name that differs between runs of which none can go on as the other."""
    config, read = flag.value, config_flags.get_config_filename(flag)
    file, _, argument = read.partition(":")
    tasks = [config.method.name, config.clusters.name]
    others = [word for word in argument.split(",") if word and word not in tasks]
    plain = config_lib.flatten(config_file.read(read))
    in_name = {"method.name", "clusters.name", "seed"} | config_lib.may_change(config)
    known = (config_lib.settings_of_config(config).keys() - in_name) | _PLACES
    changes = {
        name: value
        for name, value in sorted(config_flags.get_override_values(flag).items())
        if name in known and value != plain.get(name)
    }
    tasks = [task.rpartition(":")[2] for task in tasks]
    changed = config_lib.in_words(config, changes, setting_name)
    name = "-".join([Path(file).stem, *others, *tasks, str(config.seed), *changed])
    if len(name.encode()) > _LONGEST:
        digest = hashlib.sha256(name.encode()).hexdigest()[:8]
        name = f"{name.encode()[:_LONGEST].decode(errors='ignore')}-{digest}"
    return name


def _leaf(setting):
    return setting.rpartition(".")[2]


def _full_name(setting):
    return setting


def _short_name(setting):
    """The setting without its group if all components share it; of a component's name, the group.

    It does not depend on the components of a run, so that it is the same for all runs of a sweep.
    """
    components = config_lib.component_names()
    if setting in components:
        return components[setting]
    leaf = _leaf(setting)
    alike = [name for name in (*config_lib.common_setting_names(), *_PLACES) if _leaf(name) == leaf]
    return leaf if alike == [setting] and leaf not in components.values() else setting


def settings_to_compare(config: ConfigDict, workdir: Path | None, **named: Any) -> dict[str, Any]:
    """Flags, settings and versions, which must be equal in all processes of a run.

    Args:
      config: the run's config.
      workdir: of the run; None if there is none.
      **named: other flags.
    """
    from ant_jax.runtime import versions

    own = config_lib.per_process_settings(config)
    return {
        "--workdir": workdir and str(workdir.absolute()),
        **{f"--{name}": value for name, value in named.items()},
        **{
            f"config.{name}": value
            for name, value in config_lib.flatten(config).items()
            if name not in own
        },
        **versions.in_use(),
    }


def expected_errors() -> tuple[type[Exception], ...]:
    """The errors whose message is enough for a user."""
    from ant_jax.data import ExampleError
    from ant_jax.runtime.checkpoint import CheckpointError
    from ant_jax.runtime.extras import MissingExtraError
    from ant_jax.runtime.lock import InUseError
    from ant_jax.runtime.processes import DisagreementError

    ours = (ConfigError, CheckpointError, DisagreementError, ExampleError, InUseError)
    return (*ours, MissingExtraError, OSError, FloatingPointError)


@contextlib.contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Exits with the message of an expected error; other errors keep their traceback."""
    try:
        yield
    except expected_errors() as error:
        refuse(words_of(error))
