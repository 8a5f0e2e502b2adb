"""O2, the negative transfer gap: ``python -m experiments.transfer_gap --preset digits``.

Trains a specialist on each of k intervals of timesteps alone, with as many steps and as many
examples of the interval as the multi-task model. The gap of an interval is the Frechet distance of
the multi-task model's samples minus that of samples for which the specialist denoised the
interval: a positive gap means negative transfer. The loss gap is the multi-task model's held-out
loss in the interval minus the specialist's. Both are measured for each method.
"""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from absl import logging

from ant_jax import experiment, measuring, results
from ant_jax.runtime.files import write_bytes
from ant_jax.tasks.transfer_gap import transfer_gap
from experiments import report, runner
from experiments.presets import PRESETS, Preset
from experiments.runner import Run

_CAPTION = (
    "Gap: Frechet distance of the multi-task model's samples minus that of samples for which a\n"
    "specialist denoised the interval. Loss gap: held-out loss of the multi-task model minus the\n"
    "specialist's. Positive means negative transfer. All models have the same learning rate; the\n"
    "specialist's batch is its interval's part of the multi-task model's."
)
_DIGITS = {"gap": 3, "loss gap": 4}
_LABELS = {
    "gap": "distance(multi-task) - distance(mixed)",
    "loss gap": "loss(multi-task) - loss(specialist)",
}


def main(argv):
    preset, out = runner.choose(argv, PRESETS)
    specialists, multi_task = plan(preset)
    if runner.DRY_RUN.value:
        stages = {"specialists": specialists, "multi-task models": multi_task}
        runner.print_plan(stages, out, preset)
        return
    runner.finished([*specialists, *multi_task], out, "training")
    arguments = [
        (run, [other for other in specialists if other.config.seed == run.config.seed], out)
        for run in multi_task
    ]
    rows = [row for rows in runner.parallel(gaps_of, arguments, "gaps") for row in rows]
    write_report(rows, out / "transfer_gap")


def plan(preset: Preset) -> tuple[list[Run], list[Run]]:
    """The runs of the specialists, and those of the multi-task models."""
    multi_task = [
        runner.make_run(preset, method, "timestep", seed, measurements=0)
        # Vanilla draws each interval equally often only in expectation, the other methods exactly:
        # linear on evenly spaced clusters is vanilla with stratified timesteps.
        for method in ("vanilla", *preset.methods)
        for seed in preset.seeds
    ]
    config = multi_task[0].config
    specialists = [
        runner.make_run(
            preset,
            "vanilla",
            "timestep",
            seed,
            {
                "clusters.specialist": i,
                "data.batch_size": config.data.batch_size // config.clusters.k,
            },
            measurements=0,
        )
        for i in range(config.clusters.k)
        for seed in preset.seeds
    ]
    return specialists, multi_task


def gaps_of(run: Run, specialists: list[Run], out: Path) -> list[dict[str, Any]]:
    """One row per interval for one multi-task model; stored in a file."""
    source = [runner.made_from(each) for each in (run, *specialists)]
    path = out / "transfer_gap" / f"{run.name}.json"
    return runner.kept(path, source, lambda: _measure(run, specialists, out))


def _measure(run, specialists, out):
    config = run.config
    _, setup, params = results.restore_run(config, runner.folder(run, out))
    alone = [
        results.restore_run(other.config, runner.folder(other, out))[2] for other in specialists
    ]
    boundaries = setup.clusters.boundaries
    evaluator = measuring.build(config, ["frechet"]) if config.evaluation.features else None

    def distance(model):
        if evaluator is None:
            return np.nan
        samples = experiment.draw_samples(config, setup, model, config.sample.num)
        figures = evaluator.measure(samples)
        return figures["frechet_distance" if "frechet_distance" in figures else "fid"]

    gap = transfer_gap(
        distance,
        setup.model.apply,
        {"params": params},
        [{"params": each} for each in alone],
        boundaries,
    )

    def loss(params, i):
        apply_fn, interval = experiment.denoiser(setup, params), boundaries[i : i + 2]
        (loss,) = measuring.validation_losses(config, setup, apply_fn, interval, timesteps_each=20)
        return float(loss)

    ends = report.interval_ends(boundaries)
    rows = []
    for i, own in enumerate(alone):
        multi_task_loss, specialist_loss = loss(params, i), loss(own, i)
        rows.append(
            {
                "method": config.method.name,
                "seed": config.seed,
                "interval": i,
                "first t": ends[i][0],
                "last t": ends[i][1],
                "multi-task distance": gap.multi_task,
                "mixed distance": float(gap.mixed[i]),
                "gap": float(gap.gap[i]),
                "multi-task loss": multi_task_loss,
                "specialist loss": specialist_loss,
                "loss gap": multi_task_loss - specialist_loss,
            }
        )
    return rows


def write_report(rows: list[dict[str, Any]], folder: Path) -> None:
    """Writes the table and the picture."""
    report.write_csv(folder / "transfer_gap.csv", rows)
    intervals = sorted({row["interval"] for row in rows})
    methods = list(dict.fromkeys(row["method"] for row in rows))
    name = lambda i: next(
        f"t = {row['first t']}..{row['last t']}" for row in rows if row["interval"] == i
    )
    values = lambda method, i, key: [
        row[key] for row in rows if row["method"] == method and row["interval"] == i
    ]
    tables = []
    # Without features to evaluate samples there are only losses.
    keys = [key for key in ("gap", "loss gap") if not np.isnan(rows[0][key])]
    for key in keys:
        lines = [
            [
                method,
                *(
                    report.mean_and_deviation(values(method, i, key), _DIGITS[key])
                    for i in intervals
                ),
            ]
            for method in methods
        ]
        tables.append(report.markdown([key, *map(name, intervals)], lines))
    text = "\n".join(tables) + f"\n{_CAPTION}\n"
    write_bytes(folder / "table.md", text.encode())
    print(f"\n{text}")
    figure, axes = plt.subplots(
        1, len(keys), figsize=(6.5 * len(keys), 4.5), layout="constrained", squeeze=False
    )
    width = 0.8 / len(methods)
    for ax, key in zip(axes[0], keys, strict=True):
        for j, method in enumerate(methods):
            groups = np.array([values(method, i, key) for i in intervals])
            ax.bar(
                np.array(intervals) + (j - len(methods) / 2 + 0.5) * width,
                groups.mean(1),
                width,
                yerr=groups.std(1, ddof=1) if groups.shape[1] > 1 else None,
                label=method,
            )
        ax.axhline(0, color="black", lw=0.8)
        ax.set_xticks(intervals, map(name, intervals))
        ax.set(title=f"{key} of each interval; positive: negative transfer", ylabel=_LABELS[key])
    axes[0, 0].legend()
    report.save_figure(figure, folder / "transfer_gap.png")
    logging.info("picture: %s", folder / "transfer_gap.png")


if __name__ == "__main__":
    runner.start(main)
