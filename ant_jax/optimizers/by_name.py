"""Parameters that a regular expression selects by their names."""

import re
from typing import Any

import jax
from jax.tree_util import keystr


def matching(params: Any, pattern: str) -> Any:
    """Marks the parameters whose name, such as "block_0/qkv/kernel", matches a pattern.

    Args:
      params: the network's parameters.
      pattern: a regular expression, searched for in each name.

    Returns:
      A tree like ``params`` of booleans.
    """
    return jax.tree.map_with_path(
        lambda path, _: bool(re.search(pattern, keystr(path, simple=True, separator="/"))), params
    )


def stop_gradients(params: Any, pattern: str) -> Any:
    """Gives frozen parameters a gradient of zero, so that they do not count in the Gram matrix."""
    if not pattern:
        return params
    return jax.tree.map(
        lambda leaf, stop: jax.lax.stop_gradient(leaf) if stop else leaf,
        params,
        matching(params, pattern),
    )
