"""Sampling with several networks, each for its own timesteps."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial


def switch_by_timestep(
    apply_fn: Callable[..., jax.Array], params: Any, which: np.ndarray
) -> Partial:
    """Joins m models of one architecture into one model for the samplers, chosen by timestep.

    All examples of a batch must have the same timestep, as they do in the samplers with or without
    guidance: the model of ``t[0]`` denoises the whole batch. Each step copies the parameters of one
    model. A sampler is not compiled again for other parameters or another ``which`` of the same
    shapes, if ``apply_fn`` is the same::

      params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params_of_each_interval)
      which = clustering.assign_clusters(np.arange(process.span), boundaries)
      ddpm()(process, switch_by_timestep(model.apply, {"params": params}, which), ...)

    Args:
      apply_fn: The network, ``apply_fn(params, x, t, y)``.
      params: Pytree with leaves (m, ...), the parameters of m models.
      which: (T,) integers in [0, m): the model for each timestep of the process that the models
        were trained with. A sampler with fewer steps uses the entries at its timesteps.

    Returns:
      The model ``(x, t, y)``. The arrays are its leaves, the network its static part.

    Raises:
      ValueError: If the leaves don't agree in m, or ``which`` is not as above.
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
        raise ValueError(f"which must be (T,) integers, got {which.dtype} {which.shape}")
    wrong = np.flatnonzero((which < 0) | (which >= count[0]))
    if wrong.size:
        t = wrong[0]
        raise ValueError(f"which[{t}] must be in [0, {count[0]}), got {which[t]}")
    # A Partial without arguments is a pytree without leaves: the network is compared, not traced.
    return Partial(_apply_chosen, Partial(apply_fn), params, jnp.asarray(which, jnp.int32))


def _apply_chosen(network, params, which, x, t, y) -> jax.Array:
    model = which[t[0]]
    return network(jax.tree.map(lambda leaf: leaf[model], params), x, t, y)
