"""A cache of compiled programs on disk, so that the next process need not compile them again."""

import contextlib
import hashlib
import math
import tempfile
from importlib.metadata import version
from pathlib import Path

import jax
from absl import logging

# JAX has no public name for the cache that it uses.
from jax._src import compilation_cache

from ant_jax.runtime.files import keeping, user_cache, write_bytes


def enable() -> None:
    """Caches programs in the user's cache folder, unless JAX has a cache folder already.

    Programs for the CPU fit one kind of machine and one jaxlib only, so each pair has its own
    folder.

    A damaged program is compiled again and replaced. Without this, JAX would warn at every start,
    and if zstandard is installed, reading the file could crash the process.
    """
    folder = _folder(_cpu())
    if folder is None:
        return
    # JAX defines its settings at run time.
    if jax.config.jax_compilation_cache_dir:  # pyright: ignore[reportAttributeAccessIssue]
        return
    writable = False
    with keeping("compiled programs"):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(1 << 16))
        writable = True
    if not writable:
        # Otherwise JAX would warn at every program. It still reads the programs that are there.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", math.inf)
    if folder.is_dir():
        if hasattr(compilation_cache, "get_file_cache"):
            compilation_cache.get_file_cache = lambda path: (_Sealed(Path(path)), path)
        jax.config.update("jax_compilation_cache_dir", str(folder))


class _Sealed:
    """A folder of programs, each with a checksum, with the interface of JAX's file cache."""

    def __init__(self, folder: Path):
        self._folder = folder

    def get(self, key: str) -> bytes | None:
        """The program of a key; None if it is missing or damaged."""
        path = self._path(key)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        program = content[_SEAL:]
        if _seal(program) == content[:_SEAL]:
            return program
        logging.warning("a compiled program is damaged and will be compiled again: %s", path)
        with contextlib.suppress(OSError):
            path.unlink()
        return None

    def put(self, key: str, program: bytes) -> None:
        """Writes a program."""
        write_bytes(self._path(key), _seal(program) + program)

    def _path(self, key):
        return self._folder / f"{key}-sealed"


_SEAL = 32  # bytes


def _seal(program):
    return hashlib.sha256(program).digest()


def _folder(cpu: str) -> Path | None:
    cache = user_cache()
    if cache is None:
        return None
    machine = hashlib.sha256(f"{version('jaxlib')} {cpu}".encode()).hexdigest()[:16]
    return cache / "programs" / machine


def _cpu() -> str:
    """The kind and features of the CPU, as Linux reports them; "" on other systems."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    kinds = ("vendor_id", "flags", "Features", "model name")
    return "\n".join(sorted({line for line in lines if line.startswith(kinds)}))
