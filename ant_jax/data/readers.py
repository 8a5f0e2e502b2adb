"""Readers, which make batches in a thread or in a process. Waiting for them always has a timeout.

A process passes each batch in an unnamed file in memory, so nothing remains of it however the
processes end. The pool of `concurrent.futures` would leave semaphores, and would wait forever for a
process that a signal has stopped, even at the end of the program. A `multiprocessing` pipe would
need a third less code, but would deliver a third fewer images of 256x256 pixels.
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
# Offset in the file at which the description of its arrays begins.
_ANSWER = struct.Struct("q")
# JAX on CPUs uses arrays of this alignment without copying them.
_ALIGNMENT = 64
_END_SECONDS = 5
# A terminal sends these to all processes of a job, but only the trainer may end its readers.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_STATES = {"R": "runs", "S": "sleeps", "D": "waits for a disk"}


class ThreadReader:
    """Reads in a thread, so that the caller can stop waiting for a disk that hangs."""

    def __init__(self, load: Load):
        self._steps, self._made = queue.SimpleQueue(), queue.SimpleQueue()
        threading.Thread(
            target=_read_in_thread, args=[load, self._steps, self._made], daemon=True
        ).start()

    def ask(self, step: int) -> None:
        """Requests the batch of a step; does not wait."""
        self._steps.put(step)

    def receive(self, seconds: float) -> Batch | BaseException | None:
        """Waits for the oldest requested batch that has not been received.

        Returns:
          The batch, or the error that prevented it; None if neither arrives within `seconds`.
        """
        try:
            return self._made.get(timeout=seconds)
        except queue.Empty:
            return None

    def state(self) -> str:
        """What the reader does, in words."""
        return "this process reads"

    def is_stopped(self) -> bool:
        """Whether a signal has stopped the reader."""
        return False

    def close(self) -> None:
        """Ends the thread."""
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
    """Reads in another process, which ends when this process ends, even if it is killed."""

    def __init__(self, load: BinaryIO):
        """Starts the process.

        Args:
          load: From `pickled`. It is a file because Python's own way, a pipe to the new process,
            would block forever on a large function if that process died before reading it.
        """
        context = multiprocessing.get_context("spawn")
        self._socket, theirs = socket.socketpair()
        self._process = context.Process(target=_read_in_process, args=(theirs,), daemon=True)
        # Started now, because it unblocks signals when it starts.
        multiprocessing.resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
        # At exit this must run before `multiprocessing` waits for its processes.
        self._end = multiprocessing.util.Finalize(
            self, _end, args=(self._process, self._socket), exitpriority=1
        )
        # If the process is already dead, `receive` reports it.
        with contextlib.suppress(BrokenPipeError):
            socket.send_fds(self._socket, [b"\0"], [load.fileno()])

    def ask(self, step: int) -> None:
        """Requests the batch of a step; does not wait."""
        with contextlib.suppress(BrokenPipeError):
            self._socket.sendall(_STEP.pack(step))

    def receive(self, seconds: float) -> Batch | ExampleError | None:
        """See `ThreadReader.receive`; here every error is returned as an ExampleError."""
        both = [self._socket, self._process.sentinel]
        ready = multiprocessing.connection.wait(both, seconds)
        if not ready:
            return None
        # A batch that the process sent before it died is valid.
        message, descriptors = b"", []
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
        """What the reader does, in words, such as "process 123 runs"."""
        pid = self._process.pid
        if self.is_stopped():
            return f"process {pid} is stopped (continue it by kill -CONT {pid})"
        state = _STATES.get(self._letter(), "lives" if self._process.is_alive() else "is dead")
        return f"process {pid} {state}"

    def is_stopped(self) -> bool:
        """Whether a signal has stopped the process."""
        return self._letter() == "T"

    def _letter(self):
        # The state follows the name, which is in parentheses. Only Linux has this file.
        with contextlib.suppress(OSError):
            stat = Path(f"/proc/{self._process.pid}/stat").read_text()
            return stat.rpartition(")")[2].split()[0].upper()
        return ""

    def close(self) -> None:
        """Ends the process."""
        self._end()


def pickled(load: Load) -> BinaryIO:
    """Pickles a function into an unnamed file, for `ProcessReader`."""
    file = _nameless()
    # cloudpickle also pickles functions and sources that are defined in a notebook.
    cloudpickle.dump(load, file)
    file.flush()
    return file


def _end(process, connection):
    # It has nothing to clean up, and may hang in a read.
    process.kill()
    process.join(_END_SECONDS)
    connection.close()


def _read_in_process(connection):
    threading.Thread(target=_end_with_trainer, daemon=True).start()
    _, (descriptor,), *_ = socket.recv_fds(connection, 1, 1)
    load, problem = None, ""
    try:
        with os.fdopen(descriptor, "rb") as file:
            file.seek(0)
            load = cloudpickle.load(file)
    except Exception as error:
        problem = f"a data worker can't unpickle the source: {error!r}"
    # If the trainer is killed, its end of the socket may be closed with unread data.
    with contextlib.suppress(ConnectionError):
        while request := connection.recv(_STEP.size, socket.MSG_WAITALL):
            (step,) = _STEP.unpack(request)
            try:
                made = problem if load is None else load(step)
            # Sent as text, because the error itself may not be picklable.
            except ExampleError as error:
                made = str(error)
            except Exception as error:
                made = f"the batch of step {step}: {error!r}"
            _send(connection, made)


def _end_with_trainer():
    # The trainer may be killed while this process is in a long read.
    trainer = multiprocessing.parent_process()
    assert trainer is not None  # it has spawned this process
    trainer.join()
    os._exit(1)


def _send(connection, made):
    """Sends a batch, or the text of an error."""
    with _nameless() as file:
        if not isinstance(made, str):
            arrays, made = made, {}
            for name, array in arrays.items():
                file.write(bytes(-file.tell() % _ALIGNMENT))
                made[name] = (array.dtype.str, array.shape, file.tell())
                file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        position = file.tell()
        pickle.dump(made, file)
        file.flush()
        socket.send_fds(connection, [_ANSWER.pack(position)], [file.fileno()])


def _nameless():
    """A new unnamed file in memory, or on the disk if the system has no such files."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("batch"), "w+b")
    return tempfile.TemporaryFile()


Reader = ThreadReader | ProcessReader
