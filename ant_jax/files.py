"""Files that are whole or not there."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """Gives a file beside its place, renamed at the end; makes the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            yield file
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    partial.replace(path)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file beside its place and renames it; makes the folders above it."""
    with writing(path) as file:
        file.write(content)


def user_cache() -> Path:
    """Where what can be made again is kept: `$XDG_CACHE_HOME/ant_jax`, or `~/.cache/ant_jax`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ant_jax"
