"""The optimizer of a config: AdamW, its schedule, and parameters that stay as they are."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import keystr
from ml_collections import ConfigDict

from ant_jax.mtl.shards import global_sum


def build_optimizer(
    config: ConfigDict,
    learning_rate: float | jax.Array | None = None,
    axis_name: str | None = None,
) -> optax.GradientTransformation:
    """AdamW with warm-up; with ``clip_norm``, the combined gradient is clipped first.

    It treats every entry of the parameters alone, but for the norm.

    Args:
      config: the run's config.
      learning_rate: used instead of the config's; may be traced.
      axis_name: name of the mapped axis over which the gradients are split, if they are.
    """
    settings = config.optimizer
    if learning_rate is None:
        learning_rate = settings.learning_rate
    schedule = optax.constant_schedule(learning_rate)
    if settings.schedule == "cosine":
        decay_steps = max(config.num_steps - settings.warmup_steps, 1)
        schedule = optax.cosine_decay_schedule(learning_rate, decay_steps)
    if settings.warmup_steps:
        warmup = optax.linear_schedule(0, learning_rate, settings.warmup_steps)
        schedule = optax.join_schedules([warmup, schedule], [settings.warmup_steps])
    optimizer = optax.adamw(schedule, weight_decay=settings.weight_decay)
    if settings.clip_norm:
        optimizer = optax.chain(_clip_by_global_norm(settings.clip_norm, axis_name), optimizer)
    if settings.frozen:
        # Frozen parameters need no moments.
        optimizer = optax.partition(
            {True: optax.set_to_zero(), False: optimizer},
            lambda params: frozen(params, settings.frozen),
        )
    return optimizer


def _clip_by_global_norm(max_norm, axis_name):
    """`optax.clip_by_global_norm` of gradients that are split over devices."""

    def update(updates, state, params=None):
        del params
        norm = jnp.sqrt(global_sum(optax.tree.norm(updates, squared=True), axis_name))
        clip = lambda leaf: jnp.where(norm < max_norm, leaf, leaf / norm * max_norm)
        return jax.tree.map(clip, updates), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def frozen(params: Any, pattern: str) -> Any:
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
        frozen(params, pattern),
    )
