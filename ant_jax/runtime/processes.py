"""Several processes at one run: how they connect, agree, wait for each other, and end together.

With one process all of it does nothing.
"""

import contextlib
import itertools
import json
import os
import socket
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

# The store that all processes read and write has no public name in JAX.
from jax._src import distributed

_SHARED_SECONDS = 60  # until a network disk must show what another machine wrote
_SLICE_MS = 500  # of a wait, after which Python looks whether a signal has come
_LISTED = 8  # differences that are named

_names = itertools.count()
_read: list[str] = []  # broadcasts, which a process has read when it comes to the next `all_gather`


class DisagreementError(RuntimeError):
    """The processes of a run differ in what must be the same."""


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
