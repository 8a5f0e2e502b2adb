"""How the processes of a run end together where one of them fails."""

import contextlib
import multiprocessing
import os
import socket
import threading
import time
import traceback
from collections.abc import Iterator

import jax

# The store that all processes read and write has no public name in JAX.
from jax._src import distributed

from ant_jax.runtime import signals
from ant_jax.runtime.processes import barrier, is_first

_WATCH_SECONDS = 1.0  # between looks at whether another process has failed
_FAREWELL_SECONDS = 10  # that a failing process waits until all know why

_FAILED = "ant_jax/failed"


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
