"""Task affinity: how well the gradients of two denoising tasks agree.

Go et al., *Addressing Negative Transfer in Diffusion Models* (NeurIPS 2023, arXiv 2306.00354),
section 3.1: the cosine similarity of the mean gradients of the losses at two timesteps, averaged
over training (observation O1: it falls as the gap in timestep or in log-SNR widens). A matrix of
it is the input of gradient-based interval clustering, `clustering.gradient_costs`.

With P parameters and n timesteps the gradients are n x P numbers, too many for most models. Only
their inner products are needed, so each gradient is replaced by a short random `sketch` of itself
as soon as it is known.
"""

import functools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ant_jax.diffusion import GaussianDiffusion

SKETCH_SIZE = 2**17


class GapProfile(NamedTuple):
    """Affinity by the gap between two tasks; all arrays (b,), one entry for each nonempty bin.

    Attributes:
      centres: Centres of the bins, in the unit of the positions.
      mean: Mean affinity of the pairs in the bin.
      std: Their standard deviation (dividing by the count).
      count: Number of pairs, at least 1.
    """

    centres: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    count: np.ndarray


def task_affinity(
    apply_fn: Callable[..., jax.Array],
    params: Any,
    diffusion: GaussianDiffusion,
    x0: jax.typing.ArrayLike,
    timesteps: np.ndarray,
    key: jax.Array,
    *,
    y: jax.typing.ArrayLike | None = None,
    sketch_size: int | None = SKETCH_SIZE,
    microbatch: int | None = None,
) -> np.ndarray:
    """Cosines between the gradients of denoising tasks (Go et al. 2023, section 3.1).

    The gradient of task t is that of the mean training loss of all images at timestep t, loss
    weights and learned variance included. Every task sees the same images under the same noise, so
    that tasks differ by their timestep alone. The paper averages over training: take the
    `np.mean` of the matrices of several checkpoints. They share one compiled program if
    `apply_fn`, `diffusion` and all shapes are the same, and with a key for each the errors of
    their sketches are independent.

    Memory beyond the model's is n * sketch_size + O(P) numbers, or n * P for the exact form.

    Args:
      apply_fn: `(params, x_t, t, y) -> model output`, hashable; a new object compiles anew.
      params: Pytree of the P parameters.
      diffusion: The noise process and its loss.
      x0: (M, H, W, C) float32 images in [-1, 1].
      timesteps: (n,) integers in [0, T), the tasks to compare.
      key: Key of the noise and of the sketch.
      y: (M,) integer labels, given to the model as they are, or None.
      sketch_size: Length of the sketch of a gradient. Errors of the cosines have a standard
        deviation of at most about `1 / sqrt(sketch_size)`, 0.3 % by default (see `sketch`). None,
        like a size of P or more, keeps the n whole gradients: the exact form.
      microbatch: Number of images that are worked off at a time, a divisor of M; None is M. It
        changes memory and time, not the result.

    Returns:
      (n, n) float64, exactly symmetric, within [-1, 1], exactly 1 on the diagonal. A task whose
      gradient is zero has affinity 0 with every other one.

    Raises:
      ValueError: For arguments that are not as above, or if a gradient is not finite.
    """
    x0 = jnp.asarray(x0)
    if x0.ndim != 4 or not x0.size or not jnp.issubdtype(x0.dtype, jnp.floating):
        raise ValueError(
            f"x0 must be floating point of shape (M, H, W, C), not {x0.dtype} of {x0.shape}."
        )
    if y is not None and np.shape(y) != (len(x0),):
        raise ValueError(f"y must have shape ({len(x0)},) like the images, not {np.shape(y)}.")
    timesteps = np.asarray(timesteps)
    if timesteps.ndim != 1 or not timesteps.size or timesteps.dtype.kind not in "iu":
        raise ValueError(f"timesteps must be integers of shape (n,), not {timesteps!r}.")
    if timesteps.min() < 0 or timesteps.max() >= diffusion.num_timesteps:
        raise ValueError(f"timesteps must be in [0, {diffusion.num_timesteps}), not {timesteps!r}.")
    if sketch_size is not None:
        _check_integer("sketch_size", sketch_size)
    if microbatch is not None:
        _check_integer("microbatch", microbatch)
        if len(x0) % microbatch:
            raise ValueError(f"microbatch must divide the {len(x0)} images, not be {microbatch}.")
    gram = _gram(
        params,
        x0.astype(jnp.float32),
        timesteps.astype(np.int32),
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
    # The norms are those of the sketches too: for similar gradients their errors cancel those of
    # the inner product, and the cosine is better than it would be with the exact norms.
    norms = np.sqrt(gram.diagonal())
    products = np.outer(norms, norms)
    cosines = np.divide(
        (gram + gram.T) / 2, products, out=np.zeros_like(products), where=products > 0
    )
    np.fill_diagonal(cosines, 1)
    return np.clip(cosines, -1, 1)


@functools.partial(jax.jit, static_argnames=("apply_fn", "diffusion", "sketch_size", "microbatch"))
def _gram(params, x0, timesteps, key, y, *, apply_fn, diffusion, sketch_size, microbatch):
    """(n, n) inner products of the gradients, each scaled by a positive number of its own."""
    noise_key, sketch_key = jax.random.split(key)
    noise = jax.random.normal(noise_key, x0.shape)
    parts = jax.tree.map(lambda leaf: leaf.reshape(-1, microbatch, *leaf.shape[1:]), (x0, noise, y))
    exact = sketch_size is None or sketch_size >= _count(params)

    def loss_of(params, part, t):
        x0, noise, y = part
        losses = diffusion.per_example_losses(
            lambda x, t, y: apply_fn(params, x, t, y), x0, jnp.full(microbatch, t), noise, y
        )
        return losses.sum()

    def row(t):
        def add(total, part):
            return jax.tree.map(jnp.add, total, jax.grad(loss_of)(params, part, t)), None

        gradient, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), parts)
        numbers = _flatten(gradient) if exact else sketch(gradient, sketch_size, sketch_key)
        # Loss weights span many orders of magnitude; the squares must not leave float32.
        largest = jnp.max(jnp.abs(numbers))
        return numbers / jnp.where(largest == 0, 1, largest)

    rows = jax.lax.map(row, timesteps)
    return jnp.einsum("ip,jp->ij", rows, rows, precision="highest")


@functools.partial(jax.jit, static_argnames="size")
def sketch(tree: Any, size: int, key: jax.Array) -> jax.Array:
    """A short linear random image of a pytree that keeps inner products.

    The P numbers are cut into chunks of d = size consecutive ones; each chunk is multiplied by
    random signs, rolled cyclically by a random distance, and all chunks are added up. That is a
    CountSketch (Charikar, Chen & Farach-Colton, *Finding Frequent Items in Data Streams*, 2002)
    whose hash is one roll a chunk, so it needs no scatter and no table: two numbers of one chunk
    never collide, two of different chunks do with probability 1/d.

    Over keys, `<Sa, Sb>` has the mean `<a, b>`. Its error is the sum of
    `s_i s_j (a_i b_j + a_j b_i)` over the pairs {i, j} that collide; such terms are uncorrelated,
    because the signs s are independent. So with chunks a_c, b_c the variance is::

      (|a|^2 |b|^2 - sum_c |a_c|^2 |b_c|^2 + <a, b>^2 - sum_c <a_c, b_c>^2) / d

    and at most `(|a|^2 |b|^2 + <a, b>^2) / d`: as for feature hashing (Weinberger et al., *Feature
    Hashing for Large Scale Multitask Learning*, ICML 2009, lemma 2), less the pairs within a
    chunk. At `SKETCH_SIZE` the standard deviation is at most `sqrt(2 / d)` = 0.4 % of `|a| |b|`,
    so 2 % is five of them. The errors are nearly normal if many numbers contribute to the norms;
    if m of them do, two of those collide, with an error of the order of `|a| |b| / m`, with a
    probability of up to `m^2 / 2d`.

    Args:
      tree: Pytree of arrays with P numbers in all.
      size: Length d of the sketch, at least 1.
      key: Key of the signs and distances; sketches are comparable only if made with the same one.

    Returns:
      (size,) float32.
    """
    flat = _flatten(tree)
    chunks = jnp.pad(flat, (0, -flat.size % size)).reshape(-1, size)
    sign_key, roll_key = jax.random.split(key)
    distances = jax.random.randint(roll_key, (len(chunks),), 0, size)

    # The signs of one chunk live for one iteration: a table of them would have P entries.
    def add(total, numbered_chunk):
        i, chunk = numbered_chunk
        signs = jax.random.rademacher(jax.random.fold_in(sign_key, i), (size,), jnp.float32)
        return total + jnp.roll(signs * chunk, distances[i]), None

    return jax.lax.scan(add, jnp.zeros(size), (jnp.arange(len(chunks)), chunks))[0]


def timestep_grid(num_timesteps: int, n: int) -> np.ndarray:
    """Evenly spaced timesteps at which to measure the affinity.

    Args:
      num_timesteps: The number of timesteps T, at least 1.
      n: How many to choose, `1 <= n <= T`.

    Returns:
      (n,) distinct ascending integers from 0 to T - 1, both included; T // 2 alone for n = 1.

    Raises:
      ValueError: If an argument is not an integer as above.
    """
    _check_integer("num_timesteps", num_timesteps)
    _check_integer("n", n)
    if n > num_timesteps:
        raise ValueError(f"n must be at most the number of timesteps {num_timesteps}, not {n}.")
    if n == 1:
        return np.array([num_timesteps // 2])
    # Rounded in integers: equal remainders round alike, so that no two timesteps coincide.
    return (np.arange(n) * (num_timesteps - 1) + (n - 1) // 2) // (n - 1)


def interpolate(affinity: np.ndarray, timesteps: np.ndarray, num_timesteps: int) -> np.ndarray:
    """Affinity of all timesteps from that of a grid, for `clustering.gradient_costs`.

    Bilinear in the two timesteps and constant outside the grid. Between grid points the diagonal
    comes out below 1, as any other entry is interpolated; measured entries are unchanged.

    Boundaries of clusters move by about one cell of the grid if the affinity is smooth within a
    cell. They may move further, at little cost, where it is not: the log-SNR of a cosine schedule
    jumps at its two ends.

    Args:
      affinity: (n, n) the affinity of the grid, symmetric or not.
      timesteps: (n,) the grid: strictly increasing integers in [0, T), at least two unless T = 1.
      num_timesteps: The number of timesteps T.

    Returns:
      (T, T) float64.

    Raises:
      ValueError: If an argument is not as above, or `affinity` is not finite.
    """
    affinity, timesteps = _check_grid(affinity, timesteps, num_timesteps)
    if num_timesteps == 1:
        return affinity.copy()
    every = np.arange(num_timesteps)
    left = np.clip(np.searchsorted(timesteps, every, side="right") - 1, 0, len(timesteps) - 2)
    gap = timesteps[left + 1] - timesteps[left]
    fraction = np.clip((every - timesteps[left]) / gap, 0, 1)
    columns = (1 - fraction) * affinity[:, left] + fraction * affinity[:, left + 1]
    fraction = fraction[:, None]
    return (1 - fraction) * columns[left] + fraction * columns[left + 1]


def save(path: str | Path, affinity: np.ndarray, timesteps: np.ndarray, num_timesteps: int) -> None:
    """Writes a measured affinity as an .npz file; one that is there is replaced when all is done.

    Args:
      path: The file; folders above it are made.
      affinity: (n, n), as for `interpolate`.
      timesteps: (n,), as for `interpolate`.
      num_timesteps: The number of timesteps T.

    Raises:
      ValueError: If `interpolate` could not use the arguments.
    """
    affinity, timesteps = _check_grid(affinity, timesteps, num_timesteps)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    # Opened here, because np.savez adds a suffix to names.
    with partial.open("wb") as file:
        np.savez(file, affinity=affinity, timesteps=timesteps, num_timesteps=num_timesteps)
    partial.replace(path)


def load(path: str | Path, num_timesteps: int) -> np.ndarray:
    """Reads what `save` wrote and interpolates it to all timesteps.

    Args:
      path: The file.
      num_timesteps: The number of timesteps T of the run that is to use it.

    Returns:
      (T, T) float64, as returned by `interpolate`.

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: If the file is not a valid affinity, or was measured with another T.
    """
    with Path(path).open("rb") as file:
        try:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("a single array")
            arrays = dict(archive)
        except (ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is not an .npz file of arrays: {error}") from error
    missing = {"affinity", "timesteps", "num_timesteps"} - set(arrays)
    if missing:
        raise ValueError(f"{path} has no array {', '.join(sorted(missing))}.")
    measured = arrays["num_timesteps"]
    if not np.array_equal(measured, num_timesteps):
        raise ValueError(
            f"{path} was measured with T = {measured}, the config has T = {num_timesteps}."
        )
    try:
        return interpolate(arrays["affinity"], arrays["timesteps"], num_timesteps)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def affinity_by_gap(affinity: np.ndarray, positions: np.ndarray, bins: int = 20) -> GapProfile:
    """Mean and spread of the affinity of two tasks by the gap between them (O1 of Go et al. 2023).

    Args:
      affinity: (n, n) affinity; only pairs i < j are read.
      positions: (n,) positions of the tasks: their timesteps or log-SNR, not all equal.
      bins: Number of bins of equal width from 0 to the largest gap, at least 1.

    Returns:
      The profile, without empty bins, by ascending gap.

    Raises:
      ValueError: If an argument is not as above or not finite.
    """
    _check_integer("bins", bins)
    values, gaps = _pairs(affinity, positions)
    width = gaps.max() / bins
    if not width:
        raise ValueError("positions must not be all equal.")
    bin_of = np.minimum((gaps / width).astype(int), bins - 1)
    filled, bin_of, count = np.unique(bin_of, return_inverse=True, return_counts=True)
    mean = np.bincount(bin_of, values) / count
    std = np.sqrt(np.bincount(bin_of, (values - mean[bin_of]) ** 2) / count)
    return GapProfile((filled + 0.5) * width, mean, std, count)


def rank_correlation(affinity: np.ndarray, positions: np.ndarray) -> float:
    """Spearman's rank correlation of affinity and gap over all pairs of tasks (Spearman 1904).

    Args:
      affinity: (n, n) affinity; only pairs i < j are read.
      positions: (n,) positions of the tasks: their timesteps or log-SNR.

    Returns:
      The correlation in [-1, 1]; -1 if affinity always falls as the gap widens. Ties have their
      average rank.

    Raises:
      ValueError: If an argument is not as above or not finite, or if affinity or gap is the same
        for all pairs, so that there is no correlation.
    """
    ranks = []
    for name, values in zip(("affinity", "gap"), _pairs(affinity, positions), strict=True):
        _, rank_of, count = np.unique(values, return_inverse=True, return_counts=True)
        if len(count) == 1:
            raise ValueError(f"the {name} of all pairs is the same: no correlation is defined.")
        rank = (np.cumsum(count) - (count - 1) / 2)[rank_of]
        ranks.append(rank - rank.mean())
    a, b = ranks
    return float(np.clip(a @ b / np.sqrt((a @ a) * (b @ b)), -1, 1))


def _flatten(tree):
    """(P,) float32."""
    return jnp.concatenate([leaf.reshape(-1).astype(jnp.float32) for leaf in jax.tree.leaves(tree)])


def _count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _pairs(affinity, positions):
    """Affinities and gaps of the pairs i < j, (n (n - 1) / 2,) float64 each."""
    affinity = _square(affinity)
    positions = np.asarray(positions, np.float64)
    if positions.shape != affinity.shape[:1] or not np.isfinite(positions).all():
        raise ValueError(f"positions must be {len(affinity)} finite numbers, not {positions!r}.")
    if len(positions) < 2:
        raise ValueError("at least two tasks are needed to make a pair.")
    i, j = np.triu_indices(len(affinity), k=1)
    return affinity[i, j], np.abs(positions[i] - positions[j])


def _check_grid(affinity, timesteps, num_timesteps):
    _check_integer("num_timesteps", num_timesteps)
    affinity, timesteps = _square(affinity), np.asarray(timesteps)
    n = len(affinity)
    if timesteps.shape != (n,) or timesteps.dtype.kind not in "iu":
        raise ValueError(
            f"timesteps must be {n} integers, one for each row of affinity, not {timesteps!r}."
        )
    timesteps = timesteps.astype(np.int64)
    if timesteps[0] < 0 or timesteps[-1] >= num_timesteps or (np.diff(timesteps) <= 0).any():
        raise ValueError(
            f"timesteps must be strictly increasing in [0, {num_timesteps}), not {timesteps!r}."
        )
    if n < 2 and num_timesteps > 1:
        raise ValueError("one timestep is too few to interpolate from.")
    return affinity, timesteps


def _square(affinity):
    affinity = np.asarray(affinity, np.float64)
    if affinity.ndim != 2 or affinity.shape[0] != affinity.shape[1] or affinity.size == 0:
        raise ValueError(f"affinity must have shape (n, n) with n >= 1, not {affinity.shape}.")
    if not np.isfinite(affinity).all():
        raise ValueError("affinity must be finite.")
    return affinity


def _check_integer(name, value):
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, not {value!r}.")
