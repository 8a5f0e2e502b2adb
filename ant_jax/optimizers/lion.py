"""Lion: the sign of a momentum."""

from typing import Annotated

import optax

from ant_jax.optimizers.optimizer import Optimizer
from ant_jax.settings import Number


def lion(
    learning_rate: optax.Schedule,
    weight_decay: float,
    mask=None,
    b1: Annotated[float, Number(0, 0.999999)] = 0.9,
    b2: Annotated[float, Number(0, 0.999999)] = 0.99,
) -> Optimizer:
    """Lion (Chen et al., *Symbolic Discovery of Optimization Algorithms*, NeurIPS 2023).

    Every entry of an update has the size of the learning rate, so that is a third to a tenth of
    AdamW's, and the weight decay is 3 to 10 times AdamW's.

    Args:
      learning_rate: of each step.
      weight_decay: times the learning rate: the share of each parameter that a step removes.
      mask: ``params -> booleans``, the parameters that decay; None for all.
      b1: weight of the momentum, against the new gradient, in an update.
      b2: decay of the momentum.
    """
    return Optimizer(
        optax.lion(learning_rate, b1, b2, weight_decay=weight_decay, mask=mask), entrywise=True
    )
