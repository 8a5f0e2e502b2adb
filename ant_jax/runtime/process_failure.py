"""If one process of a run fails, all of them end."""

import contextlib
import multiprocessing
import os
import socket
import threading
import time
import traceback
from collections.abc import Iterator

import jax

# JAX has no public name for the key-value store that all processes share.
from jax._src import distributed

from ant_jax.runtime import signals
from ant_jax.runtime.processes import barrier, client, is_first

_WATCH_SECONDS = 1.0  # between two checks whether another process has failed
_LEAVE_SECONDS = 10  # a failing process waits at most so long until all others know the reason

_FAILED = "ant_jax/failed"
_ERROR = "error: "  # as in `cli.refuse`


@contextlib.contextmanager
def exit_all_on_error() -> Iterator[None]:
    """Ends all processes a second or two after one of them has failed, and prints the reason.

    Otherwise the others would wait in their next collective, on some devices for ever. A process
    that is killed leaves no reason: JAX ends the others 30 s after its last heartbeat, or at once
    if it was process 0. A process that leaves the context without an error waits for the others.
    """
    if distributed.global_state.num_processes == 1:
        yield
        return
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=[done], daemon=True)
    watcher.start()
    try:
        with signals.listening() as stop:
            stop.before_exit = _before_exit
            yield
        barrier()
    except BaseException as error:
        done.set()
        watcher.join()
        if asked := signals.raised():
            _tell(f"was asked to stop by {asked}")
            _wait_until_all_know()
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
    # JAX raises an error if no process has set the key, and ends this process if none answers.
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        return client().key_value_try_get(_FAILED)
    return None


def _fail(error):
    if isinstance(error, SystemExit):
        reason = str(error.code)
    else:
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, jax.errors.JaxRuntimeError):
            reason += "; if a connection broke, another process has died"
    if not _tell(f"failed: {reason.removeprefix(_ERROR)}", _ERROR):
        # Another process failed first and caused this error, or no other process is left.
        reason = _reason() or reason
    elif not isinstance(error, SystemExit):
        signals.say("".join(traceback.format_exception(error)))
    signals.say(reason)
    _leave()


def _tell(what, kind=""):
    """Tells the other processes what happened; False if another did so first, or none is left."""
    process = distributed.global_state.process_id
    words = f"{kind}process {process} on {socket.gethostname()} {what}"
    try:
        client().key_value_set(_FAILED, words)
    except jax.errors.JaxRuntimeError:
        return False
    return True


def _before_exit(signal):
    _tell(f"was asked to stop by {signal}")
    _let_others_go_first(2 * _WATCH_SECONDS)


def _wait_until_all_know():
    """Waits until all processes know the reason, for some seconds at most."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        client().wait_at_barrier("ant_jax/leave", 1000 * _LEAVE_SECONDS)
    _let_others_go_first(_WATCH_SECONDS)


def _let_others_go_first(seconds):
    """If process 0, which runs JAX's service, ended first, the others would print pages of C++."""
    if is_first():
        time.sleep(seconds)


def _leave():
    """Ends this process by `os._exit`, because its main thread may be stuck."""
    _wait_until_all_know()
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(1)
