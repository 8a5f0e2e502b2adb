"""Measures task affinity: gradients of denoising tasks and their cosines.

With P parameters and n timesteps the gradients are n x P numbers, too many for most models. Only
their inner products are needed, so a short random `sketch` replaces each gradient at once.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ant_jax.diffusion import Process
from ant_jax.settings import check_integer

SKETCH_SIZE = 2**17


def task_affinity(
    apply_fn: Callable[..., jax.Array],
    params: Any,
    diffusion: Process,
    x0: jax.typing.ArrayLike,
    timesteps: np.ndarray,
    key: jax.Array,
    *,
    y: jax.typing.ArrayLike | None = None,
    sketch_size: int | None = SKETCH_SIZE,
    microbatch: int | None = None,
) -> np.ndarray:
    """Cosines between the gradients of denoising tasks (Go et al. 2023, section 3.1).

    The gradient of task t is the gradient of the mean training loss of all images at timestep t,
    with loss weights and learned variance. All tasks use the same images and the same noise, so
    they differ only in the timestep. The paper averages over training: to do so, take the
    `np.mean` of the matrices of several checkpoints. They share one compiled program if
    `apply_fn`, `diffusion` and all shapes are the same. Give each checkpoint its own key, so that
    the errors of the sketches are independent.

    The memory besides the model's is n * sketch_size + O(P) numbers, or n * P for the exact form.

    Args:
      apply_fn: `(params, x_t, t, y) -> model output`, hashable; a new object compiles again.
      params: Pytree of the P parameters.
      diffusion: The noise process and its loss.
      x0: (M, H, W, C) float32 images in [-1, 1].
      timesteps: (n,) noise levels of the process, the tasks to compare.
      key: Key of the noise and of the sketch.
      y: (M,) integer labels, passed to the model unchanged, or None.
      sketch_size: Length of the sketch of a gradient. The errors of the cosines have a standard
        deviation of at most about `1 / sqrt(sketch_size)`, 0.3 % by default (see `sketch`). None,
        or a size of P or more, keeps the n whole gradients: the exact form.
      microbatch: Number of images that are processed at a time, a divisor of M; None means M. It
        changes memory and time, not the result.

    Returns:
      (n, n) float64, exactly symmetric, within [-1, 1], exactly 1 on the diagonal. A task whose
      gradient is zero has affinity 0 with every other task.

    Raises:
      ValueError: If an argument is not as described, or if a gradient is not finite.
    """
    x0 = jnp.asarray(x0)
    if x0.ndim != 4 or not x0.size or not jnp.issubdtype(x0.dtype, jnp.floating):
        raise ValueError(
            f"x0 must be floating point of shape (M, H, W, C), not {x0.dtype} of {x0.shape}."
        )
    if y is not None and np.shape(y) != (len(x0),):
        raise ValueError(f"y must have shape ({len(x0)},) like the images, not {np.shape(y)}.")
    timesteps = np.asarray(timesteps)
    discrete = isinstance(diffusion.span, int)
    if (
        timesteps.ndim != 1
        or not timesteps.size
        or timesteps.dtype.kind not in "iuf"[: 3 - discrete]
    ):
        kind = "integers" if discrete else "numbers"
        raise ValueError(f"timesteps must be {kind} of shape (n,), not {timesteps!r}.")
    if timesteps.min() < 0 or timesteps.max() >= diffusion.span:
        raise ValueError(f"timesteps must be in [0, {diffusion.span}), not {timesteps!r}.")
    if sketch_size is not None:
        check_integer("sketch_size", sketch_size, 1)
    if microbatch is not None:
        check_integer("microbatch", microbatch, 1)
        if len(x0) % microbatch:
            raise ValueError(f"microbatch must divide the {len(x0)} images, not be {microbatch}.")
    gram = _gram(
        params,
        x0.astype(jnp.float32),
        timesteps.astype(np.int32 if discrete else np.float32),
        key,
        None if y is None else jnp.asarray(y),
        apply_fn=apply_fn,
        diffusion=diffusion,
        sketch_size=sketch_size,
        microbatch=microbatch or len(x0),
    )
    gram = np.asarray(gram, np.float64)
    bad = timesteps[~np.isfinite(gram.diagonal())]
    if bad.size:
        raise ValueError(f"the gradients at timesteps {bad.tolist()} are not finite.")
    # Use the norms of the sketches, not the exact norms: for similar gradients the errors of norms
    # and inner product cancel, which improves the cosine.
    norms = np.sqrt(gram.diagonal())
    products = np.outer(norms, norms)
    cosines = np.divide(
        (gram + gram.T) / 2, products, out=np.zeros_like(products), where=products > 0
    )
    np.fill_diagonal(cosines, 1)
    return np.clip(cosines, -1, 1)


@functools.partial(jax.jit, static_argnames=("apply_fn", "diffusion", "sketch_size", "microbatch"))
def _gram(params, x0, timesteps, key, y, *, apply_fn, diffusion, sketch_size, microbatch):
    """(n, n) inner products of the gradients; each gradient has a positive scale of its own."""
    noise_key, sketch_key = jax.random.split(key)
    noise = jax.random.normal(noise_key, x0.shape)
    parts = jax.tree.map(lambda leaf: leaf.reshape(-1, microbatch, *leaf.shape[1:]), (x0, noise, y))
    exact = sketch_size is None or sketch_size >= _count(params)

    def loss_of(params, part, t):
        x0, noise, y = part
        losses = diffusion.losses(
            lambda x, t, y: apply_fn(params, x, t, y), x0, jnp.full(microbatch, t), noise, y
        )
        return losses.sum()

    def row(t):
        def add(total, part):
            return jax.tree.map(jnp.add, total, jax.grad(loss_of)(params, part, t)), None

        gradient, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), parts)
        numbers = _flatten(gradient) if exact else sketch(gradient, sketch_size, sketch_key)
        # Loss weights span many orders of magnitude; their squares must not overflow float32.
        largest = jnp.max(jnp.abs(numbers))
        return numbers / jnp.where(largest == 0, 1, largest)

    rows = jax.lax.map(row, timesteps)
    return jnp.einsum("ip,jp->ij", rows, rows, precision="highest")


@functools.partial(jax.jit, static_argnames="size")
def sketch(tree: Any, size: int, key: jax.Array) -> jax.Array:
    """A short random linear map of a pytree that preserves inner products.

    The P numbers are cut into chunks of d = size consecutive numbers. Each chunk is multiplied by
    random signs and rolled cyclically by a random distance; the sketch is the sum of all chunks.
    This is a CountSketch (Charikar, Chen & Farach-Colton, *Finding Frequent Items in Data Streams*,
    2002) whose hash is one roll per chunk, so it needs no scatter and no table. Two numbers of the
    same chunk never collide; two of different chunks collide with probability 1/d.

    Over keys, `<Sa, Sb>` has the mean `<a, b>`. Its error is the sum of
    `s_i s_j (a_i b_j + a_j b_i)` over the pairs {i, j} that collide. These terms are uncorrelated,
    because the signs s are independent. So with chunks a_c, b_c the variance is::

      (|a|^2 |b|^2 - sum_c |a_c|^2 |b_c|^2 + <a, b>^2 - sum_c <a_c, b_c>^2) / d

    and at most `(|a|^2 |b|^2 + <a, b>^2) / d`: the variance of feature hashing (Weinberger et al.,
    *Feature Hashing for Large Scale Multitask Learning*, ICML 2009, lemma 2) without the pairs
    within a chunk. At `SKETCH_SIZE` the standard deviation is at most `sqrt(2 / d)` = 0.4 % of
    `|a| |b|`, so 2 % is five standard deviations. The errors are nearly normal if many numbers
    contribute to the norms. If only m numbers contribute, two of them collide with probability at
    most about `m^2 / 2d`, and the error is then of the order of `|a| |b| / m`.

    Args:
      tree: Pytree of arrays with P numbers in total.
      size: Length d of the sketch, at least 1.
      key: Key of the signs and distances; only sketches with the same key are comparable.

    Returns:
      (size,) float32.
    """
    flat = _flatten(tree)
    chunks = jnp.pad(flat, (0, -flat.size % size)).reshape(-1, size)
    sign_key, roll_key = jax.random.split(key)
    distances = jax.random.randint(roll_key, (len(chunks),), 0, size)

    # Draw the signs of a chunk inside the loop: a table of all signs would have P entries.
    def add(total, numbered_chunk):
        i, chunk = numbered_chunk
        signs = jax.random.rademacher(jax.random.fold_in(sign_key, i), (size,), jnp.float32)
        return total + jnp.roll(signs * chunk, distances[i]), None

    return jax.lax.scan(add, jnp.zeros(size), (jnp.arange(len(chunks)), chunks))[0]


def _flatten(tree):
    """(P,) float32."""
    return jnp.concatenate([leaf.reshape(-1).astype(jnp.float32) for leaf in jax.tree.leaves(tree)])


def _count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
