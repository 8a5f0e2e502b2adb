"""Starts commands, but does not run what they do: `tests/test_docs.py` uses this.

python tests/commands.py FILE

FILE has a JSON list for each page: its commands, each a list of what stands behind ``python``. The
commands of a page follow each other in one folder. The program prints JSON lists that have "" for
each right command, and the fault of each wrong one.
"""

import argparse
import contextlib
import importlib.util
import io
import json
import os
import re
import runpy
import sys
import tempfile
from pathlib import Path

import absl.app
import matplotlib.pyplot  # noqa: F401, because many commands need it, and it imports slowly
from absl import flags

from ant_jax import encode, evaluate, experiment, export, report, sample, train
from ant_jax import workdir as workdir_lib
from ant_jax.runtime import compilation_cache, connection

ROOT = Path(__file__).parents[1]
# A module without these does its work at once.
_PARSES = re.compile(r"app\.run\(|ArgumentParser\(|runner\.start\(")
_TAKEN = "the arguments are right"


def _build(config, workdir=None, *_):
    """Instead of a mode: builds the network and the tasks. Later commands find the run's config."""
    channels = 4 if config.autoencoder.name.startswith("KL") else 3
    if config.data.name in ("digits", "idx"):
        channels = 1
    experiment.build(config, channels, 10)
    if workdir is not None:
        workdir.mkdir(parents=True, exist_ok=True)
        workdir_lib.save_config(config, workdir)


_parse_args = argparse.ArgumentParser.parse_args


def _only_parse(parser):
    """Instead of `parse_args`."""
    _parse_args(parser)
    sys.exit(_TAKEN)


def _run(main, argv=None, flags_parser=None):
    """Instead of `app.run`."""
    rest = (flags_parser or flags.FLAGS)(sys.argv)
    if main.__globals__["__spec__"].name == "ant_jax.main":
        main(rest)
    elif "preset" in flags.FLAGS:
        flag = flags.FLAGS["preset"]
        known = flag.help.rpartition(": ")[2].rstrip(".").split(", ")
        if known != [""] and flag.value not in known:
            sys.exit(f"--preset={flag.value}: there are only {known}")
    sys.exit(_TAKEN)


def _wrong(arguments):
    """What is wrong with a command, or ""."""
    first, *rest = arguments
    if first != "-m":
        return "" if (ROOT / first).is_file() else f"no file {first}"
    sys.argv = rest
    said = io.StringIO()
    try:
        spec = importlib.util.find_spec(rest[0])
        if spec is None:
            return f"no module {rest[0]}"
        if spec.submodule_search_locations:
            spec = importlib.util.find_spec(f"{rest[0]}.__main__")
        if not _PARSES.search(Path(spec.origin).read_text()):
            return f"it takes no arguments: {rest[1:]}" if rest[1:] else ""
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        return ""
    except SystemExit as end:
        return "" if end.code == _TAKEN else f"{end.code} {said.getvalue()}"
    # Everything else is wrong with the command too.
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def main(pages):
    """Each command is a process, because flags can be defined once."""
    train.train = encode.encode = export.export = sample.sample = evaluate.evaluate = _build
    report.report = lambda workdir: None
    connection.initialize = lambda *_: None
    compilation_cache.enable = lambda: None
    absl.app.run = _run
    argparse.ArgumentParser.parse_args = _only_parse
    found = []
    for commands in pages:
        found.append([])
        with tempfile.TemporaryDirectory() as folder:
            for arguments in commands:
                there, here = os.pipe()
                process = os.fork()
                if not process:
                    os.chdir(folder)
                    sys.path[0] = str(ROOT)
                    os.write(here, _wrong(arguments).encode())
                    os._exit(0)
                os.close(here)
                with open(there) as answer:
                    found[-1].append(answer.read())
                os.waitpid(process, 0)
    print(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
