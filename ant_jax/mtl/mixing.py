"""PiKE: the share of each task in the batch, from gradients (Li et al., 2025)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from ant_jax.mtl.pooling import members
from ant_jax.mtl.weighting import BlockRule, State, Weighting, lifted
from ant_jax.settings import check_integer

# The blocks that a task has at least: one block shows no variance.
_LEAST = 2
# Of log-shares. A task with a share of 0 would never get a larger one.
_LEAST_LOG_SHARE = -9.0


class PikeState(NamedTuple):
    """State of `pike`.

    Attributes:
      state: the method's own.
      log_shares: (k,) float32, logarithms of the shares w, of sum 1.
      norms: (k,) float32, squared norms of the gradients, added since the last update.
      variances: (k,) float32, variances of the gradients of one example, added in the same way.
      count: int32, the number of calls.
    """

    state: State
    log_shares: jax.Array
    norms: jax.Array
    variances: jax.Array
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]


def pike(
    weighting: Weighting, rate: float, noise: float = 1.0, blocks: int = 4, every: int = 100
) -> Weighting:
    r"""PiKE: tasks with long and certain gradients get more examples.

    Every T steps, :math:`w_i \leftarrow w_i\, e^{\zeta_1 \| g_i \|^2 - \zeta_2 \sigma_i^2 / (2 B)}`
    divided by the sum, where :math:`\sigma_i^2` is the variance of the gradient of one example and
    B the size of the batch (Li et al., *PiKE: Adaptive Data Mixing for Large-Scale Multi-Task
    Learning Under Low Gradient Conflicts*, NeurIPS 2025, algorithm 1). w is the share of task i in
    the batch. The paper weighs all examples alike: that is `vanilla`. With another method, such as
    `nash`, the shares decide how exactly each gradient is known, and the method decides the
    weights.

    The batch is k ``blocks`` blocks of one size, each of one task. Each task has at least 2 of
    them, and the rest is shared by w. The gradients of the blocks of a task give both estimates,
    without bias. :math:`\| g_i \|^2` is the mean product of two different blocks. The mean squared
    norm of a block is larger, by :math:`\sigma_i^2` over the size of a block. The means over the T
    steps are used. The paper leaves the estimates open.

    The method keeps the gradients of all blocks instead of those of k tasks. A run on another
    number of devices differs by rounding, which may give a block to another task. In a loop of your
    own, draw the examples of a step by the tasks of its blocks, and pool::

      weighting = mtl.pike(mtl.vanilla(5), 1.0)
      state = mtl.init_combine(weighting)
      tasks = weighting.blocks.tasks(state.weighting_state)  # of the blocks, (20,)
      pooled = mtl.pooled(weighting, tasks)
      found = mtl.backward(losses_fn, params, batch, pooled, state, tasks=block_of_example)
      state = mtl.by_task(found, tasks, 5).state

    Args:
      weighting: the method.
      rate: :math:`\zeta_1`. Gradients have the scale of the losses.
      noise: :math:`\zeta_2 / \zeta_1`, in the paper's analysis about the product of the learning
        rate of SGD and the Lipschitz constant of the gradient.
      blocks: number of blocks divided by k.
      every: T.

    Returns:
      A `Weighting` that needs the Gram matrix, with `Weighting.blocks`.

    Raises:
      ValueError: if a setting is out of its range, or the method has blocks already.
    """
    if not (rate > 0 and noise >= 0):
        raise ValueError(f"rate must be > 0 and noise >= 0, got {rate} and {noise}")
    check_integer("blocks", blocks, _LEAST)
    check_integer("every", every, 1)
    if weighting.blocks is not None:
        raise ValueError("the method chooses the tasks of blocks already")
    k, n = weighting.k, blocks * weighting.k

    def init():
        zeros = jnp.zeros(k, jnp.float32)
        log_shares = jnp.full(k, -jnp.log(jnp.float32(k)))
        return PikeState(weighting.init(), log_shares, zeros, jnp.copy(zeros), jnp.int32(0))

    def weigh(stats, state):
        weights, inner = weighting.weigh(stats, state.state)
        return weights, state._replace(state=inner)

    def tasks(state):
        counts = blocks_of(jnp.exp(state.log_shares), n)
        return jnp.searchsorted(jnp.cumsum(counts), jnp.arange(n), side="right")

    def learn(state, stats, task_of_block):
        norms, variances = block_statistics(stats.gram, stats.counts, task_of_block, k)
        norms, variances, count = state.norms + norms, state.variances + variances, state.count + 1
        gain = (norms - noise * variances / (2 * stats.counts.sum())) * (rate / every)
        log_shares = jnp.maximum(jax.nn.log_softmax(state.log_shares + gain), _LEAST_LOG_SHARE)
        due = count % every == 0
        return PikeState(
            state.state,
            jnp.where(due, jax.nn.log_softmax(log_shares), state.log_shares),
            jnp.where(due, 0, norms),
            jnp.where(due, 0, variances),
            count,
        )

    return lifted(weighting)._replace(
        init=init,
        weigh=weigh,
        needs=weighting.needs | {"gram"},
        blocks=BlockRule(n, tasks, learn),
    )


def blocks_of(shares: jax.Array, n: int) -> jax.Array:
    """The numbers of blocks of k tasks, (k,) int of sum n: 2 each, and the rest by shares.

    The largest remainders are rounded up.

    Args:
      shares: (k,) of sum 1.
      n: number of blocks, at least 2 k.
    """
    rest = n - _LEAST * len(shares)
    whole = jnp.floor(shares * rest)
    ranks = jnp.argsort(jnp.argsort(whole - shares * rest))
    return _LEAST + whole.astype(jnp.int32) + (ranks < rest - whole.sum())


def block_statistics(
    gram: jax.Array, counts: jax.Array, task_of_block: jax.Array, k: int
) -> tuple[jax.Array, jax.Array]:
    """The squared norm of each task's gradient, and the variance of that of one example.

    Both are without bias, so the first may be negative.

    Args:
      gram: (n, n) Gram matrix of the gradients of blocks.
      counts: (n,) examples of each block, all equal.
      task_of_block: (n,) int, the task of each block; each task has 2 or more.
      k: number of tasks.

    Returns:
      Two arrays (k,).
    """
    member = members(task_of_block, k)
    number = member.sum(1)
    squares = jnp.where(member, jnp.diag(gram), 0).sum(1)
    pairs = jnp.where(member[:, :, None] & member[:, None, :], gram, 0).sum((1, 2)) - squares
    norms = pairs / (number * (number - 1))
    return norms, counts[0] * (squares / number - norms)
