"""Compiled programs on disk, so that the next process need not compile them again."""

import hashlib
import math
import tempfile
from importlib.metadata import version
from pathlib import Path

import jax

from ant_jax.files import keeping, user_cache


def keep() -> None:
    """Keeps what takes long to compile in the user's cache, unless JAX knows a place already.

    Programs for the CPU are those of one machine and one jaxlib, so each has a folder of its own.
    On Intel's CPUs none are kept: XLA takes hints of their tuning for features that are missing,
    compiles anew whatever is kept, and warns at length (openxla/xla, issue 44565).
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
        jax.config.update("jax_compilation_cache_dir", str(folder))


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
