"""The checksums of a checkpoint's files, and the record beside its arrays.

Orbax notices truncated files but not flipped bits; the checksums find both. The record,
``run.json``, says to which run the checkpoint belongs. Files that file browsers and network disks
create in the folder are ignored.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from ant_jax.runtime.files import sync

_CHECKSUMS = "checksums.json"
_RECORD = "run.json"
_MANIFEST = "manifest.ocdbt"  # the index by which orbax finds all arrays


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read."""


class CorruptCheckpointError(CheckpointError):
    """The files of a checkpoint differ from those that were written."""


def seal(path: Path, record: dict[str, Any] | None) -> None:
    """Adds the record and the checksums of all files, and waits until everything is on the disk.

    Args:
      path: of a checkpoint.
      record: what the checkpoint holds beside the arrays, values of JSON; None for no record.
    """
    if record is not None:
        (path / _RECORD).write_text(json.dumps(record, indent=1))
    (path / _CHECKSUMS).write_text(json.dumps(_checksums(path), indent=1))
    for file in (*path.rglob("*"), path):
        if file.is_dir() or not _is_foreign(file.relative_to(path)):
            sync(file)


def verify(path: Path) -> None:
    """Raises a CorruptCheckpointError if a file has changed since `seal`."""
    wrong = sorted(
        name
        for name, digest in _expected(path).items()
        if not _is_foreign(Path(name)) and not _is_intact(path / name, digest)
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
    """Reads the record of a checkpoint; None if it has none.

    Raises:
      CorruptCheckpointError: if the record has changed since `seal`.
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


def _is_intact(file: Path, digest: str) -> bool:
    """Whether a file has this digest; not if it is missing or the disk can't read it."""
    try:
        return _digest(file) == digest
    except PermissionError:
        raise
    except OSError:
        return False


def _digest(file: Path) -> str:
    """SHA-256 of a file's content."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _is_foreign(name: Path) -> bool:
    """Whether a file browser or a network disk made a file: .DS_Store, ._x, .nfs00, Thumbs.db."""
    return any(part.startswith(".") or part in ("Thumbs.db", "desktop.ini") for part in name.parts)
