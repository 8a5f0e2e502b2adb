"""The methods compared, with controls: ``python -m experiments.table --preset core``.

``core``: {vanilla, linear, uncertainty, PCGrad, Nash} x {timestep, SNR, gradient clusters} and the
controls, each at the learning rate that was best for it on one grid and budget. ``ablations``: the
number of clusters, random clusters, other loss weights and noise schedules, and more, at the
learning rates that ``core`` found, against vanilla under the same change. Everything is measured at
several steps; see `write_report` for the columns.
"""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from absl import app, logging

from ant_jax.files import write_bytes
from ant_jax.metrics import quiet_console
from experiments import report, runner, task_affinity
from experiments.presets import PRESETS, Preset, make_config
from experiments.runner import Run

_GRID = (3e-3, 6e-3, 1.2e-2, 2.4e-2)
_GRID_AT_SCALE = (5e-5, 1e-4, 2e-4, 4e-4)
# Of the runs that choose the learning rate, which are half as long; no compared run has it.
_TUNING_SEED = 1000
# Below the norm of every gradient of these runs, so that clipping to it normalises all of them.
_NORMALISE = {"optimizer.clip_norm": 1e-2}


class Setting(NamedTuple):
    """One line of the table.

    Attributes:
      label: what it is.
      method: of the config.
      clusters: of the config.
      settings: what it changes in the preset's config.
      tuned_as: label of the setting whose learning rate it takes.
      against: label of the setting that it is compared with.
    """

    label: str
    method: str
    clusters: str
    settings: dict[str, Any]
    tuned_as: str
    against: str = "vanilla"


VANILLA = Setting("vanilla", "vanilla", "snr", {}, "vanilla")
METHODS = ("linear", "uncertainty", "pcgrad", "nash")
CLUSTERS = ("timestep", "snr", "gradient")
FIXED = "linear, Nash's mean weights"
_SMOKE = ("vanilla", "nash, snr", "nash, gradient", "linear, snr, shares")


def main(argv):
    del argv
    quiet_console()
    presets = {"smoke": PRESETS["smoke"], "core": PRESETS["digits"]}
    presets |= {"ablations": PRESETS["digits"], "imagenet64": PRESETS["imagenet64"]}
    preset, out = runner.choose(presets)
    name = runner.PRESET.value
    if runner.OUT.value is None and name in ("core", "ablations"):
        # Where the other experiments have their runs of the digits.
        out = Path("runs/experiments/digits")
    if name == "ablations":
        ablate(preset, out)
        return
    settings = core(out / "task_affinity" / "affinity.npz")
    grid = _GRID_AT_SCALE if name == "imagenet64" else _GRID
    if name == "smoke":
        settings = [each for each in settings if each.label in _SMOKE]
        grid = _GRID[:2]
    compare(preset, out, settings, grid)


def core(affinity: Path) -> list[Setting]:
    """The settings of the comparison, but for the one that must wait for Nash's weights."""
    clustered = [
        Setting(
            f"{method}, {clusters}",
            method,
            clusters,
            {"clusters.affinity": str(affinity)} if clusters == "gradient" else {},
            f"{method}, snr",
        )
        for clusters in CLUSTERS
        for method in METHODS
    ]
    shares = [
        Setting(
            f"{method}, snr, shares",
            method,
            "snr",
            {"method.share_weighted": True},
            f"{method}, snr, shares",
        )
        for method in ("linear", "uncertainty", "pcgrad")
    ]
    normalised = Setting("vanilla, normalised", "vanilla", "snr", _NORMALISE, "vanilla, normalised")
    return [VANILLA, *clustered, *shares, normalised]


def fixed_setting(weights: Sequence[float]) -> Setting:
    """Linear with fixed weights."""
    text = ",".join(f"{weight:.4g}" for weight in weights)
    return Setting(FIXED, "linear", "snr", {"method.linear_weights": text}, FIXED)


def compare(preset: Preset, out: Path, settings: list[Setting], grid: tuple[float, ...]) -> None:
    """Tunes, trains, measures and reports the settings and Nash's mean weights."""
    tune = functools.partial(tuning_runs, preset, grid)
    train = functools.partial(runs_of, preset)
    if runner.DRY_RUN.value:
        known = chosen_before(out)
        everything = [*settings, fixed_setting(known.get("nash_weights", [1.0]))]
        rates = known.get("learning_rates", {})
        stages = {
            "task affinity": task_affinity.plan(preset),
            "learning rates": [run for each in everything for run in tune(each)],
            "comparison": [
                run for each in everything for run in train(each, rates.get(each.tuned_as, grid[0]))
            ],
        }
        runner.print_plan(stages, out, preset)
        return
    task_affinity.measure(preset, out)
    chosen = choose_rates(preset, out, grid, settings)
    plan = {each.label: train(each, chosen[each.tuned_as]) for each in settings}
    runner.execute([run for runs in plan.values() for run in runs], out, "comparison")
    logged = [report.curves(runner.folder(run, out)) for run in plan["nash, snr"]]
    weights = np.mean([curves["weights"].mean(0) for curves in logged], 0).tolist()
    fixed = fixed_setting(weights)
    chosen |= choose_rates(preset, out, grid, [fixed])
    plan[FIXED] = train(fixed, chosen[FIXED])
    runner.execute(plan[FIXED], out, FIXED)
    results = {label: runner.execute(runs, out) for label, runs in plan.items()}
    folder = out / "table"
    known = {"learning_rates": chosen, "nash_weights": weights}
    write_bytes(folder / "chosen.json", json.dumps(known, indent=1).encode())
    write_report(results, dict.fromkeys(results, "vanilla"), folder, "core")
    panels = {
        "methods on SNR clusters": ["vanilla", *(f"{method}, snr" for method in METHODS)],
        "clusterings": [
            "vanilla",
            *(f"{method}, {each}" for method in ("uncertainty", "nash") for each in CLUSTERS),
        ],
        "controls": ["vanilla", "vanilla, normalised", FIXED, "nash, snr"]
        + [f"{method}, snr, shares" for method in ("linear", "uncertainty", "pcgrad")],
    }
    draw(results, panels, folder / "core.png")


def runs_of(preset: Preset, setting: Setting, rate: float | None) -> list[Run]:
    """The runs of a setting, one a seed; None is the preset's learning rate."""
    changes = dict(setting.settings)
    if rate is not None:
        changes["optimizer.learning_rate"] = rate
    return [
        runner.make_run(preset, setting.method, setting.clusters, seed, changes)
        for seed in preset.seeds
    ]


def tuning_runs(preset: Preset, grid: tuple[float, ...], setting: Setting) -> list[Run]:
    """Half as long runs of another seed, one a learning rate; none for another setting's rate."""
    if setting.tuned_as != setting.label:
        return []
    return [
        runner.make_run(
            preset,
            setting.method,
            setting.clusters,
            _TUNING_SEED,
            setting.settings
            | {"optimizer.learning_rate": rate, "num_steps": full_length(preset) // 2},
            measurements=1,
        )
        for rate in grid
    ]


def full_length(preset: Preset) -> int:
    """Steps of a run of the core."""
    return make_config(preset, "vanilla", "snr", seed=0).num_steps


def choose_rates(
    preset: Preset, out: Path, grid: tuple[float, ...], settings: list[Setting]
) -> dict[str, float]:
    """The best learning rate of each setting that is tuned for itself, by the distance."""
    plan = {each.label: tuning_runs(preset, grid, each) for each in settings}
    plan = {label: runs for label, runs in plan.items() if runs}
    runner.execute([run for runs in plan.values() for run in runs], out, "learning rates")
    rows = []
    chosen = {}
    for label, runs in plan.items():
        scores = [quality(result) for result in runner.execute(runs, out)]
        chosen[label] = grid[int(np.argmin(scores))]
        rows.append([label, *(f"{score:.2f}" for score in scores), f"{chosen[label]:g}"])
    columns = ["tuned", *(f"{rate:g}" for rate in grid), "chosen"]
    text = report.markdown(columns, rows)
    print(f"\n{text}")
    name = "learning_rates.md" if len(settings) > 1 else "learning_rates_fixed.md"
    write_bytes(out / "table" / name, text.encode())
    return chosen


def quality(result: dict[str, Any], row: int = -1) -> float:
    """What is compared: the Frechet distance, or without features the validation loss."""
    if result["diverged"]:
        return np.inf
    measured = result["rows"][row]
    return measured.get("frechet_distance", measured.get("validation_loss"))


def chosen_before(out: Path) -> dict[str, Any]:
    """What a finished comparison has chosen: learning rates and Nash's mean weights; or nothing."""
    path = out / "table" / "chosen.json"
    return json.loads(path.read_text()) if path.exists() else {}


def ablate(preset: Preset, out: Path) -> None:
    """Everything else, at the learning rates of the core."""
    chosen = chosen_before(out).get("learning_rates", {})
    if not chosen:
        logging.warning("%s: the preset's learning rate for all; run --preset core first", out)
    settings = ablations(preset)
    plan = {each.label: runs_of(preset, each, chosen.get(each.tuned_as)) for each in settings}
    runs = [run for runs in plan.values() for run in runs]
    if runner.DRY_RUN.value:
        runner.print_plan({"ablations": runs}, out, preset)
        return
    runner.execute(runs, out, "ablations")
    results = {label: runner.execute(runs, out) for label, runs in plan.items()}
    against = {each.label: each.against for each in settings}
    write_report(results, against, out / "table", "ablations")


def ablations(preset: Preset) -> list[Setting]:
    """The settings of the ablations, each with the vanilla that it is to be compared with."""
    steps = full_length(preset)
    half = {"num_steps": steps // 2}
    tuned = lambda method: "vanilla" if method == "vanilla" else f"{method}, snr"

    def group(name, methods, changes, clusters="snr", against="base: vanilla"):
        return [
            Setting(f"{name}: {method}", method, clusters, half | changes, tuned(method), against)
            for method in methods
        ]

    ours = ("uncertainty", "pcgrad", "nash")
    settings = group("base", ("vanilla", *METHODS), {})
    for k in (2, 8, 20):
        settings += group(f"k = {k}", ours, {"clusters.k": k})
    settings += group("random clusters", METHODS, {}, "random")
    every = {"method.nash_update_every": 25}
    settings += group("renewed every 25", ("nash",), every)
    for name, changes in (
        ("P2", {"diffusion.loss_weight": "p2"}),
        ("Min-SNR", {"diffusion.loss_weight": "min_snr"}),
        ("linear schedule", {"diffusion.schedule": "linear"}),
        ("width 32", {"model.width": 32}),
        ("unconditional", {"model.conditional": False}),
        ("four times as long", {"num_steps": 2 * steps}),
    ):
        methods = ("vanilla", "uncertainty", "nash")
        settings += group(name, methods, changes, against=f"{name}: vanilla")
    return settings


def write_report(
    results: dict[str, list[dict[str, Any]]],
    against: dict[str, str],
    folder: Path,
    name: str,
) -> None:
    """Writes the numbers of every measurement as CSV and the table as Markdown.

    Columns: the distance (mean and standard deviation over seeds) at the steps measured; at how
    many seeds the last is below that of the setting compared with; the steps to reach that
    setting's mean last distance, interpolated between measurements; the last loss on held-out
    images; how many samples the classifier takes for the digit asked for; the mean distance of
    samples to the nearest training image, and the share of samples nearer to one than 99 % of the
    held-out images are; for methods with the Gram matrix the share of steps at which two cluster
    gradients had a negative cosine; median milliseconds a step, one core a run on CPUs.
    """
    rows = [
        {"setting": label, "run": result["name"], "ms_per_step": result["ms_per_step"]}
        | {key: value for key, value in row.items() if not isinstance(value, list)}
        for label, group in results.items()
        for result in group
        for row in result["rows"]
    ]
    report.write_csv(folder / f"{name}.csv", rows)
    lines = []
    for label, group in results.items():
        other = results[against[label]]
        if any(result["diverged"] for result in group):
            lines.append([label, "diverged", *[""] * 10])
            continue
        last = [result["rows"][-1] for result in group]
        steps = [row["step"] for row in group[0]["rows"]]
        shown = sorted({len(steps) // 3 - 1, 2 * len(steps) // 3 - 1, len(steps) - 1} - {-1})
        curve = [
            f"{steps[i]}: " + report.mean_and_deviation([quality(result, i) for result in group], 2)
            for i in shown
        ]
        ahead = sum(quality(a) < quality(b) for a, b in zip(group, other, strict=True))
        mean = lambda key, digits, last=last: (
            f"{np.mean([row[key] for row in last]):.{digits}f}" if key in last[0] else ""
        )
        lines.append(
            [
                label,
                "; ".join(curve),
                "" if group is other else f"{ahead} of {len(group)}",
                _steps_to_reach(group, np.mean([quality(result) for result in other])),
                mean("validation_loss", 4),
                mean("label_accuracy", 3),
                mean("group_frechet_distance", 2),
                mean("nearest_train_distance", 3),
                mean("copies", 3),
                _conflicts(group, folder.parent),
                f"{np.median([result['ms_per_step'] for result in group]):.1f}",
            ]
        )
    columns = ["setting", "distance by step", "ahead", "steps to reach", "validation loss"]
    columns += ["label accuracy", "in groups of 300", "nearest", "copies"]
    columns += ["conflicts", "ms per step"]
    text = report.markdown(columns, lines)
    first = next(iter(results.values()))[0]["rows"][-1]
    if "real_frechet_distance" in first:
        text += (
            f"\nHeld-out real images: distance {first['real_frechet_distance']:.2f} (compare with "
            f"groups of 300), nearest {first['real_nearest_train_distance']:.3f}, copies 0.010, "
            f"label accuracy {first['classifier_test_accuracy']:.3f}.\n"
        )
    write_bytes(folder / f"{name}.md", text.encode())
    print(f"\n{text}\ntable: {folder / f'{name}.md'}, all numbers: {folder / f'{name}.csv'}")


def _conflicts(group, out):
    logged = [report.curves(out / "runs" / result["name"]) for result in group]
    if "conflict" not in logged[0]:
        return ""
    return f"{np.mean([curves['conflict'].mean() for curves in logged]):.3f}"


def _steps_to_reach(group, target):
    """Mean step at which the curves fall to a distance, or at how many seeds they do."""
    reached = []
    for result in group:
        steps = [row["step"] for row in result["rows"]]
        values = np.log([quality(result, i) for i in range(len(steps))])
        below = np.flatnonzero(values <= np.log(target))
        if below.size:
            i = below[0]
            low, high = max(i - 1, 0), i
            # The distance falls about exponentially between measurements.
            place = (
                1.0
                if low == high
                else (values[low] - np.log(target)) / (values[low] - values[high])
            )
            reached.append(steps[low] + place * (steps[high] - steps[low]))
    if len(reached) < len(group):
        return f"{len(reached)} of {len(group)} reach it"
    return f"{np.mean(reached):.0f}"


def draw(
    results: dict[str, list[dict[str, Any]]], panels: dict[str, list[str]], path: Path
) -> None:
    """Convergence curves, the band being one standard deviation over seeds."""
    figure, axes = plt.subplots(
        1, len(panels), figsize=(16, 4.8), sharey=True, layout="constrained"
    )
    for ax, (title, labels) in zip(axes, panels.items(), strict=True):
        for label in labels:
            group = [result for result in results.get(label, []) if not result["diverged"]]
            if not group:
                continue
            steps = [row["step"] for row in group[0]["rows"]]
            values = np.array([[quality(r, i) for i in range(len(steps))] for r in group])
            (line,) = ax.plot(steps, values.mean(0), marker="o", ms=3, label=label)
            deviation = values.std(0, ddof=1) if len(group) > 1 else 0
            ax.fill_between(
                steps,
                values.mean(0) - deviation,
                values.mean(0) + deviation,
                color=line.get_color(),
                alpha=0.15,
            )
        ax.set(title=title, xlabel="step", yscale="log")
        ax.legend(fontsize="small")
    axes[0].set_ylabel("Frechet distance to the training data")
    report.save_figure(figure, path)
    logging.info("picture: %s", path)


if __name__ == "__main__":
    app.run(main)
