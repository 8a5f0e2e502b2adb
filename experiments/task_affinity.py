"""O1, task affinity falls with the gap: ``python -m experiments.task_affinity --preset digits``.

Trains vanilla, measures the cosines between the gradients of denoising tasks at several
checkpoints, and draws their mean over timesteps, over log-SNR and against the gap. For gradient
clusters (``config.clusters.name = "gradient"``), set ``config.clusters.affinity`` to the resulting
``affinity.npz``. ``--config FILE`` does this for your config. ``--workdir DIR`` does it for your
run, without training, and writes the file and the picture into the workdir. The file remembers the
noise process, the network and the data. A run with another process refuses the file. A run with
another network or other data logs a warning.
"""

import math
from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np
from absl import app, flags, logging

from ant_jax import config as config_lib
from ant_jax import dataset, experiment, models, results
from ant_jax import workdir as workdir_lib
from ant_jax.config import ConfigError
from ant_jax.config import file as config_file
from ant_jax.runtime.files import user_path, write_bytes, writing
from ant_jax.tasks import affinity, clustering
from ant_jax.tasks.clusters import level_boundaries, levels
from experiments import report, runner
from experiments.presets import PRESETS, Preset
from experiments.runner import Run

_CONFIG = flags.DEFINE_string(
    "config", None, "Your config file, or FILE:ARGUMENT, instead of a preset."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "A run of yours, whose config and newest checkpoint are used; trains nothing."
)


def main(argv):
    preset, out = runner.choose(argv, PRESETS)
    if _WORKDIR.value:
        return _of_workdir(user_path(_WORKDIR.value), preset)
    if _CONFIG.value:
        name = Path(_CONFIG.value.partition(":")[0]).stem
        preset = preset._replace(name=name, config=_read, settings={}, seeds=(0,))
        out = runner.folder_of(name)
    runs = plan(preset)
    if runner.DRY_RUN.value:
        runner.print_plan({"vanilla training": runs}, out, preset)
        return
    write_report(preset, out, measure(preset, out))


def _read(argument):
    """The config of the command line with another method and other clusters."""
    assert _CONFIG.value is not None  # see `main`
    try:
        config = config_file.read(_CONFIG.value)
    except ConfigError as error:
        raise ConfigError(f"--config={_CONFIG.value}: {error}") from error
    method, clusters = argument.split(",")
    config_lib.update(config, {"method.name": method, "clusters.name": clusters})
    return config


def _of_workdir(workdir, preset):
    config = workdir_lib.load_config(workdir)
    if config is None:
        raise app.UsageError(f"--workdir={workdir}: there is no run")
    _, setup, params = results.restore_run(config, workdir, average=False)
    every, grid = _levels(config, preset)
    images = preset.affinity_images
    _say_what_compiles(grid, images)
    matrix = _of_params(config, setup, params, every[grid], images, 0)
    path = workdir / "affinity.npz"
    _save(path, matrix, config, preset)
    _save_picture(path.with_suffix(".png"), config, preset, [matrix])
    logging.info("for config.clusters.affinity: %s", path)


def _say_what_compiles(grid, images):
    logging.info(
        "measuring gradients at %d noise levels on %d images; they compile first ...",
        len(grid),
        images,
    )


def _levels(config, preset):
    """The noise levels, and the indices of those that are measured."""
    every = levels(config_lib.build_process(config))
    return every, affinity.timestep_grid(len(every), min(preset.affinity_grid, len(every)))


def _save(path, matrix, config, preset):
    every, grid = _levels(config, preset)
    log_snr = config_lib.build_process(config).log_snr(every)
    with writing(path) as file:
        affinity.save(file, matrix, grid, len(every), log_snr, experiment.behind_affinity(config))


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
    _say_what_compiles(_levels(runs[0].config, preset)[1], preset.affinity_images)
    # Without its config, which may be a function that other processes can't get.
    arguments = [(run, preset._replace(config=None), out) for run in runs]
    matrices = [np.array(rows) for rows in runner.parallel(_of_run, arguments, "affinity")]
    _save(path_of(out), np.mean(matrices, 0), runs[0].config, preset)
    return matrices


def _of_run(run, preset, out):
    """(n, n) mean over the checkpoints of a run; stored in a file."""
    every, grid = _levels(run.config, preset)
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
    matrices = []
    for step in run.steps:
        _, setup, params = results.restore_run(
            run.config, runner.folder(run, out), step, average=False
        )
        matrices.append(_of_params(run.config, setup, params, where, images, step))
    return np.mean(matrices, 0)


def _of_params(config, setup, params, where, images, seed):
    x0, labels = dataset.images(config, config.data.split, images)
    part = min(len(x0), config.data.batch_size)
    return affinity.task_affinity(
        setup.model.apply,
        {"params": params},
        setup.process,
        x0,
        where,
        jax.random.key(seed),
        y=labels if models.num_classes(setup.model) else None,
        microbatch=math.gcd(len(x0), part),
    )


def write_report(preset: Preset, out: Path, matrices: list[np.ndarray]) -> dict[str, Any]:
    """Writes the tables and the picture; returns the rank correlations for each kind of gap."""
    folder = out / "task_affinity"
    config = plan(preset)[0].config
    correlations, profiles = _by_gap(config, preset, matrices)
    report.write_csv(
        folder / "rank_correlation.csv",
        [
            {"seed": seed} | {name: values[i] for name, values in correlations.items()}
            for i, seed in enumerate(preset.seeds)
        ],
    )
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
    _save_picture(folder / "affinity.png", config, preset, matrices)
    logging.info("for config.clusters.affinity: %s", path_of(out))
    return correlations


def _by_gap(config, preset, matrices):
    """For each kind of gap the rank correlation of each matrix, and the profile of their mean."""
    every, grid = _levels(config, preset)
    log_snr = config_lib.build_process(config).log_snr(every[grid])
    positions = {"timestep": every[grid], "log-SNR": log_snr}
    correlations = {
        name: [affinity.rank_correlation(matrix, where) for matrix in matrices]
        for name, where in positions.items()
    }
    mean = np.mean(matrices, 0)
    profiles = {name: affinity.affinity_by_gap(mean, where) for name, where in positions.items()}
    return correlations, profiles


def _save_picture(path, config, preset, matrices):
    report.save_figure(_draw(config, preset, matrices), path)
    logging.info("picture: %s", path)


def _draw(config, preset, matrices):
    process, matrix = config_lib.build_process(config), np.mean(matrices, 0)
    every, grid = _levels(config, preset)
    correlations, profiles = _by_gap(config, preset, matrices)
    figure, axes = plt.subplots(2, 2, figsize=(11, 9), layout="constrained")
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
