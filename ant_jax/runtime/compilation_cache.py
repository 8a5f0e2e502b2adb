"""Compiled programs on disk, so that the next process need not compile them again."""

import contextlib
import hashlib
import math
import tempfile
from importlib.metadata import version
from pathlib import Path

import jax
from absl import logging

# What JAX asks for programs has no public name.
from jax._src import compilation_cache

from ant_jax.runtime.files import keeping, user_cache, write_bytes


def enable() -> None:
    """Keeps what takes long to compile in the user's cache, unless JAX knows a place already.

    Programs for the CPU are those of one machine and one jaxlib, so each has a folder of its own.
    On Intel's CPUs none are kept: XLA takes hints of their tuning for features that are missing,
    compiles anew whatever is kept, and warns at length (openxla/xla, issue 44565).

    A program whose file is damaged is compiled again and replaced. Left to itself, JAX warns at
    every start for ever, and where zstandard is installed it may be ended by what it has read.
    """
    folder = _folder(_cpu(), jax.default_backend())
    if folder is None or jax.config.jax_compilation_cache_dir:
        return
    writable = False
    with keeping("compiled programs"):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(1 << 16))
        writable = True
    if not writable:
        # Or JAX would warn at every program. Those that are there are read all the same.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", math.inf)
    if folder.is_dir():
        if hasattr(compilation_cache, "get_file_cache"):
            compilation_cache.get_file_cache = lambda path: (_Sealed(Path(path)), path)
        jax.config.update("jax_compilation_cache_dir", str(folder))


class _Sealed:
    """The programs of a folder, each behind its checksum; what JAX takes for a cache."""

    def __init__(self, folder: Path):
        self._folder = folder

    def get(self, key: str) -> bytes | None:
        """The program of a key; None if there is none that is whole."""
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
        """Keeps a program."""
        write_bytes(self._path(key), _seal(program) + program)

    def _path(self, key):
        return self._folder / f"{key}-sealed"


_SEAL = 32  # bytes


def _seal(program):
    return hashlib.sha256(program).digest()


def _folder(cpu: str, backend: str) -> Path | None:
    if backend == "cpu" and "GenuineIntel" in cpu:
        return None
    cache = user_cache()
    if cache is None:
        return None
    machine = hashlib.sha256(f"{version('jaxlib')} {cpu}".encode()).hexdigest()[:16]
    return cache / "programs" / machine


def _cpu() -> str:
    """What Linux says of the CPU's kind and features; "" elsewhere."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    kinds = ("vendor_id", "flags", "Features", "model name")
    return "\n".join(sorted({line for line in lines if line.startswith(kinds)}))
