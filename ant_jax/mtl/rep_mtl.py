"""Rep-MTL: losses on the saliencies of the shared features (Wang et al., 2025)."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

# A mean that is this much smaller than the mean of the absolute values, in units of the rounding
# error of the type, is 0 in exact arithmetic.
_CANCELLED = 32


class RepMTL(NamedTuple):
    """What `rep_mtl` has found.

    Attributes:
      total: what is minimised.
      losses: (k,), the task losses.
      entropy: mean entropy of the task shares, in 0 .. log k.
      alignment: the contrastive loss, which may be negative.
    """

    total: jax.Array
    losses: jax.Array
    entropy: jax.Array
    alignment: jax.Array


def rep_mtl(
    task_losses: Callable[[jax.Array], jax.Array],
    features: jax.Array,
    entropy_weight: float = 0.9,
    alignment_weight: float = 0.9,
    temperature: float = 0.1,
    task: int | None = None,
) -> RepMTL:
    r"""Rep-MTL: representation-level task saliency.

    :math:`\sum_i L_i + \lambda_1 H + \lambda_2 A`, where H and A are functions of the saliencies
    :math:`S_i = \partial L_i / \partial Z` of the shared features Z (Wang et al., *Rep-MTL:
    Unleashing the Power of Representation-level Task Saliency for Multi-Task Learning*, ICCV 2025,
    eq. 3 to 10). H is `task_entropy`, low if each position serves one task. A is
    `cross_task_alignment`, low if the saliencies of an example have similar second moments for all
    tasks, and different ones from other examples. The gradient of the total is of second order,
    since the saliencies are gradients. It costs about as much as k more backward passes through the
    heads, and their derivative::

      x = jax.random.normal(jax.random.key(0), (4, 6, 3))  # 4 examples of 6 tokens
      params = {"trunk": jnp.ones((3, 8)), "heads": jnp.ones((8, 2))}

      def loss(params):
          features = jnp.tanh(x @ params["trunk"])
          heads = lambda z: jnp.mean((jnp.tanh(z @ params["heads"]) - x[..., :2]) ** 2, (0, 1))
          return mtl.rep_mtl(heads, features).total

      gradient = jax.grad(loss)(params)

    Use it if all tasks share all examples, as in classical multi-task learning. It is not for tasks
    that are noise levels: there each example belongs to one task, the saliencies of the others are
    0, and H and its gradient are 0.

    The total has the sum of the losses, as in the paper, not their mean: the weights of the terms
    are relative to it. The paper's experiments take logarithms of the losses; ``task_losses`` may
    return those. The paper tries weights of 0.7 to 1.5 and uses 0.9 where they are fixed. It gives
    no temperature, and does not say which task i the term A takes. The authors have not released
    code. H and A alone: ``from ant_jax.mtl.rep_mtl import task_entropy, cross_task_alignment``.

    Args:
      task_losses: features to the task losses, (k,): the heads and their losses. The features must
        be their argument, since the saliencies are derivatives by it.
      features: Z, (B, C) or (B, ..., C): channels last, any number of axes of positions between.
        Use float32: the terms are functions of means, in which much of the saliencies may cancel.
      entropy_weight: :math:`\lambda_1`.
      alignment_weight: :math:`\lambda_2`.
      temperature: that of the contrastive loss.
      task: index of the one task that A compares, None for the mean over all.

    Raises:
      ValueError: if there are fewer than 2 examples, or the losses have another shape.
    """
    losses, pullback = jax.vjp(task_losses, features)
    if losses.ndim != 1:
        raise ValueError(f"task_losses must return k losses, got the shape {losses.shape}")
    (saliencies,) = jax.vmap(pullback)(jnp.eye(losses.size, dtype=losses.dtype))
    entropy = task_entropy(saliencies)
    alignment = cross_task_alignment(saliencies, temperature, task)
    total = losses.sum() + entropy_weight * entropy + alignment_weight * alignment
    return RepMTL(total, losses, entropy, alignment)


def task_entropy(saliencies: jax.Array) -> jax.Array:
    r"""How evenly the tasks share each position: the mean entropy of their shares.

    The share of task i at a position is :math:`P_i = |s_i| / \sum_j |s_j|`, with :math:`s_i` the
    mean of its saliency over the channels; the entropy is :math:`-\sum_i P_i \log P_i`. It does not
    depend on the scale of the saliencies.

    A position without saliency has entropy 0 and gradient 0. A mean that is 0 up to the rounding
    error of float32 counts as 0. If a head starts with layer normalisation, all its means are 0,
    and it has no part in the entropy.

    Args:
      saliencies: (k, B, ..., C).
    """
    size = jnp.abs(_mean(_float32(saliencies), -1))
    # The shares do not depend on the scale. Without it the squares in their derivative underflow.
    size = size / _scale(size, 0)
    total = _nonzero(size.sum(0))
    logarithms = jnp.log(jnp.where(size > jnp.finfo(size.dtype).tiny, size, 1))
    # The entropy of size / total, in the form whose derivative is exactly 0 for one task alone.
    return (jnp.log(total) - (size * logarithms).sum(0) / total).mean()


def cross_task_alignment(
    saliencies: jax.Array, temperature: float, task: int | None = None
) -> jax.Array:
    r"""A contrastive loss that aligns the tasks on each example.

    :math:`S_{ib}`, (C, N), is the saliency of task i on example b at N positions. The anchor
    :math:`A_b`, (C, k), holds its means over the positions. The similarities are cosines of
    matrices of (C, C):

    .. math:: p_{ib} = \cos(A_b A_b^T, S_{ib} S_{ib}^T), \quad
       q_{bc} = \cos(A_b A_b^T, A_c A_c^T).

    The loss is the mean over the examples b of
    :math:`\log \sum_{c \ne b} \exp(q_{bc} / \tau) - p_{ib} / \tau`. The printed equation leaves i
    free. Here the mean over the tasks is taken, or i is ``task``. The cosines are computed without
    the matrices of (C, C) if there are fewer positions than channels.

    Where a saliency or an anchor is 0, the cosine and its gradient are 0. A mean over the positions
    that is 0 up to the rounding error of float32 counts as 0.

    Args:
      saliencies: (k, B, ..., C).
      temperature: :math:`\tau`.
      task: index of the one task i that is aligned with the anchor, None for all.

    Raises:
      ValueError: if there are fewer than 2 examples.
    """
    k, examples, *_, channels = saliencies.shape
    if examples < 2:
        raise ValueError(f"the alignment compares examples: it needs 2 or more, got {examples}")
    each = _float32(saliencies).reshape(k, examples, -1, channels)
    anchors = _mean(each / _scale(each, (0, 2, 3)), 2)
    anchors = anchors / _scale(anchors, (0, 2))
    each = each / _scale(each, (2, 3))

    # <X X^T, Y Y^T> is the squared norm of X^T Y.
    products = _dot("ibc,jdc->bdij", anchors, anchors)
    products = (products * products).sum((2, 3))
    anchor_norms = _root(jnp.diag(products))
    of_anchors = products / _nonzero(anchor_norms[:, None] * anchor_norms)

    mixed = _dot("jbc,ibnc->ibjn", anchors, each)
    positions = each.shape[2]
    gram = "ibnc,ibmc->ibnm" if positions < channels else "ibnc,ibnd->ibcd"
    squares = _dot(gram, each, each)
    norms = _root((squares * squares).sum((2, 3)))
    positive = (mixed * mixed).sum((2, 3)) / _nonzero(norms * anchor_norms)
    positive = positive.mean(0) if task is None else positive[task]

    others = ~jnp.eye(examples, dtype=bool)
    negatives = jax.nn.logsumexp(of_anchors / temperature, axis=1, where=others)
    return jnp.mean(negatives - positive / temperature)


def _float32(saliencies):
    return saliencies.astype(jnp.promote_types(saliencies.dtype, jnp.float32))


def _dot(subscripts, *operands):
    return jnp.einsum(subscripts, *operands, precision="highest")


def _mean(values, axis):
    """The mean, 0 where it is rounding error."""
    mean = values.mean(axis)
    least = _CANCELLED * jnp.finfo(values.dtype).eps * jnp.abs(values).mean(axis)
    return jnp.where(jnp.abs(mean) > least, mean, 0)


def _scale(values, axes):
    """The largest absolute value, 1 where it is 0; a constant of the derivative."""
    largest = jnp.abs(values).max(axes, keepdims=True)
    return jax.lax.stop_gradient(jnp.where(largest > 0, largest, 1))


def _nonzero(values):
    return jnp.where(values > 0, values, 1)


def _root(values):
    """The square root, 0 with derivative 0 at 0."""
    return jnp.where(values > 0, jnp.sqrt(_nonzero(values)), 0)
