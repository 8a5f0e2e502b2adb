"""The type of a weighting: a rule that chooses the cotangent of the task losses."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ant_jax.settings import check_integer, settings_of

State = Any


class WeighError(ValueError):
    """A method does not return what `Weighting.weigh` must return."""


class TaskStats(NamedTuple):
    """What a method may see of k tasks, in float32; what it does not need may be None.

    Attributes:
      losses: (k,), 0 for a task that is absent.
      gram: (k, k) Gram matrix of the gradients of the losses, ``J J^T``.
      counts: (k,) examples of each task. A task with none is absent.
    """

    losses: jax.Array | None
    gram: jax.Array | None
    counts: jax.Array

    @property
    def present(self) -> jax.Array:
        """(k,) bool, whether a task has examples."""
        return self.counts > 0


class LevelRule(NamedTuple):
    """How a method weighs each example by its level, beside the tasks; see `level_uncertainty`.

    Attributes:
      weights: ``(state, levels (B,)) -> (B,)``, factors of the losses of the examples.
      gradient: ``(state, levels (B,), losses (B,)) -> pytree``, what the method learns from the
        losses without these factors, summed over the examples.
      update: ``(state, gradient) -> state``, by the mean of the gradients over all examples.
    """

    weights: Callable[[State, jax.Array], jax.Array]
    gradient: Callable[[State, jax.Array, jax.Array], Any]
    update: Callable[[State, Any], State]


class BlockRule(NamedTuple):
    """How a method chooses the tasks of n blocks of examples; see `pike`.

    Attributes:
      n: number of blocks of a batch, all of one size.
      tasks: ``(state) -> (n,)`` int, the task of each block of the next batch.
      learn: ``(state, stats, tasks) -> state``, from the `TaskStats` of the n blocks and the task
        of each.
    """

    n: int
    tasks: Callable[[State], jax.Array]
    learn: Callable[[State, TaskStats, jax.Array], State]


class Weighting(NamedTuple):
    """A multi-task method as an (init, weigh) pair on k-sized quantities.

    Every method's update direction is ``J^T w`` with ``J`` the k x P Jacobian of the task losses; a
    method only chooses ``w``. Nothing of size P enters it.

    Attributes:
      init: ``() -> state``; the state is any pytree of arrays and is checkpointed.
      weigh: ``(stats, state) -> (weights (k,), state)``, pure and jittable, in float32. Absent
        tasks get weight 0, and their part of the state does not change. It may ignore losses and
        gradients that are not finite: `combine` and `backward` discard the resulting state.
      k: number of tasks.
      needs: which of "losses" and "gram" `weigh` reads. Without "gram" one backward pass is enough.
      levels: weights of the examples by their level; None for none. Only `backward` applies them.
      blocks: the choice of the tasks that the examples are drawn from; None for none. The loop
        draws them and gives `backward` the `pooled` method.
    """

    init: Callable[[], State]
    weigh: Callable[[TaskStats, State], tuple[jax.Array, State]]
    k: int
    needs: frozenset[str]
    levels: LevelRule | None = None
    blocks: BlockRule | None = None


def check_arguments(method: Callable, k: int, **values: Any) -> None:
    """Raises a ValueError unless k is an integer >= 1 and values are what their annotations allow.

    Args:
      method: a component; its annotations give the ranges of its settings.
      k: number of tasks.
      **values: settings by name. JAX arrays, which may be traced, are not checked.
    """
    check_integer("k, the number of tasks,", k, 1)
    others = inspect.signature(method).parameters.keys() - values
    for name, setting in settings_of(method, others).items():
        value = values[name]
        value = value.item() if isinstance(value, np.generic) else value
        problem = None if isinstance(value, jax.Array) else setting.problem(value)
        if problem:
            raise ValueError(f"{name} must be {problem}, got {value!r}")


def check_needs(weighting: Weighting) -> None:
    """Raises a ValueError if a method needs something else than "losses" and "gram"."""
    if unknown := set(weighting.needs) - {"losses", "gram"}:
        raise ValueError(
            f"needs must be some of 'losses' and 'gram', got {', '.join(map(repr, unknown))}"
        )


def check_result(weighting: Weighting, result: Any) -> None:
    """Raises a WeighError unless a result of `Weighting.weigh` is weights (k,) and a state."""
    weigh, k = weighting.weigh, weighting.k
    name = getattr(weigh, "__qualname__", type(weigh).__qualname__).partition(".<locals>")[0]
    must = f"weigh of {weigh.__module__}.{name} must return weights of shape (k,) = ({k},) and a "
    if not isinstance(result, tuple) or len(result) != 2:
        count = len(result) if isinstance(result, tuple) else 1
        raise WeighError(f"{must}state, got {count} value(s)")
    if jnp.shape(result[0]) != (k,):
        raise WeighError(f"{must}state, got weights of shape {jnp.shape(result[0])}")


def lifted(weighting: Weighting) -> Weighting:
    """The method whose rules find its state in the field ``state`` of a wrapper's state."""
    if (levels := weighting.levels) is not None:
        of_level = LevelRule(
            lambda state, of: levels.weights(state.state, of),
            lambda state, *found: levels.gradient(state.state, *found),
            lambda state, gradient: state._replace(state=levels.update(state.state, gradient)),
        )
        weighting = weighting._replace(levels=of_level)
    if (blocks := weighting.blocks) is not None:
        of_block = BlockRule(
            blocks.n,
            lambda state: blocks.tasks(state.state),
            lambda state, *found: state._replace(state=blocks.learn(state.state, *found)),
        )
        weighting = weighting._replace(blocks=of_block)
    return weighting


def refuse_rules(weighting: Weighting) -> None:
    """Raises a ValueError if a method has `levels` or `blocks`, for functions that see neither."""
    if weighting.levels is not None:
        raise ValueError("the method weighs examples by their level: only mtl.backward does that")
    if weighting.blocks is not None:
        raise ValueError("the method chooses the tasks of blocks: only mtl.pooled does that")
