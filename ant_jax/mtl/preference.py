"""The preference vector: how the losses should relate to each other."""

from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from ant_jax.settings import Check, Number


def _are_positive(values):
    number = lambda value: isinstance(value, int | float) and not isinstance(value, bool)
    return all(number(value) and Number(above=0).holds(value) for value in values)


Preference = Annotated[tuple, Check(_are_positive, "() or k numbers > 0 as '(0.3, 0.7)'")]


def preference_vector(k: int, preference: tuple) -> np.ndarray:
    """The preference as float32 of shape (k,), of sum 1; uniform for ``()``.

    Raises:
      ValueError: unless there are k finite numbers > 0, or none.
    """
    vector = np.asarray(preference, np.float32)
    vector = vector if vector.size else np.ones(k, np.float32)
    if vector.shape != (k,) or not ((vector > 0) & (vector < np.inf)).all():
        raise ValueError(f"preference must be {k} finite numbers > 0, got {preference}")
    return vector / vector.sum()


def restricted(preference: np.ndarray, present: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The preference (k,) among the tasks that are present, once of sum 1 and once of length 1."""
    p = jnp.where(present, preference, 0)
    some = present.any()
    p = p / jnp.where(some, p.sum(), 1)
    return p, p / jnp.where(some, jnp.sqrt(jnp.sum(p * p)), 1)
