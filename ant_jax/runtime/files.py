"""Files that are whole or not there."""

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
_DEAD_SECONDS = 24 * 3600  # without a write, after which no process writes a partial file


@contextlib.contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """Gives a file beside its place, renamed at the end; makes the folders above it.

    However many write it at once, its place holds a whole file at any time: that of the last.
    """
    with partial_beside(path) as partial, naming(path), partial.open("wb") as file:
        yield file


@contextlib.contextmanager
def partial_beside(path: Path) -> Iterator[Path]:
    """Gives a path to write a file to, beside its place; at the end renames it into its place.

    No other call gets the same path. Files that killed writers have left are removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path)
    partial = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}{_PARTIAL}")
    try:
        yield partial
        with naming(path):
            # Or a power failure could leave the name and not the content.
            sync(partial)
        partial.replace(path)
        with contextlib.suppress(OSError):
            sync(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _remove_leftovers(path):
    """Removes partial files of a place to which nobody has written for a day."""
    # A folder may not be listed, another may remove a file at the same time: no reason to fail.
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
    """Waits until a file or the names in a folder are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file beside its place and renames it; makes the folders above it."""
    with writing(path) as file:
        file.write(content)


def write_new(path: Path, content: bytes) -> bool:
    """Writes a file, if there is none of that name, and says whether it did.

    Of several at once one does.
    """
    # After a kill a later writer of the path removes it, as other partial files.
    source = path.with_name(f"{path.name}.{secrets.token_hex(4)}{_PARTIAL}")
    write_bytes(source, content)
    try:
        os.link(source, path)
    except FileExistsError:
        return False
    except OSError:
        # Some network file systems have no links; then another may come between the two.
        if path.exists():
            return False
        source.replace(path)
    finally:
        source.unlink(missing_ok=True)
    return True


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
def locked(path: Path) -> Iterator[Callable[[], bool]]:
    """Holds a lock that ends with this process, however it ends; makes the folders above it.

    The holder may remove the file at the end.

    Yields:
      A function that tells whether the file is still that of the lock: where it was removed,
      another may hold a lock of the same name by now.

    Raises:
      BlockingIOError: if another holds it; the message says who.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        is_held = lambda: False
        while not is_held():
            # Again if its last holder has removed the file since it was opened here.
            file = stack.enter_context(path.open("a+"))
            _lock(file, path)
            is_held = functools.partial(_is_named, file, path)
        # Not around what the lock is held for, whose errors are of other files.
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
        logging.warning("%s can't be locked (%s): nothing keeps others out", path, error)


def _is_named(file, path):
    """Whether an open file is still the one of this path."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    return False


def user_path(path: str | os.PathLike) -> Path:
    """A path as a user writes it, in which ``~`` stands for the home folder.

    Raises:
      OSError: if nobody knows that home.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise FileNotFoundError(f"{os.fspath(path)}: {error}") from None


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
        return user_path(place) / "ant_jax"
    except FileNotFoundError as error:
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
