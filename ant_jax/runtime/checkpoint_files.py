"""The files of a checkpoint: proved when they are written, verified before they are read.

After a save every array is looked for and read, and every file gets a checksum. Orbax notices
truncated files but not flipped bytes; the checksums notice both. Beside the arrays lies
``run.json``, which says of which run the checkpoint is. Files that file browsers and network disks
leave there don't count.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from ant_jax.runtime.files import sync

_CHECKSUMS = "checksums.json"
_RECORD = "run.json"
_MANIFEST = "manifest.ocdbt"  # by which orbax finds all arrays


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read."""


class CorruptCheckpointError(CheckpointError):
    """A checkpoint's files are not those that were written."""


def seal(path: Path, record: dict[str, Any] | None) -> None:
    """Adds the record and a checksum of every file; returns when all is on the disk.

    Args:
      path: of a checkpoint.
      record: what the checkpoint is to hold beside the arrays, as JSON can; None for nothing.
    """
    if record is not None:
        (path / _RECORD).write_text(json.dumps(record, indent=1))
    (path / _CHECKSUMS).write_text(json.dumps(_checksums(path), indent=1))
    for file in (*path.rglob("*"), path):
        if file.is_dir() or not _is_foreign(file.relative_to(path)):
            sync(file)


def verify(path: Path) -> None:
    """Raises a CorruptCheckpointError if a file of a checkpoint is not the one that was sealed."""
    wrong = sorted(
        name
        for name, digest in _expected(path).items()
        if not _is_foreign(Path(name)) and _digest(path / name) != digest
    )
    if wrong:
        raise CorruptCheckpointError(f"checkpoint {path} is corrupt: {', '.join(wrong[:3])}")


def _expected(path: Path) -> dict[str, str]:
    try:
        expected = dict(json.loads((path / _CHECKSUMS).read_bytes()))
    except PermissionError:
        raise
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CorruptCheckpointError(f"checkpoint {path} has no readable checksums") from error
    if _MANIFEST not in expected:
        raise CorruptCheckpointError(f"checkpoint {path} has no checksum of {_MANIFEST}")
    return expected


def record_of(path: Path) -> dict[str, Any] | None:
    """What a checkpoint holds beside the arrays; None if it was sealed without a record.

    Raises:
      CorruptCheckpointError: if it is not what was sealed.
    """
    digest = _expected(path).get(_RECORD)
    if digest is None:
        return None
    try:
        content = (path / _RECORD).read_bytes()
    except PermissionError:
        raise
    except OSError:
        content = b""
    if hashlib.sha256(content).hexdigest() != digest:
        raise CorruptCheckpointError(f"checkpoint {path} is corrupt: {_RECORD}")
    return json.loads(content)


def _checksums(path: Path) -> dict[str, str]:
    return {
        file.relative_to(path).as_posix(): _digest(file)
        for file in sorted(path.rglob("*"))
        if file.is_file() and not _is_foreign(file.relative_to(path)) and file.name != _CHECKSUMS
    }


def _digest(file: Path) -> str | None:
    """SHA-256 of a file's content; None if there is no such file or the disk can't read it."""
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except PermissionError:
        raise
    except OSError:
        return None


def _is_foreign(name: Path) -> bool:
    """Whether a file is of a file browser or a network disk: .DS_Store, ._x, .nfs00, Thumbs.db."""
    return any(part.startswith(".") or part in ("Thumbs.db", "desktop.ini") for part in name.parts)
