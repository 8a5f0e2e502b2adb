"""Atomic writes, file locks, and the user's cache folder."""

import contextlib
import fcntl
import functools
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from absl import logging

_PARTIAL = ".partial"
_DEAD_SECONDS = 24 * 3600  # without a write, after which the writer of a file counts as dead


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it, if they do not exist.

    Raises:
      OSError: if that is impossible; the message says what to do.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        above = next(each for each in (folder, *folder.parents) if os.path.exists(each))
        reason = error.strerror if above.is_dir() else f"{above} is not a folder"
        message = f"the folder {folder} can't be made: {reason}; choose another path"
        raise type(error)(message) from error


@contextlib.contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """Opens a temporary file beside a path and renames it to the path at the end.

    Creates the folders above it. If several processes write the same path, the file at the path is
    always complete: it is that of the last one to finish.

    Raises:
      OSError: if no file can be written there; the message says what to do.
    """
    with partial_beside(path) as partial, naming(path):
        try:
            file = partial.open("wb")
        except OSError as error:
            message = f"{path} can't be written: {error.strerror}; choose another path"
            raise type(error)(message) from error
        with file:
            yield file


@contextlib.contextmanager
def partial_beside(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside a path; at the end renames the file written there.

    No other call gets the same temporary path. Removes temporary files that killed writers left.

    Raises:
      OSError: if the path is a folder, or the folder above it can't be made.
    """
    make_folder(path.parent)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; choose the path of a file")
    _remove_leftovers(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}{_PARTIAL}")
    try:
        yield partial
        with naming(path):
            # Otherwise a power failure could leave the name without the content.
            sync(partial)
        partial.replace(path)
        with contextlib.suppress(OSError):
            sync(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def _remove_leftovers(path):
    """Removes temporary files of a path that nobody has written to for a day."""
    # The folder may be unreadable, or another process may remove a file first. Neither matters.
    with contextlib.suppress(OSError):
        for name in os.listdir(path.parent):
            leftover = path.with_name(name)
            if (
                name.startswith(f"{path.name}.")
                and name.endswith(_PARTIAL)
                and time.time() - leftover.stat().st_mtime > _DEAD_SECONDS
            ):
                leftover.unlink()


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file atomically, see `writing`."""
    with writing(path) as file:
        file.write(content)


def write_new(path: Path, content: bytes) -> bool:
    """Writes a file unless it exists already; returns whether it did.

    If several processes write the same path at once, only one of them does.
    """
    # If this process is killed, a later writer of the path removes this temporary file.
    source = path.with_name(f"{path.name}.{secrets.token_hex(4)}{_PARTIAL}")
    write_bytes(source, content)
    try:
        os.link(source, path)
    except FileExistsError:
        return False
    except OSError:
        # Some network file systems have no hard links. There, another process may write in between.
        if path.exists():
            return False
        source.replace(path)
    finally:
        source.unlink(missing_ok=True)
    return True


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds the file name to an OSError without one, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def locked(path: Path) -> Iterator[Callable[[], bool]]:
    """Holds a lock on a file; the system releases it when this process ends, even if it is killed.

    Creates the folders above the file. The holder may remove the file at the end.

    Yields:
      A function that tells whether the file at the path is still the locked one. If the file was
      removed, another process may have locked a new file at the same path.

    Raises:
      BlockingIOError: if another process holds the lock; the message names that process.
    """
    make_folder(path.parent)
    with contextlib.ExitStack() as stack:
        while True:
            file = stack.enter_context(path.open("a+"))
            _lock(file, path)
            is_held = functools.partial(_is_named, file, path)
            # Tries again if the last holder removed the file after it was opened here.
            if is_held():
                break
        # The `yield` is outside of `naming`: errors of the caller concern other files.
        with naming(path):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        yield is_held


def _lock(file, path):
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise BlockingIOError(file.read() or "another process") from None
    except OSError as error:
        # Some network file systems have no locks.
        logging.warning("%s can't be locked (%s): other jobs are not kept out", path, error)


def _is_named(file, path):
    """Whether an open file is still the file at the path."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    return False


def user_path(path: str | os.PathLike) -> Path:
    """Expands ``~`` in a path that a user wrote.

    Raises:
      OSError: if the home folder is unknown.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise FileNotFoundError(f"{os.fspath(path)}: {error}") from None


def words_of(error: Exception) -> str:
    """The message of an error; that of the system without its number, after the file's name."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        return f"there is no file or folder {error.filename}"
    return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"


def user_cache() -> Path | None:
    """The user's cache folder: `$XDG_CACHE_HOME/ant_jax`, or `~/.cache/ant_jax`.

    It may not exist, or not be writable: write to it inside `keeping`.

    Returns:
      The folder; None if the user has no home folder, with a warning the first time.
    """
    return _user_cache(os.environ.get("XDG_CACHE_HOME") or "~/.cache")


@functools.cache
def _user_cache(place):
    try:
        return user_path(place) / "ant_jax"
    except FileNotFoundError as error:
        logging.warning(
            "nothing is kept for the next start: %s; XDG_CACHE_HOME can name a folder", error
        )
        return None


@contextlib.contextmanager
def keeping(what: str) -> Iterator[None]:
    """For writing to a cache: if that fails, logs a warning and goes on.

    Args:
      what: the content, for the warning.
    """
    try:
        yield
    except OSError as error:
        logging.warning("%s: not kept for the next start: %s", what, error)
