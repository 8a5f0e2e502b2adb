"""Several processes at one run: how they meet, agree, wait for each other, and end together.

With one process all of it does nothing.
"""

import contextlib
import itertools
import json
import multiprocessing
import os
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

# The store that all processes read and write has no public name in JAX.
from jax._src import distributed

_MEETING_SECONDS = 300  # until all processes must be there
_HEARTBEAT_SECONDS = 30  # of silence, after which a process counts as dead
_WATCH_SECONDS = 1.0  # between looks at whether another process has failed
_FAREWELL_SECONDS = 10  # that a failing process waits until all know why
_SHARED_SECONDS = 60  # until a network disk must show what another machine wrote
_FOR_EVER_MS = 30 * 24 * 3600 * 1000  # a process that dies ends the wait

_FAILED = "ant_jax/failed"
_names = itertools.count()


def meet(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Makes this process one of several; must come before anything asks JAX for devices.

    Args:
      coordinator: HOST:PORT of process 0, as all processes reach it. None, and the others too,
        where a Cloud TPU slice or SLURM says it.
      num_processes: how many there are.
      process_id: which one this is, from 0.

    Raises:
      ValueError: if nothing says who the others are, or what says it makes no sense.

    Where the processes have not come together within 5 minutes, this one ends with a message.
    """
    by_hand = coordinator is not None
    if by_hand:
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdigit():
            raise ValueError(f"--coordinator={coordinator!r} must be HOST:PORT of process 0")
        if not 0 <= process_id < num_processes:
            raise ValueError(
                f"--process_id={process_id} must be from 0 to --num_processes={num_processes} - 1"
            )
        if process_id == 0:
            _check_free(int(port))
    # It would take SIGTERM, and nothing here asks it whether one has come.
    jax.config.update("jax_enable_preemption_service", False)
    # JAX would end the process too, by a signal and with pages of C++.
    late = threading.Timer(_MEETING_SECONDS, _give_up, [coordinator])
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            local_device_ids=None if by_hand else _gpus_of_the_node(),
            cluster_detection_method="deactivate" if by_hand else None,
            initialization_timeout=2 * _MEETING_SECONDS,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        hint = "" if by_hand else " (neither a Cloud TPU slice nor SLURM? see --coordinator)"
        raise ValueError(f"the processes can't meet: {error}{hint}") from error
    finally:
        late.cancel()


def _check_free(port):
    """Where the port is taken, JAX ends by a segmentation fault."""
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        raise ValueError(f"--coordinator: port {port} of this machine: {error}") from error


def _give_up(coordinator):
    where = coordinator or "process 0"
    _say(
        f"the processes have not come together at {where} within {_MEETING_SECONDS} s: does every "
        "one of them run, with the same number of processes, and reach that address?"
    )
    os._exit(1)


def _gpus_of_the_node():
    """Under SLURM JAX takes one GPU a process; a process that is alone on its node has them all."""
    tasks, nodes, gpus = map(
        os.environ.get, ("SLURM_NTASKS", "SLURM_STEP_NUM_NODES", "SLURM_GPUS_ON_NODE")
    )
    return list(range(int(gpus))) if gpus and tasks == nodes else None


def is_first() -> bool:
    """Whether this is process 0, which writes what is written once."""
    return jax.process_index() == 0


def decide(function: Callable[[], Any]) -> Any:
    """What a function returns in process 0, in every process; something that JSON can hold.

    Where it raises, the others end by `ending_together`.
    """
    if jax.process_count() == 1:
        return function()
    client, name = distributed.global_state.client, f"ant_jax/decided/{next(_names)}"
    if is_first():
        client.key_value_set(name, json.dumps(function()))
    return json.loads(client.blocking_key_value_get(name, _FOR_EVER_MS))


def wait() -> None:
    """Returns when every process has come here, however long that takes."""
    if jax.process_count() > 1:
        name = f"ant_jax/wait/{next(_names)}"
        distributed.global_state.client.wait_at_barrier(name, _FOR_EVER_MS)


def seen(path: Path) -> bool:
    """Whether a file that another process has written is there, which network disks show late."""
    end = time.monotonic() + (_SHARED_SECONDS if jax.process_count() > 1 else 0)
    while True:
        # A listing, because what asks for a file by name may be answered from memory.
        with contextlib.suppress(FileNotFoundError):
            if path.name in os.listdir(path.parent):
                return True
        if time.monotonic() > end:
            return False
        time.sleep(0.2)


def check_shared(folder: Path) -> None:
    """Raises an OSError, after a minute, if the processes don't share the disk of a folder."""
    if jax.process_count() == 1:
        return

    def mark():
        path = folder / f".shared-{uuid.uuid4().hex}"
        folder.mkdir(parents=True, exist_ok=True)
        path.touch()
        return str(path.absolute())

    path = Path(decide(mark))
    # Where the working directories differ, a relative folder is another one.
    if not seen(folder.absolute() / path.name):
        raise OSError(
            f"{folder.absolute()} on {socket.gethostname()} is not {path.parent} of process 0: it "
            "must be on a disk that all processes share, such as NFS or a mounted bucket"
        )
    wait()
    if is_first():
        path.unlink()


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Ends every process, with the reason, a second or two after one of them has failed.

    Without it the others would wait in their next collective, on some devices for ever. A process
    that is killed gives no reason: JAX ends the others 30 s after its last sign of life, and at
    once if it was process 0. At the end each process waits for the others.
    """
    if distributed.global_state.num_processes == 1:
        yield
        return
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=[done], daemon=True)
    watcher.start()
    try:
        yield
        wait()
    except BaseException as error:
        done.set()
        watcher.join()
        _fail(error)
    done.set()
    watcher.join()


def _watch(done):
    while not done.wait(_WATCH_SECONDS):
        reason = _reason()
        if reason is not None:
            _say(reason)
            _leave()


def _reason() -> str | None:
    # It is an error to ask for what nobody has set; JAX itself ends us if nobody answers.
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        return distributed.global_state.client.key_value_try_get(_FAILED)
    return None


def _fail(error):
    what = f"process {distributed.global_state.process_id} on {socket.gethostname()} failed"
    if isinstance(error, SystemExit):
        reason = str(error.code)
    else:
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, jax.errors.JaxRuntimeError):
            reason += "; if a connection broke, another process has died"
    try:
        distributed.global_state.client.key_value_set(_FAILED, f"{what}: {reason}")
    except jax.errors.JaxRuntimeError:
        # Another one failed first, and this is what came of it; or nobody is left to tell.
        _say(_reason() or reason)
    else:
        if not isinstance(error, SystemExit):
            traceback.print_exception(error)
        _say(reason)
    _leave()


def _leave():
    """Ends this process when all know why, or some seconds later; at once, for it may be stuck."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        distributed.global_state.client.wait_at_barrier("ant_jax/leave", 1000 * _FAREWELL_SECONDS)
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(1)


def _say(message):
    print(message, file=sys.stderr, flush=True)
