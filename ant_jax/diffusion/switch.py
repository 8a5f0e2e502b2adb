"""Sampling with several networks, each for its own noise levels."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial


def switch_by_level(
    apply_fn: Callable[..., jax.Array], params: Any, boundaries: np.ndarray, which: np.ndarray
) -> Partial:
    """Joins m models of one architecture into one model for the samplers, chosen by noise level.

    All examples of a batch must have the same level, as they do in the samplers with or without
    guidance: the model of ``t[0]`` denoises the whole batch. Each step copies the parameters of one
    model. A sampler is not compiled again for other parameters, boundaries or another ``which`` of
    the same shapes, if ``apply_fn`` is the same::

      params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params_of_each_interval)
      denoise = switch_by_level(model.apply, {"params": params}, boundaries, range(k))
      ddpm()(process, denoise, ...)

    Args:
      apply_fn: The network, ``apply_fn(params, x, t, y)``.
      params: Pytree with leaves (m, ...), the parameters of m models.
      boundaries: (n + 1,) of intervals of levels, not decreasing. Levels below the second boundary
        are of the first interval, and those from the last but one on of the last.
      which: (n,) integers in [0, m): the model of each interval.

    Returns:
      The model ``(x, t, y)``. The arrays are its leaves, the network its static part.

    Raises:
      ValueError: If the leaves don't agree in m, or ``which`` or the boundaries are not as above.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    counts = {f"params{jax.tree_util.keystr(path)}": np.shape(leaf)[:1] for path, leaf in leaves}
    if not counts:
        raise ValueError("params has no leaves")
    (first, count), *others = counts.items()
    for name, other in others:
        if other != count:
            raise ValueError(
                f"all leaves of params must have the same leading axis of models, but {first} has "
                f"{count} and {name} has {other}"
            )
    if not count:
        raise ValueError(f"{first} must have a leading axis of models, but is a scalar")
    which = np.asarray(which)
    if which.ndim != 1 or which.size == 0 or not np.issubdtype(which.dtype, np.integer):
        raise ValueError(f"which must be (n,) integers, got {which.dtype} {which.shape}")
    wrong = np.flatnonzero((which < 0) | (which >= count[0]))
    if wrong.size:
        t = wrong[0]
        raise ValueError(f"which[{t}] must be in [0, {count[0]}), got {which[t]}")
    boundaries = np.asarray(boundaries)
    if boundaries.shape != (len(which) + 1,) or (np.diff(boundaries) < 0).any():
        raise ValueError(
            f"{len(which)} intervals need {len(which) + 1} boundaries that do not decrease, got "
            f"{boundaries}"
        )
    kind = jnp.float32 if boundaries.dtype.kind == "f" else jnp.int32
    # A Partial without arguments is a pytree without leaves: the network is compared, not traced.
    arrays = jnp.asarray(boundaries[1:-1], kind), jnp.asarray(which, jnp.int32)
    return Partial(_apply_chosen, Partial(apply_fn), params, *arrays)


def _apply_chosen(network, params, inner, which, x, t, y) -> jax.Array:
    model = which[(t[0] >= inner).sum()]
    return network(jax.tree.map(lambda leaf: leaf[model], params), x, t, y)
