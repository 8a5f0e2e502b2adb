"""Programs in processes of their own, which are forked from one that has imported everything."""

import atexit
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
_SERVER = """
import atexit, json, logging, os, runpy, sys, threading
import jax, matplotlib.pyplot, orbax.checkpoint, pytest, scipy.linalg
import ant_jax.cli, ant_jax.encode, ant_jax.evaluation_in_training, ant_jax.export, ant_jax.train
import ant_jax.runtime.garbage

# The import of orbax gives the root logger a handler, which a program does not have at its start.
logging.root.handlers.clear()

# As in conftest.py.
ant_jax.measuring._VALIDATION_IMAGES = ant_jax.evaluate._LEVELS = 20
ant_jax.runtime.garbage.collect_less()

def start(arguments, said, flags, together):
    process = os.fork()
    if process:
        return process
    os.environ["XLA_FLAGS"] = flags
    os.dup2(os.open(said, os.O_CREAT | os.O_WRONLY), 2)
    os.dup2(2, 1)
    sys.argv = arguments[1:] if arguments[0] == "-m" else arguments
    try:
        if arguments[0] == "-m":
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = os.path.dirname(os.path.abspath(arguments[0]))
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            print(end.code, file=sys.stderr, flush=True)
            os._exit(1)
    if together:
        sys.exit()
    # Ends as Python does, but frees no memory, which takes half a second.
    threading._shutdown()
    atexit.unregister(jax._src.api.clean_up)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)

for line in sys.stdin:
    programs, said, flags, together = json.loads(line)
    started, ended = [], []
    for i, arguments in enumerate(programs):
        started.append(start(arguments, f"{said}/{i}", flags, together))
        if not together:
            ended.append(os.waitpid(started[-1], 0)[1])
    if together:
        ended = [os.waitpid(process, 0)[1] for process in started]
    print(json.dumps([os.waitstatus_to_exitcode(each) for each in ended]), flush=True)
"""


@functools.cache
def _server():
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVER],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    atexit.register(process.wait)
    atexit.register(process.stdin.close)
    return process


def run(
    programs: Sequence[Sequence[str]], devices: int, together: bool = False, seconds: float = 200
) -> list[tuple[int, str]]:
    """Runs programs one after the other, or together.

    Args:
      programs: of each, what stands behind ``python``: a file or -m and a module, and arguments.
      devices: how many CPU devices each has.
      together: whether all start at once.
      seconds: after which they are killed.

    Returns:
      The exit status of each and what it has written.
    """
    server = _server()
    # The last of equal flags counts.
    flags = os.environ["XLA_FLAGS"] + f" --xla_force_host_platform_device_count={devices}"
    with tempfile.TemporaryDirectory() as said:
        killer = threading.Timer(seconds, os.killpg, (server.pid, signal.SIGKILL))
        killer.start()
        try:
            lines = [[str(each) for each in program] for program in programs]
            print(json.dumps([lines, said, flags, together]), file=server.stdin, flush=True)
            answer = server.stdout.readline()
        finally:
            killer.cancel()
        texts = [Path(said, str(i)).read_text() for i in range(len(programs))]
        if not answer:
            _server.cache_clear()
            raise TimeoutError(f"killed after {seconds} s: {texts}")
        return list(zip(json.loads(answer), texts, strict=True))


def free_address():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def pair(one, other):
    """Two programs that connect to each other, for `run`."""
    together = [f"--coordinator={free_address()}", "--num_processes=2"]
    return [[*each, *together, f"--process_id={i}"] for i, each in enumerate((one, other))]


def two(one, other):
    """Runs two processes that connect; [(exit status, what it has written)]."""
    return run(pair(one, other), devices=4, together=True)
