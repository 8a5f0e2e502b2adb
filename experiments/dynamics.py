"""What happens during training: ``python -m experiments.dynamics --preset digits``.

Draws one picture per method: the task losses, the weights, and the cosines between the task
gradients. Reports the share of steps with a conflict: two task gradients with a negative cosine.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from absl import logging

from ant_jax import dataset, experiment
from ant_jax.runtime.files import write_bytes
from experiments import report, runner
from experiments.presets import PRESETS, Preset
from experiments.runner import Run

# With stratified timesteps the k gradients cost one backward pass. Weighted by the shares of the
# clusters, their sum is vanilla's gradient in expectation.
VANILLA = "vanilla (stratified, by shares)"
_WATCH = {"method.cosines": True}


def main(argv):
    preset, out = runner.choose(argv, PRESETS)
    runs = plan(preset)
    if runner.DRY_RUN.value:
        runner.print_plan(runs, out, preset)
        return
    runner.finished([run for group in runs.values() for run in group], out, "training")
    logged = {
        label: [report.curves(runner.folder(run, out)) for run in group]
        for label, group in runs.items()
    }
    config = next(iter(runs.values()))[0].config
    source = dataset.open_data(config)
    setup = experiment.build(config, source.image_shape[-1], source.num_classes)
    boundaries = setup.clusters.boundaries
    write_report(logged, boundaries, out / "dynamics")


def plan(preset: Preset) -> dict[str, list[Run]]:
    """The runs of each method, one per seed, on SNR clusters with the preset's learning rate."""
    settings = {
        VANILLA: ("linear", _WATCH | {"method.weight_by_interval_size": True}),
        "linear": ("linear", _WATCH),
        "uncertainty": ("uncertainty", _WATCH),
        "pcgrad": ("pcgrad", {}),
        "nash": ("nash", {}),
    }
    return {
        label: [
            runner.make_run(preset, method, "snr", seed, changes, measurements=0)
            for seed in preset.seeds
        ]
        for label, (method, changes) in settings.items()
        if label == VANILLA or method in preset.methods
    }


def write_report(
    logged: Mapping[str, Sequence[dict[str, np.ndarray]]], boundaries: np.ndarray, folder: Path
) -> dict[str, list[float]]:
    """Writes the pictures, the table and the CSV; returns the shares of conflicts by method."""
    rows: list[dict[str, Any]] = []
    lines = []
    shares = {}
    pairs = np.stack(np.triu_indices(len(boundaries) - 1, 1), 1)
    for label, group in logged.items():
        # Every line of the log is a mean over the same number of steps.
        shares[label] = [float(curves["conflict"].mean()) for curves in group]
        third = len(group[0]["step"]) // 3
        parts = [
            report.mean_and_deviation([curves["conflict"][part].mean() for curves in group], 3)
            for part in (slice(0, third), slice(third, 2 * third), slice(2 * third, None))
        ]
        cosines = np.mean([curves["cosines"].mean(0) for curves in group], 0)
        lowest = int(np.argmin(cosines))
        i, j = pairs[lowest]
        lines.append(
            [
                label,
                report.mean_and_deviation(shares[label], 3),
                *parts,
                f"{cosines[lowest]:.2f} (clusters {i} and {j})",
                f"{np.mean([np.mean(curves['smallest_cosine']) for curves in group]):.2f}",
            ]
        )
        for seed, curves in enumerate(group):
            for n, step in enumerate(curves["step"]):
                row = {"method": label, "run": seed, "step": int(step)}
                for name in ("cluster_losses", "weights"):
                    row |= {f"{name} {c}": value for c, value in enumerate(curves[name][n])}
                row |= {
                    f"cosine {a} {b}": value
                    for (a, b), value in zip(pairs, curves["cosines"][n], strict=True)
                }
                rows.append(row | {"conflict": curves["conflict"][n]})
        name = label.split(" ")[0]
        report.save_figure(_draw(label, group, boundaries, pairs), folder / f"{name}.png")
        logging.info("picture: %s", folder / f"{name}.png")
    report.write_csv(folder / "dynamics.csv", rows)
    columns = ["method", "steps with a conflict", "first third", "second third", "last third"]
    columns += ["lowest mean cosine", "mean smallest cosine"]
    table = report.markdown(columns, lines)
    write_bytes(folder / "table.md", table.encode())
    print(
        f"\n{table}\nThe gradient of a cluster is that of its part of one batch: its noise draws "
        "cosines\ntowards 0 and makes conflicts of mean gradients that agree."
    )
    return shares


def _draw(label, group, boundaries, pairs):
    k = len(boundaries) - 1
    steps = group[0]["step"]
    mean = {
        name: np.mean([curves[name] for curves in group], 0)
        for name in ("cluster_losses", "weights", "cosines", "conflict")
    }
    colours = plt.colormaps["viridis"](np.linspace(0, 0.9, k))
    figure, axes = plt.subplots(1, 4, figsize=(18, 4), layout="constrained")
    ends = report.interval_ends(boundaries)
    for i in range(k):
        name = "t = {}..{}".format(*ends[i])
        axes[0].plot(steps, mean["cluster_losses"][:, i], color=colours[i], label=name)
        axes[1].plot(steps, mean["weights"][:, i], color=colours[i])
    axes[0].set(title="task losses", xlabel="step", yscale="log")
    axes[0].legend(fontsize="small")
    axes[1].set(title="weights", xlabel="step", yscale="log")
    gaps = plt.colormaps["plasma"](np.linspace(0, 0.85, k))
    seen = set()
    for (i, j), cosines in zip(pairs, mean["cosines"].T, strict=True):
        gap = j - i
        name = None if gap in seen else f"{gap} cluster(s) apart"
        seen.add(gap)
        axes[2].plot(steps, cosines, color=gaps[gap], lw=1, label=name)
    axes[2].axhline(0, color="black", lw=0.8)
    axes[2].legend(fontsize="small")
    axes[2].set(title="cosines between task gradients", xlabel="step")
    share = mean["conflict"].mean()
    axes[3].plot(steps, mean["conflict"], color="black")
    axes[3].set(
        title=f"share of steps with a conflict: {share:.1%}", xlabel="step", ylim=(-0.02, 1.02)
    )
    figure.suptitle(f"{label}; means of {len(group)} seed(s)")
    return figure


if __name__ == "__main__":
    runner.start(main)
