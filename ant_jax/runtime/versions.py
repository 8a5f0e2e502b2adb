"""The versions and settings of the software of a run."""

import hashlib
import os
from importlib.metadata import version
from pathlib import Path

import jax

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
# Settings of JAX that can change numbers.
_NUMBERS = (
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_disable_most_optimizations",
    "jax_enable_x64",
    "jax_numpy_dtype_promotion",
    "jax_platforms",
    "jax_random_seed_offset",
    "jax_threefry_partitionable",
)


def in_use() -> dict[str, str]:
    """Versions of packages, a hash of this package's code, settings of JAX and XLA, by name."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    return {
        "the code of ant_jax": _own_code(),
        **{name: version(name) for name in _PACKAGES},
        **{name: str(jax.config.values.get(name)) for name in _NUMBERS},
        # Dumps don't change numbers, and a user may want those of one process only.
        "XLA_FLAGS": " ".join(sorted(flag for flag in flags if not flag.startswith("--xla_dump"))),
    }


def _own_code():
    digest = hashlib.sha256()
    folder = Path(__file__).parents[1]
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]
