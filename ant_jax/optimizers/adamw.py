"""AdamW: Adam with decoupled weight decay."""

from typing import Annotated

import optax

from ant_jax.optimizers.optimizer import Optimizer
from ant_jax.settings import Number


def adamw(
    learning_rate: optax.Schedule,
    weight_decay: float,
    mask=None,
    b1: Annotated[float, Number(0, 0.999999)] = 0.9,
    b2: Annotated[float, Number(0, 0.999999)] = 0.999,
    eps: Annotated[float, Number(above=0)] = 1e-8,
) -> Optimizer:
    """AdamW (Loshchilov and Hutter, *Decoupled Weight Decay Regularization*, ICLR 2019).

    Args:
      learning_rate: of each step.
      weight_decay: times the learning rate: the share of each parameter that a step removes.
      mask: ``params -> booleans``, the parameters that decay; None for all.
      b1: decay of the mean of the gradients.
      b2: decay of the mean of their squares.
      eps: added to the root of the mean square.
    """
    return Optimizer(
        optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay, mask=mask),
        entrywise=True,
    )
