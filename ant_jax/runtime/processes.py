"""How the processes of a run exchange values, wait for each other, and compare their settings.

With a single process these functions return at once.
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

# JAX has no public name for the key-value store that all processes share.
from jax._src import distributed

from ant_jax.runtime.files import make_folder

_SHARED_SECONDS = 60  # within which a network disk must show a file of another machine
_SLICE_MS = 500  # a long wait is split into waits of this length: Python handles signals between
_LISTED = 8  # differences that a message lists

_names = itertools.count()
_read: list[str] = []  # broadcasts; every process has read them when it calls `all_gather` next


class DisagreementError(RuntimeError):
    """Something that must be the same in all processes or devices of a run is not."""


def is_first() -> bool:
    """Whether this is process 0, which writes the files that a run writes once."""
    return distributed.global_state.process_id == 0


def client() -> Any:
    """JAX's client of the key-value store that the processes share.

    Raises:
      RuntimeError: if this process is not connected to others.
    """
    if distributed.global_state.client is None:
        raise RuntimeError("this process is not connected to the other processes of the run")
    return distributed.global_state.client


def broadcast_from_first(function: Callable[[], Any]) -> Any:
    """Calls a function in process 0 and returns its result in every process.

    The result must be a value that JSON can hold. If the function raises, `exit_all_on_error` ends
    the other processes.
    """
    # JAX's own broadcast would initialize the devices, and wait for those of the other processes.
    if distributed.global_state.num_processes == 1:
        return function()
    name = f"ant_jax/broadcast/{next(_names)}"
    if is_first():
        client().key_value_set(name, json.dumps(function()))
        _read.append(name)
    return json.loads(_get(name))


def all_gather(value: Any) -> list[Any]:
    """Returns the values of all processes, in their order, in every process.

    A value is one that JSON can hold. Waits for all processes, without a time limit.
    """
    state = distributed.global_state
    if state.num_processes == 1:
        return [value]
    name = f"ant_jax/gathered/{next(_names)}"
    client().key_value_set(f"{name}/{state.process_id}", json.dumps(value))

    def everything():
        values = [json.loads(_get(f"{name}/{process}")) for process in range(state.num_processes)]
        # All processes have called this, so all have read these. In a long run they would add up.
        while _read:
            client().key_value_delete(_read.pop())
        client().key_value_delete(name)
        return values

    return broadcast_from_first(everything)


def barrier() -> None:
    """Waits until all processes have called it, without a time limit."""
    all_gather(None)


def _get(name):
    # In one long wait Python would not handle signals. If a process dies, JAX ends the wait.
    while True:
        try:
            return client().blocking_key_value_get(name, _SLICE_MS)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def assert_equal(facts: Callable[[], Mapping[str, Any]]) -> None:
    """Checks that some values are the same in all processes.

    Args:
      facts: returns the values, by the names that the message uses.

    Raises:
      DisagreementError: in process 0, if a value differs; the message says which process has which
        value. `exit_all_on_error` ends the other processes.
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


def assert_replicas_equal(name: str, values: Sequence[Any]) -> None:
    """Checks that a value is the same on all devices of all processes.

    Args:
      name: that the message uses.
      values: one for each device of this process.

    Raises:
      DisagreementError: as `assert_equal` does; the devices count on from process to process.
    """
    everywhere = all_gather(list(values))

    def check():
        on_each = [{name: repr(value)} for values in everywhere for value in values]
        if found := differences(on_each, "device"):
            many = f" ({len(values)} in each process)" if len(everywhere) > 1 else ""
            raise DisagreementError(
                f"the devices of a run{many} must have the same: {found[0]}. One of them may be "
                "faulty: start the run again, and if this comes back, without that device"
            )

    broadcast_from_first(check)


def differences(everywhere: Sequence[Mapping[str, str]], kind: str = "process") -> list[str]:
    """One line for each value that differs between processes: which process has which value.

    Args:
      everywhere: the values of each, by name.
      kind: what has the values, if not processes.
    """
    found = []
    for name in dict.fromkeys(itertools.chain(*everywhere)):
        having = {}
        for process, facts in enumerate(everywhere):
            having.setdefault(facts.get(name, "not set"), []).append(process)
        if len(having) > 1:
            each = (f"{value} in {_named(kind, some)}" for value, some in having.items())
            found.append(f"{name}: {', '.join(each)}")
    return found


def _named(kind, numbers):
    """Names processes or devices, neighbours as a range: "processes 0, 2-3"."""
    runs = itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    ends = [[number for _, number in run] for _, run in runs]
    words = [f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in ends]
    plural = "es" if kind.endswith("s") else "s"
    return f"{kind}{plural * (len(numbers) > 1)} {', '.join(words)}"


def wait_for_file(path: Path) -> bool:
    """Whether a file of another process exists.

    With several processes it waits up to a minute, because network disks show files late.
    """
    end = time.monotonic() + (_SHARED_SECONDS if distributed.global_state.num_processes > 1 else 0)
    while True:
        # A listing, because the system may answer a question for one name from its cache.
        with contextlib.suppress(FileNotFoundError):
            if path.name in os.listdir(path.parent):
                return True
        if time.monotonic() > end:
            return False
        time.sleep(0.2)


def check_shared(folder: Path) -> None:
    """Checks that a folder is on a disk that all processes share.

    Raises:
      OSError: if it is not, after a minute.
      DisagreementError: if there are other processes and this one is not connected to them.
    """
    if distributed.global_state.num_processes == 1:
        if jax.process_count() > 1:
            # Every process would take itself for process 0.
            raise DisagreementError(
                "this is one of several processes, as of a Cloud TPU slice, and they are not "
                "connected: start each one with --distributed"
            )
        return

    def mark():
        path = folder / f".shared-{uuid.uuid4().hex}"
        make_folder(folder)
        path.touch()
        return str(path.absolute())

    path = Path(broadcast_from_first(mark))
    # If the working directories differ, a relative path names different folders.
    if not wait_for_file(folder.absolute() / path.name):
        raise OSError(
            f"{folder.absolute()} on {socket.gethostname()} is not {path.parent} of process 0: it "
            "must be on a disk that all processes share, such as NFS or a mounted bucket"
        )
    barrier()
    if is_first():
        path.unlink()
