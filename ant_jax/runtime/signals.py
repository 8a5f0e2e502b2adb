"""Stopping on Ctrl-C (SIGINT), SIGTERM or SIGHUP: first after a save, the second time at once.

A signal that was ignored when the program started, such as SIGHUP under nohup, stays ignored.
"""

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_ONCE_SECONDS = 1.0  # terminals and wrappers may deliver one Ctrl-C twice within this time
_RAISE_SECONDS = 0.05  # after which a KeyboardInterrupt that Python has dropped is raised again
_UNWIND_SECONDS = 5.0  # after which a program that has not stopped is ended


class Stop:
    """Records which signal has come, and decides what a signal does.

    Attributes:
      signum: number of the first signal; None before it.
      saving: whether there is something to save. If so, a signal only sets `signum`, and the code
        that saves reads it. Otherwise a signal raises KeyboardInterrupt(signum).
      watched: whether a thread ends the program at the second signal. Otherwise the second signal
        raises a KeyboardInterrupt too.
      raised: whether a signal has raised a KeyboardInterrupt, which may have caused later errors.
      lost: what the end of the program loses, in words; see `losing`.
      before_exit: is called with the name of a signal before that signal ends the program at once.
    """

    def __init__(self):
        self.signum: int | None = None
        self.saving = self.watched = self.raised = False
        self.lost = ""
        self.before_exit: Callable[[str], None] = lambda name: None
        self._since = 0.0

    def again(self, signum: int) -> bool:
        """Records a signal; returns whether it is a second request to stop."""
        now = time.monotonic()
        if self.signum is None:
            self.signum, self._since = signum, now
        return now - self._since > _ONCE_SECONDS


_stop: Stop | None = None


def asked() -> bool:
    """Whether a signal has come; for code that waits so long that it must stop by itself."""
    return _stop is not None and _stop.signum is not None


def raised() -> str | None:
    """The name of the signal that has raised a KeyboardInterrupt; None if none has.

    Other exceptions may come of it: a module that is being imported turns it into an ImportError.
    """
    if _stop is None or _stop.signum is None or not _stop.raised:
        return None
    return name(_stop.signum)


@contextlib.contextmanager
def listening() -> Iterator[Stop]:
    """Handles signals while the program is in the context. Nested contexts yield the same `Stop`.

    Only the main thread can handle signals. In another thread, the `Stop` never changes.
    """
    global _stop
    if _stop is not None or threading.current_thread() is not threading.main_thread():
        yield _stop or Stop()
        return
    stop = _stop = Stop()

    def handle(signum, _):
        again = stop.again(signum)
        if not (stop.watched if again else stop.saving):
            stop.raised = True
            raise KeyboardInterrupt(signum)

    def raise_again(failure):
        if not isinstance(failure.exc_value, KeyboardInterrupt) or stop.signum is None:
            return hook(failure)
        # Python drops what is raised in a callback of the garbage collector.
        main = threading.main_thread().ident
        again = threading.Timer(_RAISE_SECONDS, signal.pthread_kill, [main, stop.signum])
        again.daemon = True
        again.start()

    before = {number: signal.getsignal(number) for number in _SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, handle)
    hook, sys.unraisablehook = sys.unraisablehook, raise_again
    try:
        yield stop
    finally:
        _stop = None
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def saving() -> Iterator[Stop]:
    """Like `listening`; the caller sets `Stop.saving` once there is something to save."""
    with listening() as stop:
        try:
            yield stop
        finally:
            stop.saving = False


@contextlib.contextmanager
def losing(what: str) -> Iterator[None]:
    """If a signal ends the program in this context, its last line says what that loses."""
    stop = _stop or Stop()
    stop.lost = what
    # Not after a KeyboardInterrupt: the line is printed later.
    try:
        yield
    except Exception:
        stop.lost = ""
        raise
    stop.lost = ""


@contextlib.contextmanager
def terminal_signals_blocked() -> Iterator[None]:
    """Processes that are started in this context ignore Ctrl-C and the closing of the terminal.

    The terminal sends both to all its processes; here the process that started them stops them.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def ending_the_program(how: str) -> Iterator[Stop]:
    """On a signal, prints one line and ends the program with status 128 + the signal's number.

    A second signal ends it at once. The first one ends it after some seconds if Python can't
    interrupt the main thread, for example in a compilation. If the program has saved its state, the
    status is the same after a Ctrl-C, so that a shell script stops too, and 0 after the other
    signals, which schedulers send.

    Args:
      how: tells the user how to go on.
    """
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    with listening() as stop:
        # The thread learns of a signal even while the main thread runs C++ code.
        before = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
        stop.watched = True
        threading.Thread(target=_watch, args=[receiver, stop, how], daemon=True).start()
        try:
            yield stop
        except BaseException:
            if not stop.raised:
                raise
            _end(stop.signum, how)
        finally:
            signal.set_wakeup_fd(before)
            sender.close()
        if stop.signum == signal.SIGINT:
            sys.exit(status(signal.SIGINT))


def name(signum: int) -> str:
    """The name of a signal, such as "SIGINT"."""
    return signal.Signals(signum).name


def status(signum: int) -> int:
    """The exit status that shells report for a program that a signal has ended."""
    return 128 + signum


def _watch(receiver, stop, how):
    warned = False
    while content := receiver.recv(1):
        signum = content[0]
        if signum not in _SIGNALS:
            continue
        if stop.again(signum):
            _end_now(stop, signum, "at once, by the second signal")
        elif stop.saving and not warned:
            warned = True
            say(
                f"{name(signum)}: a step is finished and saved first; a second signal ends the "
                "program at once"
            )
        elif not stop.saving:
            late = threading.Timer(_UNWIND_SECONDS, _end_now, [stop, signum, how])
            late.daemon = True
            late.start()
    receiver.close()


def _end_now(stop, signum, how):
    stop.before_exit(name(signum))
    _end(signum, how)


def _end(signum, how):
    lost = f"; {_stop.lost}" if _stop is not None and _stop.lost else ""
    say(f"{name(signum)}: stopped; {how}{lost}")
    # The workers would outlive this process, or keep it waiting.
    for worker in multiprocessing.active_children():
        worker.kill()
    # `sys.exit` would wait for compilations in other threads.
    os._exit(status(signum))


def say(message: str) -> None:
    """Prints on stderr; ignores that the terminal may be closed."""
    with contextlib.suppress(OSError):
        print(message, file=sys.stderr, flush=True)
