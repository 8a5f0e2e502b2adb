"""Being asked to stop, by Ctrl-C (SIGINT), SIGTERM or SIGHUP; the second time it happens at once.

What was ignored when the program began, as SIGHUP is under nohup, stays ignored.
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
_ONCE_SECONDS = 1.0  # within which terminals and wrappers may pass on one wish to stop twice
_UNWIND_SECONDS = 5.0  # after which a program that does not stop is ended


class Stop:
    """What has been asked for.

    Attributes:
      signum: of the first signal; None before.
      saving: whether there is something to save, so that a signal only sets `signum`, which the
        code that saves reads. Otherwise it raises a KeyboardInterrupt of its number.
      watched: whether a thread ends the program at the second signal, which otherwise raises too.
      raised: whether a signal has raised; then whatever is raised comes of it.
      last_words: what is called with the name of a signal before it ends the program at once.
    """

    def __init__(self):
        self.signum: int | None = None
        self.saving = self.watched = self.raised = False
        self.last_words: Callable[[str], None] = lambda name: None
        self._since = 0.0

    def again(self, signum: int) -> bool:
        """Takes note of a signal; tells whether it asks a second time."""
        now = time.monotonic()
        if self.signum is None:
            self.signum, self._since = signum, now
        return now - self._since > _ONCE_SECONDS


_stop: Stop | None = None


def asked() -> bool:
    """Whether a signal has come that a step will see; for whatever waits long before that."""
    return _stop is not None and _stop.signum is not None


def raised() -> str | None:
    """The name of the signal that has raised an exception, on whose way out others may be raised.

    A module that is being imported, for one, makes an ImportError of it.
    """
    return name(_stop.signum) if _stop is not None and _stop.raised else None


@contextlib.contextmanager
def listening() -> Iterator[Stop]:
    """Yields what has been asked for, as long as it is in the context; in another, the same.

    Outside the main thread, which alone can listen, nothing ever comes.
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

    before = {number: signal.getsignal(number) for number in _SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, handle)
    try:
        yield stop
    finally:
        _stop = None
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def saving() -> Iterator[Stop]:
    """`listening`, where the caller sets `Stop.saving` as soon as there is something to save."""
    with listening() as stop:
        try:
            yield stop
        finally:
            stop.saving = False


@contextlib.contextmanager
def deaf_children() -> Iterator[None]:
    """Processes that are started here hear neither the terminal's Ctrl-C nor that it is closed.

    Both come to every process of the terminal; the one that started them tells them to stop.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def ending_the_program(how: str) -> Iterator[Stop]:
    """Ends the program in one line where it is asked to stop, with status 128 + the signal.

    A second signal ends it at once, and so does the first after some seconds if the main thread is
    where Python can't interrupt it, as in a compilation. After a Ctrl-C that was saved the status
    is that of one that was not, so that a shell that runs a list of commands ends too; after the
    others, which schedulers send, it is 0.

    Args:
      how: How to go on.
    """
    ears, mouth = socket.socketpair()
    mouth.setblocking(False)
    with listening() as stop:
        # A thread hears of a signal although the main thread is busy in C++.
        before = signal.set_wakeup_fd(mouth.fileno(), warn_on_full_buffer=False)
        stop.watched = True
        threading.Thread(target=_watch, args=[ears, stop, how], daemon=True).start()
        try:
            yield stop
        except BaseException:
            if not stop.raised:
                raise
            _end(stop.signum, how)
        finally:
            signal.set_wakeup_fd(before)
            mouth.close()
        if stop.signum == signal.SIGINT:
            sys.exit(status(signal.SIGINT))


def name(signum: int) -> str:
    """Of a signal, as "SIGINT"."""
    return signal.Signals(signum).name


def status(signum: int) -> int:
    """What a program ends with that a signal has ended, as shells report it."""
    return 128 + signum


def _watch(ears, stop, how):
    warned = False
    while content := ears.recv(1):
        signum = content[0]
        if signum not in _SIGNALS:
            continue
        if stop.again(signum):
            _end_now(stop, signum, "at once, as it came again")
        elif stop.saving and not warned:
            warned = True
            say(f"{name(signum)}: a step is finished and saved first; again ends at once")
        elif not stop.saving:
            late = threading.Timer(_UNWIND_SECONDS, _end_now, [stop, signum, how])
            late.daemon = True
            late.start()
    ears.close()


def _end_now(stop, signum, how):
    stop.last_words(name(signum))
    _end(signum, how)


def _end(signum, how):
    say(f"{name(signum)}: stopped; {how}")
    # They would outlive this process, or wait for it.
    for worker in multiprocessing.active_children():
        worker.kill()
    # Without the compilations that other threads are busy with.
    os._exit(status(signum))


def say(message: str) -> None:
    """Prints on stderr; a terminal that has been closed is no error."""
    with contextlib.suppress(OSError):
        print(message, file=sys.stderr, flush=True)
