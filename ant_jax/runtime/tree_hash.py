"""A hash of arrays and settings, to tell whether a cached result still applies."""

import hashlib
from typing import Any

import jax
import numpy as np


def tree_hash(tree: Any) -> str:
    """SHA-256 in hexadecimal of a pytree of arrays, numbers and strings, with its keys."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape} ".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
