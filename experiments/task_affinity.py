"""O1, task affinity falls with the gap: ``python -m experiments.task_affinity --preset digits``.

Trains vanilla, takes the cosines between the gradients of denoising tasks at several checkpoints,
and draws their mean over timesteps, over log-SNR and against the gap. The ``affinity.npz`` is what
``config.clusters.cost = "gradient"`` reads as ``config.clusters.affinity``.
"""

from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np
from absl import app, logging

from ant_jax import affinity, builders, clustering, evaluate, experiment
from ant_jax.files import write_bytes
from ant_jax.metrics import quiet_console
from experiments import report, runner
from experiments.presets import PRESETS, Preset
from experiments.runner import Run


def main(argv):
    del argv
    quiet_console()
    preset, out = runner.choose(PRESETS)
    runs = plan(preset)
    if runner.DRY_RUN.value:
        runner.print_plan({"vanilla training": runs}, out, preset)
        return
    measure(preset, out)
    measured = [_of_run(run, preset, out) for run in runs]
    write_report(preset, out, measured)


def plan(preset: Preset) -> list[Run]:
    """The training runs whose gradients are compared."""
    return [runner.make_run(preset, "vanilla", "snr", seed) for seed in preset.seeds]


def measure(preset: Preset, out: Path) -> Path:
    """Trains and measures what is not there yet; returns the path of the mean affinity."""
    path = out / "task_affinity" / "affinity.npz"
    runs = plan(preset)
    runner.execute(runs, out, "vanilla training")
    if not path.exists():
        arguments = [(run, preset, out) for run in runs]
        matrices = runner.parallel(_of_run, arguments, "affinity")
        num_timesteps = runs[0].config.diffusion.timesteps
        affinity.save(path, np.mean(matrices, 0), _grid(preset, num_timesteps), num_timesteps)
    return path


def _grid(preset, num_timesteps):
    return affinity.timestep_grid(num_timesteps, preset.affinity_grid)


def _of_run(run, preset, out) -> np.ndarray:
    """(n, n) mean over the run's checkpoints; kept in a file."""
    num_timesteps = run.config.diffusion.timesteps
    grid = _grid(preset, num_timesteps)
    path = out / "task_affinity" / f"{run.name}.npz"
    if not path.exists():
        x0, labels = experiment.images(run.config, run.config.data.split, preset.affinity_images)
        matrices = []
        for step in run.steps:
            _, pieces, state = evaluate.restore_run(run.config, runner.folder(run, out), step)
            matrix = affinity.task_affinity(
                pieces.model.apply,
                {"params": state.params},
                pieces.process,
                x0,
                grid,
                jax.random.key(step),
                y=labels if pieces.model.num_classes else None,
                microbatch=min(len(x0), run.config.data.batch_size),
            )
            matrices.append(matrix)
        affinity.save(path, np.mean(matrices, 0), grid, num_timesteps)
    with np.load(path) as arrays:
        return arrays["affinity"]


def write_report(preset: Preset, out: Path, matrices: list[np.ndarray]) -> dict[str, Any]:
    """Writes the tables and the picture; returns the rank correlations by measure of the gap."""
    folder = out / "task_affinity"
    config = plan(preset)[0].config
    process = builders.build_diffusion(config)
    grid = _grid(preset, process.num_timesteps)
    positions = {"timestep": grid, "log-SNR": process.log_snr[grid]}
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
    logging.info("for config.clusters.affinity: %s", folder / "affinity.npz")
    return correlations


def _draw(config, process, matrix, grid, profiles, correlations):
    figure, axes = plt.subplots(2, 2, figsize=(11, 9), layout="constrained")
    for ax, where, name in (
        (axes[0, 0], grid, "timestep t"),
        (axes[0, 1], process.log_snr[grid], "log-SNR"),
    ):
        mesh = ax.pcolormesh(
            where, where, matrix, shading="nearest", vmin=min(0, matrix.min()), vmax=1
        )
        ax.set(title=f"task affinity over {name}", xlabel=name, ylabel=name, aspect="equal")
    figure.colorbar(mesh, ax=axes[0], label="cosine of mean gradients")
    k = config.clusters.k
    full = affinity.interpolate(matrix, grid, process.num_timesteps)
    for cost, colour in (
        (clustering.snr_costs(process.log_snr), "white"),
        (clustering.gradient_costs(full), "red"),
    ):
        for boundary in clustering.interval_clusters(cost, k)[1:-1]:
            axes[0, 0].plot([boundary] * 2, [0, process.num_timesteps], color=colour, lw=0.8)
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
    app.run(main)
