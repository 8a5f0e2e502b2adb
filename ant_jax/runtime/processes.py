"""Several processes at one run: how they connect, agree, wait for each other, and end together.

With one process all of it does nothing.
"""

import contextlib
import errno
import ipaddress
import itertools
import json
import multiprocessing
import os
import socket
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import logging

# The store that all processes read and write has no public name in JAX.
from jax._src import distributed

from ant_jax.runtime import signals

_MEETING_SECONDS = 300  # until all processes must be there
_HEARTBEAT_SECONDS = 30  # of silence, after which a process counts as dead
_WATCH_SECONDS = 1.0  # between looks at whether another process has failed
_FAREWELL_SECONDS = 10  # that a failing process waits until all know why
_SHARED_SECONDS = 60  # until a network disk must show what another machine wrote
_SLICE_MS = 500  # of a wait, after which Python looks whether a signal has come
_LISTED = 8  # differences that are named

_FAILED = "ant_jax/failed"
_names = itertools.count()
_read: list[str] = []  # broadcasts, which a process has read when it comes to the next `all_gather`


class DisagreementError(RuntimeError):
    """The processes of a run differ in what must be the same."""


def initialize(
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
    told = {
        "--coordinator": coordinator,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    missing = [name for name, value in told.items() if value is None]
    if 0 < len(missing) < len(told):
        raise ValueError(
            f"several processes without --distributed need {', '.join(missing)} too: each gets the "
            "same --coordinator and --num_processes, and a --process_id of its own"
        )
    by_hand = not missing
    bind = None
    if by_hand:
        host, port = _host_and_port(coordinator)
        if not 0 <= process_id < num_processes:
            raise ValueError(
                f"--process_id={process_id} must be from 0 to --num_processes={num_processes} - 1"
            )
        if process_id == 0:
            bind = _bind_address(host, port)
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
            coordinator_bind_address=bind,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        hint = "" if by_hand else " (neither a Cloud TPU slice nor SLURM? see --coordinator)"
        raise ValueError(f"the processes can't connect: {error}{hint}") from error
    finally:
        late.cancel()


def _host_and_port(coordinator):
    host, _, port = coordinator.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    if not bare or (":" in bare) == (bare == host) or not _is_port(port):
        raise ValueError(
            f"--coordinator={coordinator!r} must be HOST:PORT of process 0, of IPv6 [HOST]:PORT"
        )
    return bare, int(port)


def _is_port(text):
    return text.isascii() and text.isdigit() and 0 < int(text) < 65536


def _bind_address(host: str, port: int) -> str:
    """Where process 0 listens: at the address that all are told, if that is one of this machine's.

    Behind a router that translates addresses it is not; and a name that means several addresses, or
    that of the machine itself alone, may mean another one elsewhere. Then it is all addresses.

    Raises:
      ValueError: if the name is unknown or the port taken, where JAX ends by a segmentation fault.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ValueError(f"--coordinator: {host}: {error.strerror}") from error
    addresses = list(dict.fromkeys(entry[4][0] for entry in found))
    local = [address for address in addresses if _can_listen(address, port)]
    loopback = [address for address in local if ipaddress.ip_address(address).is_loopback]
    if local and (host == "localhost" or addresses == [host]):
        address = local[0]
    elif len(local) == 1 and not loopback:
        (address,) = local
    else:
        logging.warning(
            "--coordinator: %s is not one address of this machine; listening on all of them", host
        )
        address = "::" if _can_listen("::", port) else "0.0.0.0"
        _can_listen(address, port)
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _can_listen(address, port):
    """Whether an address is this machine's."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        socket.create_server((address, port), family=family).close()
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            raise ValueError(f"--coordinator: port {port} of this machine: {error}") from error
        return False
    return True


def _give_up(coordinator):
    where = coordinator or "process 0"
    signals.say(
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
    return distributed.global_state.process_id == 0


def broadcast_from_first(function: Callable[[], Any]) -> Any:
    """What a function returns in process 0, in every process; something that JSON can hold.

    Where it raises, the others end by `exit_all_on_error`.
    """
    # Not by JAX, which would ask for the devices, and wait for those of the others.
    if distributed.global_state.num_processes == 1:
        return function()
    name = f"ant_jax/broadcast/{next(_names)}"
    if is_first():
        distributed.global_state.client.key_value_set(name, json.dumps(function()))
        _read.append(name)
    return json.loads(_get(name))


def all_gather(value: Any) -> list[Any]:
    """What each process gives, in their order, in every process; something that JSON can hold.

    Returns when every process has come here, however long that takes.
    """
    state = distributed.global_state
    if state.num_processes == 1:
        return [value]
    name = f"ant_jax/gathered/{next(_names)}"
    state.client.key_value_set(f"{name}/{state.process_id}", json.dumps(value))

    def everything():
        values = [json.loads(_get(f"{name}/{process}")) for process in range(state.num_processes)]
        # All are here, so all have read these; in a long run they would add up.
        while _read:
            state.client.key_value_delete(_read.pop())
        state.client.key_value_delete(name)
        return values

    return broadcast_from_first(everything)


def barrier() -> None:
    """Returns when every process has come here, however long that takes."""
    all_gather(None)


def _get(name):
    # In one long wait Python would not see signals. A process that dies ends it.
    while True:
        try:
            return distributed.global_state.client.blocking_key_value_get(name, _SLICE_MS)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def assert_equal(facts: Callable[[], Mapping[str, Any]]) -> None:
    """Checks that all processes come here with the same.

    Args:
      facts: gives what must be the same, by names for the message.

    Raises:
      DisagreementError: naming what differs, and which process has what; in process 0. The others
        end by `exit_all_on_error`.
    """
    if distributed.global_state.num_processes == 1:
        return
    everywhere = all_gather({name: repr(value) for name, value in facts().items()})

    def check():
        if found := differences(everywhere):
            more = f"; and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
            raise DisagreementError(
                f"the processes of a run must have the same: {'; '.join(found[:_LISTED])}{more}"
            )

    broadcast_from_first(check)


def differences(everywhere: Sequence[Mapping[str, str]]) -> list[str]:
    """What differs between processes, and which ones have what."""
    found = []
    for name in dict.fromkeys(itertools.chain(*everywhere)):
        having = {}
        for process, facts in enumerate(everywhere):
            having.setdefault(facts.get(name, "not set"), []).append(process)
        if len(having) > 1:
            each = (f"{value} in {_processes(some)}" for value, some in having.items())
            found.append(f"{name}: {', '.join(each)}")
    return found


def _processes(numbers):
    """Neighbours as a range."""
    runs = itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    ends = [[number for _, number in run] for _, run in runs]
    words = [f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in ends]
    return f"process{'es' * (len(numbers) > 1)} {', '.join(words)}"


def wait_for_file(path: Path) -> bool:
    """Whether a file that another process has written is there, which network disks show late."""
    end = time.monotonic() + (_SHARED_SECONDS if distributed.global_state.num_processes > 1 else 0)
    while True:
        # A listing, because what asks for a file by name may be answered from memory.
        with contextlib.suppress(FileNotFoundError):
            if path.name in os.listdir(path.parent):
                return True
        if time.monotonic() > end:
            return False
        time.sleep(0.2)


def check_shared(folder: Path) -> None:
    """Raises an OSError, after a minute, if the processes don't share the disk of a folder.

    A DisagreementError, if there are others to which this one is not connected.
    """
    if distributed.global_state.num_processes == 1:
        if jax.process_count() > 1:
            # Every one would take itself for process 0.
            raise DisagreementError(
                "this is one of several processes, as of a Cloud TPU slice, and they are not "
                "connected: start each one with --distributed"
            )
        return

    def mark():
        path = folder / f".shared-{uuid.uuid4().hex}"
        folder.mkdir(parents=True, exist_ok=True)
        path.touch()
        return str(path.absolute())

    path = Path(broadcast_from_first(mark))
    # Where the working directories differ, a relative folder is another one.
    if not wait_for_file(folder.absolute() / path.name):
        raise OSError(
            f"{folder.absolute()} on {socket.gethostname()} is not {path.parent} of process 0: it "
            "must be on a disk that all processes share, such as NFS or a mounted bucket"
        )
    barrier()
    if is_first():
        path.unlink()


@contextlib.contextmanager
def exit_all_on_error() -> Iterator[None]:
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
        with signals.listening() as stop:
            stop.last_words = _last_words
            yield
        barrier()
    except BaseException as error:
        done.set()
        watcher.join()
        if asked := signals.raised():
            _tell(f"was asked to stop by {asked}")
            _farewell()
            raise
        _fail(error)
    done.set()
    watcher.join()


def _watch(done):
    while not done.wait(_WATCH_SECONDS):
        reason = _reason()
        if reason is not None:
            signals.say(reason)
            _leave()


def _reason() -> str | None:
    # It is an error to ask for what nobody has set; JAX itself ends us if nobody answers.
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        return distributed.global_state.client.key_value_try_get(_FAILED)
    return None


def _fail(error):
    if isinstance(error, SystemExit):
        reason = str(error.code)
    else:
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, jax.errors.JaxRuntimeError):
            reason += "; if a connection broke, another process has died"
    if not _tell(f"failed: {reason}"):
        # Another one failed first, and this is what came of it; or nobody is left to tell.
        reason = _reason() or reason
    elif not isinstance(error, SystemExit):
        signals.say("".join(traceback.format_exception(error)))
    signals.say(reason)
    _leave()


def _tell(what):
    """Leaves word for the others; False if another process was first, or nobody is left."""
    state = distributed.global_state
    words = f"process {state.process_id} on {socket.gethostname()} {what}"
    try:
        state.client.key_value_set(_FAILED, words)
    except jax.errors.JaxRuntimeError:
        return False
    return True


def _last_words(signal):
    _tell(f"was asked to stop by {signal}")
    _let_others_go_first(2 * _WATCH_SECONDS)


def _farewell():
    """Waits until all know why, or for some seconds."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        distributed.global_state.client.wait_at_barrier("ant_jax/leave", 1000 * _FAREWELL_SECONDS)
    _let_others_go_first(_WATCH_SECONDS)


def _let_others_go_first(seconds):
    """JAX would end them, with pages of C++, if its service ended before them."""
    if is_first():
        time.sleep(seconds)


def _leave():
    """Ends this process, at once, for it may be stuck."""
    _farewell()
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(1)
