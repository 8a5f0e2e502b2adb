"""Who makes batches: a thread of this process, or processes. Nobody waits for them without end.

A process gives a batch away in a file in memory that has no name, so nothing of it is left behind
however its processes end. The pool of `concurrent.futures` would leave semaphores there, and wait
without end for a process that a signal has stopped, also at the end of the program. A pipe of
`multiprocessing` would need a third less code, but deliver a third fewer images of 256x256 pixels.
"""

import contextlib
import mmap
import multiprocessing
import multiprocessing.connection
import multiprocessing.resource_tracker
import multiprocessing.util
import os
import pickle
import queue
import signal
import socket
import struct
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import cloudpickle
import numpy as np

from ant_jax.data.source import ExampleError

Batch = dict[str, np.ndarray]
Load = Callable[[int], Batch]

_STEP = struct.Struct("q")
# Where in the file the description of its arrays begins.
_ANSWER = struct.Struct("q")
# Arrays begin where JAX on CPUs need not copy them.
_ALIGNMENT = 64
_END_SECONDS = 5
# A terminal sends these to all processes of a job; it is the trainer that ends its readers.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_STATES = {"R": "runs", "S": "sleeps", "D": "waits for a disk"}


class ThreadReader:
    """Reads in a thread, because a read from a disk that hangs can't be interrupted."""

    def __init__(self, load: Load):
        self._steps, self._made = queue.SimpleQueue(), queue.SimpleQueue()
        threading.Thread(
            target=_read_in_thread, args=[load, self._steps, self._made], daemon=True
        ).start()

    def ask(self, step: int) -> None:
        """Asks for the batch of a step; returns at once."""
        self._steps.put(step)

    def receive(self, seconds: float) -> Batch | BaseException | None:
        """Waits for the batch of the first step asked for that has not been received.

        Returns:
          The batch, or what kept it from being made; None if neither is there after so many
          seconds.
        """
        try:
            return self._made.get(timeout=seconds)
        except queue.Empty:
            return None

    def state(self) -> str:
        """What it is doing, as "process 123 runs"."""
        return "this process reads"

    def is_stopped(self) -> bool:
        """Whether a signal has stopped it."""
        return False

    def close(self) -> None:
        """Ends it."""
        self._steps.put(None)

    def __del__(self):
        self.close()


def _read_in_thread(load, steps, made):
    while (step := steps.get()) is not None:
        try:
            made.put(load(step))
        except BaseException as error:
            made.put(error)


class ProcessReader:
    """Reads in a process, which ends with this one, however this one ends."""

    def __init__(self, load: BinaryIO):
        """Starts it.

        Args:
          load: From `pickled`. Through the pipe by which Python starts a process, a function that
            holds much would block for ever if that process died before reading it.
        """
        context = multiprocessing.get_context("spawn")
        self._socket, theirs = socket.socketpair()
        self._process = context.Process(target=_read_in_process, args=(theirs,), daemon=True)
        # Its own start would let signals through again.
        multiprocessing.resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
        # Before `multiprocessing` waits for its processes at the end of the program.
        self._end = multiprocessing.util.Finalize(
            self, _end, args=(self._process, self._socket), exitpriority=1
        )
        # One that is dead by now is noticed when its batch is waited for.
        with contextlib.suppress(BrokenPipeError):
            socket.send_fds(self._socket, [b"\0"], [load.fileno()])

    def ask(self, step: int) -> None:
        """Asks for the batch of a step; returns at once."""
        with contextlib.suppress(BrokenPipeError):
            self._socket.sendall(_STEP.pack(step))

    def receive(self, seconds: float) -> Batch | ExampleError | None:
        """As that of `ThreadReader`; what keeps a batch from being made becomes an ExampleError."""
        both = [self._socket, self._process.sentinel]
        ready = multiprocessing.connection.wait(both, seconds)
        if not ready:
            return None
        # What a process has sent before it died is good.
        descriptors = []
        if self._socket in ready:
            with contextlib.suppress(ConnectionResetError):
                message, descriptors, *_ = socket.recv_fds(
                    self._socket, _ANSWER.size, 1, socket.MSG_WAITALL
                )
        if not descriptors:
            self._process.join(_END_SECONDS)
            return ExampleError(
                "a process that prepares batches has failed (killed? out of memory?): process "
                f"{self._process.pid}, exit code {self._process.exitcode}"
            )
        with os.fdopen(descriptors[0], "rb") as file:
            content = mmap.mmap(file.fileno(), 0)
        answer = pickle.loads(memoryview(content)[_ANSWER.unpack(message)[0] :])
        if isinstance(answer, str):
            return ExampleError(answer)
        return {
            name: np.frombuffer(content, dtype, int(np.prod(shape)), offset).reshape(shape)
            for name, (dtype, shape, offset) in answer.items()
        }

    def state(self) -> str:
        """What it is doing, as "process 123 runs"."""
        pid = self._process.pid
        if self.is_stopped():
            return f"process {pid} is stopped (kill -CONT {pid} lets it go on)"
        state = _STATES.get(self._letter(), "lives" if self._process.is_alive() else "is dead")
        return f"process {pid} {state}"

    def is_stopped(self) -> bool:
        """Whether a signal has stopped it."""
        return self._letter() == "T"

    def _letter(self):
        # The state comes after the name, which is in brackets. Only Linux has the file.
        with contextlib.suppress(OSError):
            stat = Path(f"/proc/{self._process.pid}/stat").read_text()
            return stat.rpartition(")")[2].split()[0].upper()
        return ""

    def close(self) -> None:
        """Ends it."""
        self._end()


def pickled(load: Load) -> BinaryIO:
    """A function in a file without a name, for `ProcessReader`."""
    file = _nameless()
    # By value, if it or its source was made in a notebook.
    cloudpickle.dump(load, file)
    file.flush()
    return file


def _end(process, connection):
    # It has nothing to put in order, and may be in a read that hangs.
    process.kill()
    process.join(_END_SECONDS)
    connection.close()


def _read_in_process(connection):
    threading.Thread(target=_end_with_trainer, daemon=True).start()
    _, (descriptor,), *_ = socket.recv_fds(connection, 1, 1)
    try:
        with os.fdopen(descriptor, "rb") as file:
            file.seek(0)
            load = cloudpickle.load(file)
    except Exception as error:
        load, problem = None, f"a process can't be given the data to read: {error!r}"
    # A trainer that is killed may leave something unread.
    with contextlib.suppress(ConnectionError):
        while request := connection.recv(_STEP.size, socket.MSG_WAITALL):
            (step,) = _STEP.unpack(request)
            try:
                made = problem if load is None else load(step)
            # The error itself may not be one that can be sent.
            except ExampleError as error:
                made = str(error)
            except Exception as error:
                made = f"the batch of step {step}: {error!r}"
            _send(connection, made)


def _end_with_trainer():
    # It may be killed without a word while this process is in a long read.
    multiprocessing.parent_process().join()
    os._exit(1)


def _send(connection, made):
    """Sends a batch, or the words of an error."""
    with _nameless() as file:
        if not isinstance(made, str):
            arrays, made = made, {}
            for name, array in arrays.items():
                file.write(bytes(-file.tell() % _ALIGNMENT))
                made[name] = (array.dtype.str, array.shape, file.tell())
                file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        position = file.tell()
        pickle.dump(made, file)
        file.flush()
        socket.send_fds(connection, [_ANSWER.pack(position)], [file.fileno()])


def _nameless():
    """A new file in memory without a name; on the disk where the system has no such files."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("batch"), "w+b")
    return tempfile.TemporaryFile()


Reader = ThreadReader | ProcessReader
