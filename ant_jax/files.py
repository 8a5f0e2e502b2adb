"""Files that are whole or not there."""

import contextlib
import fcntl
import functools
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from absl import logging


@contextlib.contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """Gives a file beside its place, renamed at the end; makes the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with naming(path), partial.open("wb") as file:
            yield file
            file.flush()
            # Or a power failure could leave the name and not the content.
            os.fsync(file.fileno())
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    partial.replace(path)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file beside its place and renames it; makes the folders above it."""
    with writing(path) as file:
        file.write(content)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Names the file in an error of the system that names none, as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock that ends with this process, however it ends; makes the folders above it.

    Raises:
      BlockingIOError: if another holds it; the message says who.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise BlockingIOError(file.read() or "another process") from None
        except OSError as error:
            # Some network file systems have no locks.
            logging.warning("%s can't be locked (%s): nothing keeps others out", path, error)
        # Not around what the lock is held for, whose errors are of other files.
        with naming(path):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        yield


def user_cache() -> Path | None:
    """Where what can be made again is kept: `$XDG_CACHE_HOME/ant_jax`, or `~/.cache/ant_jax`.

    It may not be there, nor writable: read what is there, and write inside `keeping`.

    Returns:
      The folder; None where the user has no home, which is said once.
    """
    return _user_cache(os.environ.get("XDG_CACHE_HOME") or "~/.cache")


@functools.cache
def _user_cache(place):
    try:
        return Path(place).expanduser() / "ant_jax"
    except RuntimeError as error:
        logging.warning(
            "nothing is kept for the next start: %s; XDG_CACHE_HOME can name a folder", error
        )
        return None


@contextlib.contextmanager
def keeping(what: str) -> Iterator[None]:
    """Writes what can be made again: where it can't be written, says so and goes on without."""
    try:
        yield
    except OSError as error:
        logging.warning("%s: not kept for the next start: %s", what, error)
