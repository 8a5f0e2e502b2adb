"""The same learning rate at every step."""

import optax


def constant(learning_rate: float) -> optax.Schedule:
    """The same learning rate at every step."""
    return optax.constant_schedule(learning_rate)
