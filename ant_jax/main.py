"""Trains, samples, evaluates, encodes, exports: ``python -m ant_jax.main --config FILE``."""

import os
import signal
import sys
from pathlib import Path

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Without a word, until there is something to say: the imports below take their time.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from absl import app, flags, logging
from ml_collections import config_flags

from ant_jax import config as config_lib
from ant_jax import config_file
from ant_jax.config import ConfigError
from ant_jax.runtime import signals
from ant_jax.runtime.files import user_path

# What ml_collections raises where an override fits no setting.
_BAD_OVERRIDE = (AttributeError, KeyError, TypeError, ValueError)


class _ConfigFileParser(flags.ArgumentParser):
    def parse(self, argument):
        try:
            return config_file.read(argument)
        except OSError as error:
            # Of a flag, absl expects nothing else.
            raise ValueError(str(error)) from error


def _refuse(error):
    # An AttributeError of ml_collections has a KeyError in it, which would print as a literal.
    cause = error.args[0] if error.args and isinstance(error.args[0], KeyError) else error
    kind = "no such setting: " if isinstance(cause, KeyError) else ""
    message = " ".join(" ".join(map(str, cause.args)).split())
    sys.exit(f"--config: {kind}{message} (configs/digits.py has every setting)")


_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Config file; FILE:METHOD,CLUSTERS passes an argument to it."
)
# That of ml_collections looks for relative imports nowhere and tells of mistakes by tracebacks.
flags.FLAGS["config"].parser = _ConfigFileParser()
try:
    # Where --config is not given, this reads the file and applies the overrides.
    flags.set_default(_CONFIG, config_file.DEFAULT)
except flags.Error as error:
    sys.exit(str(error))
except _BAD_OVERRIDE as error:
    _refuse(error)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where the run lives; default runs/CONFIG-METHOD-CLUSTERS-SEED."
)
_MODE = flags.DEFINE_enum(
    "mode", "train", ["train", "sample", "evaluate", "encode", "export"], "What to do."
)
_STEP = flags.DEFINE_integer("step", None, "Checkpoint to use; default the newest.", lower_bound=1)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Whether this is one process of many, on a TPU slice or under SLURM."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of process 0, where neither a TPU slice nor SLURM tells."
)
_NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "How many; with --coordinator.", lower_bound=1
)
_PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "Which one, from 0; with --coordinator.", lower_bound=0
)
flags.register_validator(
    "workdir", lambda workdir: workdir != "", message="it is empty: leave it out for the default"
)
flags.register_multi_flags_validator(
    ["mode", "step"],
    lambda given: given["step"] is None or given["mode"] not in ("train", "encode"),
    message="it is for --mode sample, evaluate and export",
)

# What there is when a mode is asked to stop, and how to go on.
_HOW = {
    "train": "no step since the last checkpoint is lost; start again to go on",
    "sample": "what was drawn is kept; start again to go on",
    "evaluate": "what was drawn is kept; start again to go on",
    "encode": "the shards that are made are kept; start again to go on",
    "export": "nothing was written",
}


def main(argv: list[str]) -> None:
    """Dispatches to the mode."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}; settings are --config.NAME=VALUE")
    with signals.ending_the_program(_HOW[_MODE.value]):
        # Importing JAX takes its time.
        from ant_jax.runtime import processes
        from ant_jax.runtime.logs import quiet_console

        quiet_console()
        _meet(processes.initialize)
        with processes.exit_all_on_error():
            _run()


def _meet(meet):
    by_hand = (_COORDINATOR, _NUM_PROCESSES, _PROCESS_ID)
    missing = [f"--{flag.name}" for flag in by_hand if flag.value is None]
    if 0 < len(missing) < len(by_hand):
        sys.exit(
            f"several processes without --distributed need {', '.join(missing)} too: each gets the "
            "same --coordinator and --num_processes, and a --process_id of its own"
        )
    if _DISTRIBUTED.value or not missing:
        try:
            meet(*(flag.value for flag in by_hand))
        except ValueError as error:
            sys.exit(str(error))


def _run():
    from ant_jax.runtime import compilation_cache, processes

    mode = _imported_mode()
    config = _CONFIG.value
    if _MODE.value == "encode":
        # Latents belong to no run.
        _report_errors(processes.assert_equal, lambda: _said(config))
        compilation_cache.enable()
        _report_errors(mode, config)
        return
    from ant_jax import workdir as workdir_lib

    workdir = _report_errors(_usable_workdir, _WORKDIR.value or default_workdir(config))
    flag = flags.FLAGS["config"]
    saved = _report_errors(workdir_lib.load_config, workdir) if flag.using_default_value else None
    if saved is not None:
        # A workdir describes itself: without --config its own is meant.
        try:
            with saved.ignore_type():
                # A whole number in the file may be a fraction now.
                saved.update_from_flattened_dict(config_flags.get_override_values(flag))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            sys.exit(f"{workdir / 'config.json'} does not have what is set by hand: {error}")
        config = saved
        logging.info("settings: %s, and the command line", workdir / "config.json")
    logging.info("%s in %s", _MODE.value, workdir)
    _report_errors(processes.assert_equal, lambda: _said(config, workdir))
    _report_errors(config_lib.validate, config)
    if processes.is_first() and _MODE.value != "export":
        for line in config_lib.surprises(config, training=_MODE.value == "train"):
            logging.warning("%s", line)
    compilation_cache.enable()
    _report_errors(processes.check_shared, workdir)
    of_a_step = () if _MODE.value == "train" else (_STEP.value,)
    _report_errors(mode, config, workdir, *of_a_step)


def _usable_workdir(name):
    """The workdir; refused where what a mode writes in the end can't be written."""
    workdir = user_path(name)
    above = next(each for each in (workdir, *workdir.absolute().parents) if os.path.exists(each))
    if not above.is_dir():
        raise ConfigError(f"--workdir={name}: {above} is not a folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ConfigError(f"--workdir={name}: nothing can be written in {above}")
    return workdir


def _said(config, workdir=None):
    """What each process was told, which must be the same."""
    from ant_jax.runtime import versions

    settings = config_lib.flatten(config)
    return {
        "--mode": _MODE.value,
        "--step": _STEP.value,
        "--workdir": workdir and str(workdir.absolute()),
        **{
            f"config.{name}": value
            for name, value in settings.items()
            if not config_lib.is_of_a_process(name)
        },
        **versions.in_use(),
    }


def _imported_mode():
    # Imported late and alone, so that --help and a mistyped flag answer at once, and no mode waits
    # for what another needs.
    if _MODE.value == "train":
        from ant_jax.train import train as mode
    elif _MODE.value == "sample":
        from ant_jax.evaluate import sample as mode
    elif _MODE.value == "evaluate":
        from ant_jax.evaluate import evaluate as mode
    elif _MODE.value == "encode":
        from ant_jax.latents.encode import encode as mode
    else:
        from ant_jax.export import export as mode
    return mode


def _report_errors(function, *arguments):
    from ant_jax.data import ExampleError
    from ant_jax.runtime.checkpoint import CheckpointError
    from ant_jax.runtime.extras import MissingExtraError
    from ant_jax.runtime.lock import InUseError
    from ant_jax.runtime.processes import DisagreementError

    expected = (ConfigError, CheckpointError, ExampleError, OSError, FloatingPointError)
    expected += (DisagreementError, InUseError, MissingExtraError)
    try:
        return function(*arguments)
    except expected as error:
        # The message says it all; anything else is a surprise and keeps its traceback.
        sys.exit(f"{type(error).__name__}: {error}")


def _parse_flags(argv):
    try:
        return app.parse_flags_with_usage(argv)
    except _BAD_OVERRIDE as error:
        _refuse(error)


def default_workdir(config) -> str:
    """The workdir of a run that names none."""
    name = Path(config_flags.get_config_filename(flags.FLAGS["config"]).split(":")[0]).stem
    return f"runs/{name}-{config.method.name}-{config.clusters.cost}-{config.seed}"


if __name__ == "__main__":
    app.run(main, flags_parser=_parse_flags)
