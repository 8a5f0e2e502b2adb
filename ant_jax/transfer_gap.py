"""Negative transfer: what a multi-task model loses against specialists (Go et al. 2023, O2).

A specialist is a model trained on one interval of timesteps alone. Where it denoises its interval
better than the multi-task model does, the other tasks have harmed that interval.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from ant_jax.diffusion import ApplyFn, GaussianDiffusion, switch_by_timestep


class TransferGap(NamedTuple):
    """How far samples are from the data with and without specialists.

    Attributes:
      multi_task: distance of the multi-task model's samples.
      mixed: (k,) distances of samples for which specialist i denoised interval i and the multi-task
        model all the others.
      gap: (k,) ``multi_task - mixed``: positive means negative transfer in that interval, since the
        specialist makes the samples better. Papers differ in the sign; this is the one of Go et al.
    """

    multi_task: float
    mixed: np.ndarray
    gap: np.ndarray


def transfer_gap(
    distance: Callable[[Partial], float],
    apply_fn: Callable[..., jax.Array],
    multi_task: Any,
    specialists: Sequence[Any],
    boundaries: np.ndarray,
) -> TransferGap:
    """Measures the negative transfer gap of each interval (Go et al. 2023, section 3.2).

    Args:
      distance: draws samples with a network ``(x, t, y) -> output`` and returns their distance to
        the data, such as the Frechet distance. The same first noise in every call leaves less
        chance in the differences. All calls get one program, with other arrays.
      apply_fn: ``(params, x, t, y) -> output``.
      multi_task: parameters of the model trained on all timesteps.
      specialists: k sets of parameters; number i is trained on interval i.
      boundaries: (k + 1,) of the intervals.

    Returns:
      The gap of each interval.

    Raises:
      ValueError: if there are not as many specialists as intervals.
    """
    k = len(boundaries) - 1
    if len(specialists) != k:
        raise ValueError(f"{k} intervals need {k} specialists, got {len(specialists)}")
    timesteps = np.arange(boundaries[-1])

    def mixed_with(specialist, interval):
        params = jax.tree.map(lambda *leaves: jnp.stack(leaves), multi_task, specialist)
        low, high = interval
        which = ((timesteps >= low) & (timesteps < high)).astype(np.int32)
        return distance(switch_by_timestep(apply_fn, params, which))

    alone = mixed_with(multi_task, (0, 0))
    mixed = np.array(
        [mixed_with(specialist, boundaries[i : i + 2]) for i, specialist in enumerate(specialists)]
    )
    return TransferGap(alone, mixed, alone - mixed)


def interval_losses(
    apply_fn: ApplyFn,
    diffusion: GaussianDiffusion,
    x0: jax.Array,
    key: jax.Array,
    boundaries: np.ndarray,
    *,
    y: jax.Array | None = None,
    timesteps_each: int = 10,
) -> np.ndarray:
    """Mean loss of each interval, without loss weights, for images that the model may not know.

    The timesteps are evenly spaced in each interval and the noise depends on the key, the timestep
    and the image's place, so that models are compared on the very same tasks.

    Args:
      apply_fn: the network, ``(x, t, y) -> output``; a `jax.tree_util.Partial` over its parameters
        compiles once for all of them.
      diffusion: the noise process.
      x0: (M, H, W, C) images in [-1, 1].
      key: of the noise.
      boundaries: (k + 1,) of the intervals.
      y: (M,) labels or None.
      timesteps_each: so many timesteps an interval; a shorter one repeats some.

    Returns:
      (k,) float64, means over images and timesteps.
    """
    low, high = np.asarray(boundaries[:-1])[:, None], np.asarray(boundaries[1:])[:, None]
    middles = (np.arange(timesteps_each) + 0.5) / timesteps_each
    timesteps = np.floor(low + middles * (high - low)).astype(np.int32)
    losses = _timestep_losses(
        apply_fn if isinstance(apply_fn, Partial) else Partial(apply_fn),
        x0,
        y,
        key,
        jnp.asarray(timesteps.reshape(-1)),
        diffusion=_unweighted(diffusion),
    )
    return np.asarray(losses, np.float64).reshape(timesteps.shape).mean(1)


# Compiled functions are found again by the identity of the process.
@functools.lru_cache(maxsize=8)
def _unweighted(diffusion):
    return dataclasses.replace(diffusion, loss_weight=None)


@functools.partial(jax.jit, static_argnames="diffusion")
def _timestep_losses(apply_fn, x0, y, key, timesteps, *, diffusion):
    def loss(t):
        noise = jax.random.normal(jax.random.fold_in(key, t), x0.shape)
        t = jnp.full(x0.shape[:1], t)
        return diffusion.per_example_losses(apply_fn, x0, t, noise, y).mean()

    return jax.lax.map(loss, timesteps)
