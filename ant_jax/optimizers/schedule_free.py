"""Schedule-free AdamW: an average of the parameters instead of a decaying learning rate."""

from typing import Annotated

import optax
from optax.contrib import schedule_free_eval_params

from ant_jax.optimizers.optimizer import Optimizer
from ant_jax.settings import Number


def schedule_free(
    learning_rate: optax.Schedule,
    weight_decay: float,
    mask=None,
    b1: Annotated[float, Number(above=0, high=1)] = 0.9,
    b2: Annotated[float, Number(0, 0.999999)] = 0.999,
    eps: Annotated[float, Number(above=0)] = 1e-8,
    power: Annotated[float, Number(0)] = 2.0,
) -> Optimizer:
    """Schedule-free AdamW (Defazio et al., *The Road Less Scheduled*, NeurIPS 2024).

    AdamW without momentum moves z. The average x of all z is evaluated. The gradient is taken at
    y = b1 x + (1 - b1) z. Good learning rates are 1 to 10 times those of AdamW.

    Args:
      learning_rate: of each step.
      weight_decay: times the learning rate: the share of each parameter of y that a step removes.
      mask: ``params -> booleans``, the parameters that decay; None for all.
      b1: weight of x in y.
      b2: decay of the mean of the squares of the gradients.
      eps: added to the root of the mean square.
      power: z counts in the average by the largest learning rate so far to this power.
    """
    # As in `optax.contrib.schedule_free_adamw`, which has no mask.
    moves = optax.chain(
        optax.scale_by_rms(b2, eps, eps_in_sqrt=False, bias_correction=True),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
    averaging = optax.contrib.schedule_free(moves, learning_rate, b1, power)
    return Optimizer(averaging, entrywise=True, eval_params=schedule_free_eval_params)
