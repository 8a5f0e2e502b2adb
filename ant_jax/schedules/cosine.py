"""Half a cosine over the whole run."""

from typing import Annotated

import optax

from ant_jax.settings import Number


def cosine(
    learning_rate: float, num_steps: int, final: Annotated[float, Number(0, 1)] = 0.0
) -> optax.Schedule:
    """Half a cosine over the whole run (Loshchilov and Hutter, *SGDR*, ICLR 2017).

    A finished run has decayed and can't train on: begin another run with ``config.init_from``.

    Args:
      learning_rate: at the first step.
      num_steps: number of steps.
      final: the last learning rate, as a share of the first one.
    """
    return optax.cosine_decay_schedule(learning_rate, num_steps, final)
