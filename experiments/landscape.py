"""Every method on the landscape of the CAGrad paper: ``python -m experiments.landscape``.

Draws the paths of all weightings of ``ant_jax.mtl`` from three starting points, one panel for each
method, and prints where they end.
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from ant_jax import mtl, settings
from ant_jax.runtime.files import write_bytes
from experiments import report, runner

import matplotlib.pyplot as plt  # isort: skip  (after report, which chooses the backend)
from matplotlib.figure import Figure  # isort: skip
from matplotlib.lines import Line2D  # isort: skip

STARTS = np.array([[-8.5, 7.5], [-8.5, -5.0], [9.0, 9.0]], np.float32)
LEARNING_RATE, STEPS = 0.001, 100_000
# The Pareto set of the lower half: a segment between the minima of the two losses.
PARETO_X, PARETO_Y = (-7.0, 7.0), -8.3552
_POINTS = 500


class Paths(NamedTuple):
    """Paths from all starting points.

    Attributes:
      points: (starts, n, 2).
      losses: (starts, 2), the task losses at the end.
    """

    points: np.ndarray
    losses: np.ndarray


def task_losses(x: jax.Array) -> jax.Array:
    """The two losses at a point (Liu et al., CAGrad, NeurIPS 2021; from the authors' code).

    A constant of 21 is added to both, which changes no gradient: methods that divide by the losses
    need positive ones.

    Args:
      x: (2,).

    Returns:
      (2,) losses, positive.
    """
    a, b = x
    ridge = jnp.stack([0.5 * (-a - 7) - jnp.tanh(-b), 0.5 * (-a + 3) + jnp.tanh(-b) + 2])
    upper = jnp.log(jnp.maximum(jnp.abs(ridge), 5e-6)) + 6
    lower = ((-a + jnp.array([7.0, -7.0])) ** 2 + 0.1 * (-b - 8) ** 2) / 10 - 20
    share = jnp.tanh(b / 2)
    return jnp.maximum(share, 0) * upper + jnp.maximum(-share, 0) * lower + 21


def paths(weighting: mtl.Weighting, steps: int) -> Paths:
    """Follows a method by Adam from all starting points.

    Args:
      weighting: of two tasks.
      steps: number of steps.
    """
    tx = optax.chain(mtl.combine(weighting), optax.adam(LEARNING_RATE))
    every = max(steps // _POINTS, 1)

    def step(carry: Any, _) -> tuple[Any, None]:
        x, state = carry
        losses, stacked = task_losses(x), jax.jacrev(task_losses)(x)
        updates, state = tx.update(stacked, state, x, losses=losses)
        return (optax.apply_updates(x, updates), state), None

    def segment(carry, _):
        return jax.lax.scan(step, carry, length=every)[0], carry[0]

    @jax.jit
    def follow(x):
        (x, _), points = jax.lax.scan(segment, (x, tx.init(x)), length=steps // every)
        return jnp.concatenate([points, x[None]]), task_losses(x)

    # One after the other: a loop in a method then ends when this problem is solved.
    return Paths(*map(np.stack, zip(*map(follow, jnp.asarray(STARTS)), strict=True)))


def arrived(found: Paths) -> np.ndarray:
    """(starts,) bool, whether a path ends on the Pareto set, up to 0.1."""
    end = found.points[:, -1]
    inside = (PARETO_X[0] - 0.1 <= end[:, 0]) & (end[:, 0] <= PARETO_X[1] + 0.1)
    return inside & (np.abs(end[:, 1] - PARETO_Y) < 0.1)


def draw(results: dict[str, Paths]) -> Figure:
    """One panel for each method, over the contours of the mean loss, and a key below."""
    columns = min(6, len(results))
    rows = -(-len(results) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.3 * columns, 2.4 * rows), layout="constrained", squeeze=False
    )
    grid = np.linspace(-11, 11, 200)
    points = np.stack(np.meshgrid(grid, grid), -1).reshape(-1, 2)
    mean = np.asarray(jax.vmap(task_losses)(jnp.asarray(points))).mean(1).reshape(200, 200)
    for axis in axes.flat[len(results) :]:
        axis.set_axis_off()
    for axis, (name, found) in zip(axes.flat, results.items(), strict=False):
        axis.contour(grid, grid, mean, 12, linewidths=0.6, cmap="Greys_r")
        axis.plot(PARETO_X, (PARETO_Y, PARETO_Y), color="0.6", lw=4, solid_capstyle="butt")
        for path in found.points:
            time = np.linspace(0, 1, len(path))
            axis.scatter(*path.T, c=time, cmap="autumn", s=2, zorder=3)
            axis.plot(*path[0], "ko", ms=4, zorder=4)
            axis.plot(*path[-1], "k*", ms=7, zorder=4)
        axis.set(title=name, xlim=(-11, 11), ylim=(-11, 11), xticks=(), yticks=())
        axis.title.set_fontsize(9)
    mark = lambda marker, color, ms: Line2D([], [], ls="", marker=marker, color=color, ms=ms)
    key = {
        "start": mark("o", "k", 4),
        "first steps": mark("o", "red", 5),
        "last steps": mark("o", "yellow", 5),
        "end": mark("*", "k", 7),
        "Pareto set": Line2D([], [], color="0.6", lw=4),
        "mean loss (darker is lower)": Line2D([], [], color="0.4", lw=0.6),
    }
    figure.legend(key.values(), key.keys(), loc="outside lower center", ncols=3, fontsize=9)
    return figure


def main(argv: list[str]) -> None:
    out = runner.out_folder(argv, "landscape")
    write(out, settings.names_in(mtl, mtl.Weighting), STEPS)


def write(out: Path, names: list[str], steps: int) -> None:
    """Writes ``landscape.png``, ``landscape.csv`` and ``table.md``; prints the table.

    Args:
      out: folder.
      names: of the methods.
      steps: number of steps.
    """
    results = {}
    for name in tqdm(names, desc="methods"):
        results[name] = paths(settings.resolve(mtl, name, mtl.Weighting)(2), steps)
    report.save_figure(draw(results), out / "landscape.png")
    rows = [
        {
            "method": name,
            "start": " ".join(map(str, start)),
            "x": end[0],
            "y": end[1],
            "loss 1": losses[0],
            "loss 2": losses[1],
            "on the Pareto set": there,
        }
        for name, found in results.items()
        for start, end, losses, there in zip(
            STARTS.tolist(), found.points[:, -1], found.losses, arrived(found), strict=True
        )
    ]
    report.write_csv(out / "landscape.csv", rows)
    lines = [
        [name, f"{arrived(found).sum()} of {len(STARTS)}"]
        + [f"{losses[0]:.2f}, {losses[1]:.2f}" for losses in found.losses]
        for name, found in results.items()
    ]
    columns = ["method", "on the Pareto set"]
    columns += [f"losses from ({a:g}, {b:g})" for a, b in STARTS]
    table = report.markdown(columns, lines)
    write_bytes(out / "table.md", table.encode())
    print(f"\n{table}\npicture: {out / 'landscape.png'}")


if __name__ == "__main__":
    runner.start(main, presets=())
