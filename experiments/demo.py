"""Compares ANT with vanilla training on handwritten digits: ``python -m experiments.demo``.

Trains both with the same seed, batches and number of steps, draws samples from each, and prints the
distance of the samples to real digits. `experiments.table` is the careful comparison.
"""

import sys
import time
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from ant_jax import config as config_lib
from ant_jax import experiment
from ant_jax import report as report_lib
from ant_jax.runtime.extras import MissingExtraError
from ant_jax.runtime.files import write_bytes
from ant_jax.runtime.progress import duration
from ant_jax.tasks.clusters import levels
from experiments import report, runner
from experiments.presets import PRESETS

_PRESETS = {
    "smoke": PRESETS["smoke"],
    "digits": PRESETS["digits"]._replace(
        name="demo",
        settings={"num_steps": 3000},
        measurements=3,
    ),
}
_METHODS = ("vanilla", "nash")
_COLUMNS = (
    "method",
    "steps",
    "Frechet distance",
    "in groups of 300",
    "label accuracy",
)


def main(argv):
    begin = time.perf_counter()
    preset, out = runner.choose(argv, _PRESETS)
    runs = [runner.make_run(preset, method, "snr", seed=0) for method in _METHODS]
    if runner.DRY_RUN.value:
        runner.print_plan({"demo": runs}, out, preset)
        return
    results = runner.finished(runs, out, "training vanilla and Nash-MTL")
    table = make_table(results)
    write_bytes(out / "demo.md", table.encode())
    draw(runs, results, out, out / "demo.png")
    workdirs = [runner.folder(run, out) for run in runs]
    try:
        more = f"report: {report_lib.write(workdirs, out / 'demo.html')}"
    except MissingExtraError as error:
        more = f"no report: {error}"
    last = results[-1]["rows"][-1]
    print(f"\n{table}")
    print(
        "Frechet distance to the real training digits, lower is better, in the features of a\n"
        f"classifier that is right on {last['classifier_test_accuracy']:.1%} of held-out digits. "
        "The 300 held-out real\ndigits have the distance "
        f"{last['real_frechet_distance']:.2f}: compare it with the groups of 300 samples.\n"
        "Label accuracy: share of samples that the classifier recognises as the requested digit."
    )
    print(f"picture: {out / 'demo.png'}\n{more}")
    print(f"next: {sys.executable} -m ant_jax.main --config configs/digits.py")
    print(f"took {duration(time.perf_counter() - begin)}")


def make_table(results: list[dict[str, Any]]) -> str:
    """A Markdown table with one line for each method and measurement."""
    return report.markdown(
        _COLUMNS,
        [
            [
                result["config"]["method.name"],
                row["step"],
                f"{row['frechet_distance']:.2f}",
                f"{row['group_frechet_distance']:.2f}" if "group_frechet_distance" in row else "",
                f"{row['label_accuracy']:.3f}",
            ]
            for result in results
            for row in result["rows"]
        ],
    )


def draw(runs: list[runner.Run], results: list[dict[str, Any]], out: Path, path: Path) -> None:
    """Grids, curves and distances of both methods, and the clusters over log-SNR."""
    config = runs[-1].config
    process = config_lib.build_process(config)
    every = levels(process)
    boundaries = experiment.build_clusters(config, process).boundaries
    k = len(boundaries) - 1
    colours = plt.colormaps["viridis"](np.linspace(0, 0.9, k))
    figure = plt.figure(figsize=(15, 9), layout="constrained")
    axes = figure.subplot_mosaic(
        [["first", "last", "clusters"], ["losses", "weights", "distance"]],
        height_ratios=[1.25, 1],
    )
    for place, run, result in zip(("first", "last"), runs, results, strict=True):
        row = result["rows"][-1]
        grid = runner.folder(run, out) / "evaluation" / f"{row['step']:08d}.png"
        axes[place].imshow(plt.imread(grid))
        axes[place].set_axis_off()
        axes[place].set_title(
            f"{run.config.method.name}, {row['step']} steps: distance "
            f"{row['frechet_distance']:.2f}, accuracy {row['label_accuracy']:.1%}\n"
            "(columns: requested digit, 0 to 9)"
        )
    ax = axes["clusters"]
    for i in range(k):
        ax.axvspan(boundaries[i], boundaries[i + 1], color=colours[i], alpha=0.35)
    ax.plot(every, process.log_snr(every), color="black")
    ax.set(
        title=f"{k} {config.clusters.name} clusters of noise levels",
        xlabel="noise level t",
        ylabel="log-SNR",
        xlim=(0, process.span),
    )
    curves = [report.curves(runner.folder(run, out)) for run in runs]
    for logged, style in zip(curves, ("--", "-"), strict=True):
        for i in range(k):
            losses = logged["cluster_losses"][:, i]
            axes["losses"].plot(logged["step"], losses, style, color=colours[i])
    first, last = (run.config.method.name for run in runs)
    axes["losses"].set(
        title=f"task losses ({last} solid, {first} dashed)", xlabel="step", yscale="log"
    )
    ends = report.interval_ends(boundaries)
    for i in range(k):
        label = "t = {}..{}".format(*ends[i])
        weights = curves[-1]["weights"][:, i]
        axes["weights"].plot(curves[-1]["step"], weights, color=colours[i], label=label)
    axes["weights"].legend(fontsize="small", loc="upper left")
    axes["weights"].set(title=f"weights of the tasks, {last}", xlabel="step", yscale="log")
    for run, result in zip(runs, results, strict=True):
        steps = [row["step"] for row in result["rows"]]
        distances = [row["frechet_distance"] for row in result["rows"]]
        axes["distance"].plot(steps, distances, marker="o", label=run.config.method.name)
    axes["distance"].set(title="Frechet distance to real digits", xlabel="step", yscale="log")
    axes["distance"].legend(fontsize="small")
    report.save_figure(figure, path)


if __name__ == "__main__":
    runner.start(main, _PRESETS)
