"""Files that are whole or not there."""

from pathlib import Path


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file beside its place and renames it; makes the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    partial.replace(path)
