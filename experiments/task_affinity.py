"""O1, task affinity falls with the gap: ``python -m experiments.task_affinity --preset digits``.

Trains vanilla, measures the cosines between the gradients of denoising tasks at several
checkpoints, and draws their mean over timesteps, over log-SNR and against the gap. For gradient
clusters (``config.clusters.name = "gradient"``), set ``config.clusters.affinity`` to the resulting
``affinity.npz``.
"""

from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np
from absl import logging

from ant_jax import config as config_lib
from ant_jax import dataset, models, results
from ant_jax.runtime.files import write_bytes, writing
from ant_jax.tasks import affinity, clustering
from ant_jax.tasks.clusters import level_boundaries, levels
from experiments import report, runner
from experiments.presets import PRESETS, Preset
from experiments.runner import Run


def main(argv):
    preset, out = runner.choose(argv, PRESETS)
    runs = plan(preset)
    if runner.DRY_RUN.value:
        runner.print_plan({"vanilla training": runs}, out, preset)
        return
    write_report(preset, out, measure(preset, out))


def plan(preset: Preset) -> list[Run]:
    """The training runs whose gradients are compared."""
    return [runner.make_run(preset, "vanilla", "snr", seed) for seed in preset.seeds]


def path_of(out: Path) -> Path:
    """The path of the mean affinity."""
    return out / "task_affinity" / "affinity.npz"


def measure(preset: Preset, out: Path) -> list[np.ndarray]:
    """Trains, measures and saves the mean; returns one (n, n) matrix per seed."""
    runs = plan(preset)
    runner.finished(runs, out, "vanilla training")
    arguments = [(run, preset, out) for run in runs]
    matrices = [np.array(rows) for rows in runner.parallel(_of_run, arguments, "affinity")]
    num_timesteps = len(levels(config_lib.build_process(runs[0].config)))
    grid = affinity.timestep_grid(num_timesteps, preset.affinity_grid)
    with writing(path_of(out)) as file:
        affinity.save(file, np.mean(matrices, 0), grid, num_timesteps)
    return matrices


def _of_run(run, preset, out):
    """(n, n) mean over the checkpoints of a run; stored in a file."""
    every = levels(config_lib.build_process(run.config))
    grid = affinity.timestep_grid(len(every), preset.affinity_grid)
    source = {
        "run": runner.made_from(run),
        "steps": run.steps,
        "grid": grid.tolist(),
        "images": preset.affinity_images,
    }
    make = lambda: of_levels(run, out, every[grid], preset.affinity_images).tolist()
    return runner.kept(out / "task_affinity" / f"{run.name}.json", source, make)


def of_levels(run: Run, out: Path, where: np.ndarray, images: int) -> np.ndarray:
    """(n, n) task affinity of n noise levels, the mean over the measured steps of a run.

    Args:
      run: a finished run.
      out: the folder of the output.
      where: (n,) noise levels of the run's process.
      images: number of training images.
    """
    x0, labels = dataset.images(run.config, run.config.data.split, images)
    matrices = []
    for step in run.steps:
        _, setup, params = results.restore_run(
            run.config, runner.folder(run, out), step, average=False
        )
        matrix = affinity.task_affinity(
            setup.model.apply,
            {"params": params},
            setup.process,
            x0,
            where,
            jax.random.key(step),
            y=labels if models.num_classes(setup.model) else None,
            microbatch=min(len(x0), run.config.data.batch_size),
        )
        matrices.append(matrix)
    return np.mean(matrices, 0)


def write_report(preset: Preset, out: Path, matrices: list[np.ndarray]) -> dict[str, Any]:
    """Writes the tables and the picture; returns the rank correlations for each kind of gap."""
    folder = out / "task_affinity"
    config = plan(preset)[0].config
    process = config_lib.build_process(config)
    every = levels(process)
    grid = affinity.timestep_grid(len(every), preset.affinity_grid)
    positions = {"timestep": every[grid], "log-SNR": process.log_snr(every[grid])}
    correlations = {
        name: [affinity.rank_correlation(matrix, where) for matrix in matrices]
        for name, where in positions.items()
    }
    report.write_csv(
        folder / "rank_correlation.csv",
        [
            {"seed": seed} | {name: values[i] for name, values in correlations.items()}
            for i, seed in enumerate(preset.seeds)
        ],
    )
    mean = np.mean(matrices, 0)
    profiles = {name: affinity.affinity_by_gap(mean, where) for name, where in positions.items()}
    report.write_csv(
        folder / "affinity_by_gap.csv",
        [
            {"gap in": name, "gap": centre, "mean affinity": m, "standard deviation": s, "pairs": n}
            for name, profile in profiles.items()
            for centre, m, s, n in zip(*profile, strict=True)
        ],
    )
    rows = [
        [f"difference of {name}", report.mean_and_deviation(values, 3)]
        for name, values in correlations.items()
    ]
    table = report.markdown(["gap", "Spearman's rank correlation with affinity"], rows)
    write_bytes(folder / "table.md", table.encode())
    print(f"\n{table}")
    report.save_figure(
        _draw(config, process, mean, grid, profiles, correlations), folder / "affinity.png"
    )
    logging.info("picture: %s", folder / "affinity.png")
    logging.info("for config.clusters.affinity: %s", path_of(out))
    return correlations


def _draw(config, process, matrix, grid, profiles, correlations):
    figure, axes = plt.subplots(2, 2, figsize=(11, 9), layout="constrained")
    every = levels(process)
    for ax, where, name in (
        (axes[0, 0], every[grid], "timestep t"),
        (axes[0, 1], process.log_snr(every[grid]), "log-SNR"),
    ):
        mesh = ax.pcolormesh(
            where, where, matrix, shading="nearest", vmin=min(0, matrix.min()), vmax=1
        )
        ax.set(title=f"task affinity over {name}", xlabel=name, ylabel=name, aspect="equal")
    figure.colorbar(mesh, ax=axes[0], label="cosine of mean gradients")
    k = config.clusters.k
    full = affinity.interpolate(matrix, grid, len(every))
    clusters = {
        "SNR": (clustering.snr_costs(process.log_snr(every)), "white"),
        "gradient": (clustering.gradient_costs(full), "red"),
    }
    for name, (cost, colour) in clusters.items():
        for i, boundary in enumerate(
            level_boundaries(process, clustering.interval_clusters(cost, k))[1:-1]
        ):
            label = None if i else f"{name} clusters"
            axes[0, 0].axvline(boundary, color=colour, lw=0.8, label=label)
    axes[0, 0].legend(facecolor="grey", fontsize="small", loc="upper left")
    for ax, (name, profile) in zip(axes[1], profiles.items(), strict=True):
        ax.plot(profile.centres, profile.mean)
        ax.fill_between(
            profile.centres, profile.mean - profile.std, profile.mean + profile.std, alpha=0.25
        )
        rho = report.mean_and_deviation(correlations[name], 2)
        ax.set(
            title=f"Spearman's rank correlation {rho}",
            xlabel=f"|difference of {name}|",
            ylabel="mean affinity, band: standard deviation",
        )
    return figure


if __name__ == "__main__":
    runner.start(main)
