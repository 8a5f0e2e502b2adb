"""Trains, samples, evaluates, encodes, exports: ``python -m ant_jax.main --config FILE``.

``ant-jax --config FILE`` is the same. Any setting is a flag, ``--config.NAME=VALUE``;
docs/settings.md lists them.
"""

import importlib
import re
import signal
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Until the imports below are done, Ctrl-C exits without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from ant_jax.runtime import extras

if _error := extras.missing("training"):
    if {"--help", "-h", "--helpfull", "--helpshort"} & set(sys.argv):
        print(f"{__doc__}\nIt needs more packages: {_error}. Then --help lists the flags.")
        print("Without them you have the methods for your own loop: python -m pydoc ant_jax.mtl")
        sys.exit()
    sys.exit(f"error: {_error}")

from absl import app, flags, logging

from ant_jax import cli
from ant_jax import config as config_lib
from ant_jax.runtime import signals

# What a stopped program tells its user. Each mode is a module and its function of that name.
_MODES = {
    "train": "no step is lost; run the same command again to resume",
    "sample": "finished samples are kept; run the same command again to resume",
    "evaluate": "finished samples are kept; run the same command again to resume",
    "encode": "finished shards are kept; run the same command again to resume",
    "export": "nothing was written",
    "report": "nothing was written",
}
cli.define_config()
cli.define_processes()
# --help lists these too.
flags.adopt_module_key_flags(cli)
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Folder of the run; default runs/CONFIG-METHOD-CLUSTERS-SEED, followed by other settings of "
    "the command line that a run cannot change.",
)
_MODE = flags.DEFINE_enum("mode", "train", list(_MODES), "What to do.")
_STEP = flags.DEFINE_string(
    "step",
    None,
    "Step of the checkpoint to use, or 'best', which config.evaluation.every keeps; default the "
    "newest.",
)
_LAYOUT = flags.DEFINE_enum(
    "layout", "published", ["published", "diffusers"], "What --mode export writes."
)
flags.register_validator(
    "workdir", lambda workdir: workdir != "", message="it is empty: leave it out for the default"
)
flags.register_validator(
    "step",
    lambda step: step in (None, "best") or re.fullmatch("[1-9][0-9]*", step),
    message="it must be the step of a checkpoint, or 'best'",
)
flags.register_multi_flags_validator(
    ["mode", "step"],
    lambda given: given["step"] is None or given["mode"] not in ("train", "encode", "report"),
    message="it is for --mode sample, evaluate and export",
)
flags.register_multi_flags_validator(
    ["mode", "layout"],
    lambda given: given["layout"] == "published" or given["mode"] == "export",
    message="it is for --mode export",
)


def main(argv: list[str]) -> None:
    """Dispatches to the mode."""
    if len(argv) > 1:
        ways = [f"--config={argv[1]}"] * argv[1].partition(":")[0].endswith(".py")
        ways += [f"--mode={argv[1]}"] * (argv[1] in _MODES)
        way = ways[0] if ways else "settings as --config.NAME=VALUE; --help lists the flags"
        cli.refuse(f"unknown argument {argv[1]!r}: write {way}")
    with signals.ending_the_program(_MODES[_MODE.value]), cli.processes(), cli.errors_in_one_line():
        _run(_MODE.value)


def _run(name):
    from ant_jax.runtime import compilation_cache, garbage, processes

    # Imported here, so that --help and errors in flags are fast, and no mode imports what only
    # another needs.
    mode = getattr(importlib.import_module(f"ant_jax.{name}"), name)
    garbage.collect_less()
    # Latents do not belong to a run.
    workdir = None if name == "encode" else cli.usable_workdir(_WORKDIR.value)
    if name == "report":
        # It shows the config that the workdir records.
        mode(workdir)
        return
    config, file = cli.config_of(workdir)
    step = _STEP.value if _STEP.value in (None, "best") else int(_STEP.value)
    processes.assert_equal(
        lambda: cli.settings_to_compare(config, workdir, mode=name, step=step, layout=_LAYOUT.value)
    )
    config_lib.validate(config)
    if workdir is None:
        compilation_cache.enable()
        mode(config)
        return
    if name == "train" or (workdir / "config.json").exists():
        # Otherwise the error that there is no run is all that there is to say.
        origin = f", settings of {file}, because there is no --config" if file else ""
        logging.info("%s in %s%s", name, workdir, origin)
    if processes.is_first() and name != "export":
        for line in config_lib.warnings_of(config, training=name == "train"):
            logging.warning("%s", line)
    compilation_cache.enable()
    processes.check_shared(workdir)
    more = {"export": [step, _LAYOUT.value], "train": []}
    mode(config, workdir, *more.get(name, [step]))


if __name__ == "__main__":
    app.run(main, flags_parser=cli.parse_flags)
