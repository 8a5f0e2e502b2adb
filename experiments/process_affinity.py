"""Which noise levels agree, by process: ``python -m experiments.process_affinity``.

Trains vanilla with DDPM, flow matching and EDM, and measures the cosines between the gradients of
noise levels at the same log-SNRs. If log-SNR decides which levels agree, the matrices of two
processes differ no more than those of two seeds.
"""

import itertools
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from absl import logging

from ant_jax import config as config_lib
from ant_jax.runtime.files import write_bytes
from ant_jax.tasks import affinity
from experiments import comparisons, report, runner
from experiments.presets import PRESETS, Preset
from experiments.runner import Run
from experiments.task_affinity import of_levels

PROCESSES = ("DDPM epsilon", "DDPM v", "flow", "EDM")
# The best rate of vanilla for all of these but EDM, where it is close to the best: `table`'s
# preset "processes".
_RATE = 6e-3
# Flow matching and EDM go further on both sides; DDPM with the cosine schedule hardly does.
LOG_SNR = np.linspace(-8.0, 8.0, 49)


_SIZES = ("smoke", "digits")


def main(argv):
    preset, out = runner.choose(argv, {name: PRESETS[name] for name in _SIZES})
    plan = {name: runs_of(preset, name) for name in PROCESSES}
    every = [run for runs in plan.values() for run in runs]
    if runner.DRY_RUN.value:
        runner.print_plan({"vanilla training": every}, out, preset)
        return
    runner.finished(every, out, "vanilla training")
    arguments = [(run, preset, out) for run in every]
    found = iter(runner.parallel(_of_run, arguments, "affinity"))
    matrices = {name: np.array([next(found) for _ in runs]) for name, runs in plan.items()}
    folder = out / "process_affinity"
    write_tables(matrices, folder)
    report.save_figure(draw(matrices), folder / "process_affinity.png")
    logging.info("picture: %s", folder / "process_affinity.png")


def runs_of(preset: Preset, name: str) -> list[Run]:
    # A preset's own settings of its process fit DDPM alone.
    own = {key: value for key, value in preset.settings.items() if not key.startswith("process.")}
    preset = preset._replace(settings=own)
    settings = comparisons.PROCESSES[name] | {"optimizer.learning_rate": _RATE}
    return [runner.make_run(preset, "vanilla", "snr", seed, settings) for seed in preset.seeds]


def _of_run(run: Run, preset: Preset, out: Path) -> list[list[float]]:
    """(n, n) affinity between the log-SNRs; stored in a file."""
    where = config_lib.build_process(run.config).at_log_snr(LOG_SNR)
    source = {
        "run": runner.made_from(run),
        "steps": run.steps,
        "log-SNR": LOG_SNR.tolist(),
        "images": preset.affinity_images,
    }
    make = lambda: of_levels(run, out, where, preset.affinity_images).tolist()
    return runner.kept(out / "process_affinity" / f"{run.name}.json", source, make)


def write_tables(matrices: dict[str, np.ndarray], folder: Path) -> None:
    """Prints and writes how alike the matrices are, and how the affinity falls with the gap."""
    rows = []
    for first, second in itertools.combinations_with_replacement(matrices, 2):
        pairs = list(itertools.product(matrices[first], matrices[second]))
        if first == second:
            pairs = list(itertools.combinations(matrices[first], 2))
        if not pairs:
            continue
        differences = [np.abs(_upper(a) - _upper(b)).mean() for a, b in pairs]
        correlations = [np.corrcoef(_upper(a), _upper(b))[0, 1] for a, b in pairs]
        label = f"{first}, two seeds" if first == second else f"{first} and {second}"
        rows.append([label, f"{np.mean(differences):.3f}", f"{np.mean(correlations):.3f}"])
    columns = ["affinity matrices of", "mean absolute difference", "correlation"]
    text = report.markdown(columns, rows)
    rows = [
        [
            name,
            report.mean_and_deviation((affinity.rank_correlation(m, LOG_SNR) for m in group), 3),
            report.mean_and_deviation((_upper(m).mean() for m in group), 3),
            report.mean_and_deviation(((_upper(m) < 0).mean() for m in group), 3),
        ]
        for name, group in matrices.items()
    ]
    columns = ["process", "rank correlation with the gap", "mean affinity", "share below 0"]
    text += "\n" + report.markdown(columns, rows)
    print(f"\n{text}")
    write_bytes(folder / "table.md", text.encode())
    profiles = {
        name: affinity.affinity_by_gap(group.mean(0), LOG_SNR) for name, group in matrices.items()
    }
    report.write_csv(
        folder / "process_affinity.csv",
        [
            {"process": name, "gap": gap, "mean affinity": mean, "standard deviation": std}
            for name, profile in profiles.items()
            for gap, mean, std, _ in zip(*profile, strict=True)
        ],
    )


def _upper(matrix):
    return matrix[np.triu_indices(len(matrix), 1)]


def draw(matrices):
    figure = plt.figure(figsize=(2.7 * len(matrices) + 4.6, 3.5), layout="constrained")
    left, right = figure.subfigures(
        1, 2, width_ratios=[2.7 * len(matrices) + 1, 3.6], squeeze=False
    )[0]
    axes = left.subplots(1, len(matrices), sharey=True, squeeze=False)[0]
    profiles = right.subplots()
    low = min(0, *(group.mean(0).min() for group in matrices.values()))
    meshes = []
    for ax, (name, group) in zip(axes, matrices.items(), strict=True):
        mean = group.mean(0)
        meshes.append(ax.pcolormesh(LOG_SNR, LOG_SNR, mean, shading="nearest", vmin=low, vmax=1))
        ax.set(title=name, xlabel="log-SNR")
        profile = affinity.affinity_by_gap(mean, LOG_SNR)
        profiles.plot(profile.centres, profile.mean, label=name)
    axes[0].set_ylabel("log-SNR")
    left.colorbar(meshes[-1], ax=axes, label="cosine of gradients")
    profiles.set(xlabel="difference of log-SNR", ylabel="mean cosine")
    profiles.legend(fontsize="small")
    return figure


if __name__ == "__main__":
    runner.start(main, _SIZES)
