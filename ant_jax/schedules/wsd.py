"""Warm-up, stable, decay: constant, with a linear decay at the end."""

from typing import Annotated

import optax

from ant_jax.settings import Integer, Number


def wsd(
    learning_rate: float,
    num_steps: int,
    decay_steps: Annotated[int, Integer(1)] = 500,
    final: Annotated[float, Number(0, 1)] = 0.0,
) -> optax.Schedule:
    """Warm-up, stable, decay: constant, with a linear decay at the end.

    After Hu et al., *MiniCPM*, COLM 2024, with the linear decay of Hägele et al., *Scaling Laws and
    Compute-Optimal Training Beyond Fixed Training Durations*, NeurIPS 2024. A finished run has
    decayed and can't train on: begin another run with ``config.init_from``.

    Args:
      learning_rate: before the decay.
      num_steps: number of steps.
      decay_steps: steps of the decay, the last ones.
      final: the last learning rate, as a share of the first one.

    Raises:
      ValueError: if the decay is longer than the run.
    """
    if decay_steps > num_steps:
        raise ValueError(
            f"decay_steps = {decay_steps} must not exceed the {num_steps} steps after the warm-up"
        )
    stable = optax.constant_schedule(learning_rate)
    decay = optax.linear_schedule(learning_rate, final * learning_rate, decay_steps)
    return optax.join_schedules([stable, decay], [num_steps - decay_steps])
