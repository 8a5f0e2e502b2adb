"""Optimizers of the combined gradient that a config can name, one file each, by optax.

An optimizer is a function of its settings that returns an `Optimizer`.
"""

from ant_jax.optimizers.by_name import matching, stop_gradients
from ant_jax.optimizers.optimizer import Optimizer, clipped, freezing

__all__ = ["Optimizer", "clipped", "freezing", "matching", "stop_gradients"]
