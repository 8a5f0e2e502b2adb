"""Compares the methods, with controls: ``python -m experiments.table --preset core``.

``core`` compares {vanilla, linear, uncertainty, PCGrad, Nash} x {timestep, SNR, gradient clusters}
and the controls. The learning rate of each is the best on one grid, with the same budget for all
and with separate seeds. ``ablations`` changes the number of clusters, uses random clusters, other
loss weights, other noise schedules and more, with the learning rates of ``core``, and compares with
vanilla under the same change. ``field`` compares all methods of `ant_jax.mtl` on SNR clusters.
``processes`` asks whether balancing helps DDPM, flow matching and EDM alike. ``fashion`` asks the
same on Fashion-MNIST at 14x14, and ``fashion32``, for a GPU, at 32x32.
Everything is measured at several steps; `write_report` describes the columns.
"""

import functools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np
from absl import logging
from matplotlib.ticker import LogLocator, NullFormatter

from ant_jax import compiled_step, data, dataset, experiment, state_layout
from ant_jax.runtime.files import write_bytes
from experiments import report, runner, task_affinity
from experiments.comparisons import (
    CHANGED_METHODS,
    CLUSTERS,
    FIXED,
    Setting,
    ablations,
    changes,
    core,
    field,
    fixed_setting,
    processes,
    runs_of,
    tuning_runs,
)
from experiments.presets import METHODS, PRESETS, Preset

_GRID = (3e-3, 6e-3, 1.2e-2)
_GRID_OF_32 = (3e-4, 6e-4, 1.2e-3)
_GRID_AT_SCALE = (5e-5, 1e-4, 2e-4)
_TIMED_ROUNDS = 8
# The lists of runs at the size of the digits.
_LISTS = ("core", "ablations", "field", "processes")
_SMOKE = ("vanilla", "nash, snr", "nash, gradient")


def main(argv):
    digits = PRESETS["digits"]
    presets = PRESETS | dict.fromkeys(_LISTS, digits)
    preset, out = runner.choose(argv, presets)
    name = runner.PRESET.value
    if name == "ablations":
        ablate(preset, out)
        return
    if name == "field":
        compare_tuned(preset, out, field(), _GRID, name, draw_field)
        return
    if name == "processes":
        compare_tuned(preset, out, processes(), _GRID, name, draw_processes)
        return
    if name in ("fashion", "fashion32"):
        settings = processes(("DDPM epsilon", "DDPM v", "flow"), ("uncertainty", "nash"), ("snr",))
        grid = _GRID if name == "fashion" else _GRID_OF_32
        compare_tuned(preset, out, settings, grid, name, draw_processes)
        return
    settings = core(task_affinity.path_of(out))
    grid = _GRID_AT_SCALE if name == "imagenet64" else _GRID
    if name == "smoke":
        settings = [each for each in settings if each.label in _SMOKE]
        grid = _GRID[:2]
    compare(preset, out, settings, grid)


def compare(preset: Preset, out: Path, settings: list[Setting], grid: tuple[float, ...]) -> None:
    """Tunes, trains, measures and reports the settings, and linear with Nash's mean weights."""
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
    runner.finished(plan["nash, snr"], out)
    logged = [report.curves(runner.folder(run, out))["weights"] for run in plan["nash, snr"]]
    # Average the shares: the scale of Nash's weights grows as gradients shrink; Adam ignores it.
    weights = np.mean([(each / each.sum(1, keepdims=True)).mean(0) for each in logged], 0).tolist()
    fixed = fixed_setting(weights)
    chosen |= choose_rates(preset, out, grid, [fixed])
    plan[FIXED] = train(fixed, chosen[FIXED])
    runner.execute(plan[FIXED], out, FIXED)
    results = {label: runner.execute(runs, out) for label, runs in plan.items()}
    folder = out / "table"
    known = {"learning_rates": chosen, "nash_weights": weights}
    write_bytes(folder / "chosen.json", json.dumps(known, indent=1).encode())
    times = time_steps(preset, out, [*settings, fixed])
    milliseconds = {each.label: times[_kind(each)] for each in [*settings, fixed]}
    write_report(results, dict.fromkeys(results, "vanilla"), milliseconds, folder, "core")
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
    logging.info("picture: %s", folder / "core.png")


def compare_tuned(
    preset: Preset,
    out: Path,
    settings: list[Setting],
    grid: tuple[float, ...],
    name: str,
    picture: Callable[[dict[str, list[dict[str, Any]]], Path], None],
) -> None:
    """Tunes, trains, measures and reports settings, each on the same grid.

    Args:
      preset: the sizes.
      out: the folder of the output.
      settings: what is compared. In the table, those that are compared with one setting follow each
        other, the best first.
      grid: the learning rates to choose from.
      name: of the files of the table.
      picture: draws the results by setting into a file.
    """
    tuning = [run for each in settings for run in tuning_runs(preset, grid, each)]
    if runner.DRY_RUN.value:
        runs = [run for each in settings for run in runs_of(preset, each, grid[0])]
        runner.print_plan({"learning rates": tuning, "comparison": runs}, out, preset)
        return
    chosen = choose_rates(preset, out, grid, settings)
    plan = {each.label: runs_of(preset, each, chosen[each.tuned_as]) for each in settings}
    runner.execute([run for runs in plan.values() for run in runs], out, "comparison")
    results = {label: runner.execute(runs, out) for label, runs in plan.items()}
    against = {each.label: each.against for each in settings}
    order = list(dict.fromkeys(against.values()))
    last = lambda label: np.mean([quality(result) for result in results[label]])
    place = lambda label: (order.index(against[label]), last(label))
    results = {label: results[label] for label in sorted(results, key=place)}
    milliseconds = time_steps(preset, out, settings)
    milliseconds = {each.label: milliseconds[_kind(each)] for each in settings}
    write_report(results, against, milliseconds, out / "table", name)
    path = out / "table" / f"{name}.png"
    picture(results, path)
    logging.info("picture: %s", path)


def draw_processes(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Convergence curves, one panel for each process; a setting has one colour in all of them."""
    panels = {}
    for label, group in results.items():
        process, _, setting = label.partition(": ")
        panels.setdefault(process, {})[setting] = group
    names = sorted({name for panel in panels.values() for name in panel}, key="vanilla".__ne__)
    colours = dict(zip(names, ["black", *plt.color_sequences["tab10"]], strict=False))
    figure, axes = plt.subplots(
        1, len(panels), figsize=(3 * len(panels), 4.4), sharey=True, squeeze=False
    )
    for ax, (process, panel) in zip(axes.flat, panels.items(), strict=True):
        for name in names:
            _draw_curve(ax, panel.get(name, []), name, colours[name])
        _set_axes(ax, process)
    axes[0, 0].set_ylabel(_measured(results))
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="lower center", ncols=4)
    figure.tight_layout(rect=(0, 0.14, 1, 1))
    report.save_figure(figure, path, palette=True)


def draw_field(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """The last distance of every method, the best at the top."""
    figure, ax = plt.subplots(figsize=(7, max(3.5, 1 + 0.25 * len(results))), layout="constrained")
    for place, (label, group) in enumerate(results.items()):
        values = [quality(result) for result in group if not result["diverged"]]
        colour = "tab:orange" if label == "vanilla" else "tab:blue"
        ax.plot(values, [place] * len(values), "o", ms=3, color=colour, alpha=0.5)
        if values:
            ax.plot(np.mean(values), place, "|", ms=12, mew=2, color=colour)
    ax.set(xscale="log", xlabel="distance or validation loss after the last step", ylim=(-1, None))
    ax.set_yticks(range(len(results)), results)
    ax.invert_yaxis()
    report.save_figure(figure, path)


def choose_rates(
    preset: Preset, out: Path, grid: tuple[float, ...], settings: list[Setting]
) -> dict[str, float]:
    """The best learning rate, by the distance, of each setting that has its own tuning runs."""
    plan = {each.label: tuning_runs(preset, grid, each) for each in settings}
    plan = {label: runs for label, runs in plan.items() if runs}
    runner.execute([run for runs in plan.values() for run in runs], out, "learning rates")
    rows = []
    chosen = {}
    for label, runs in plan.items():
        scores = np.array([quality(result) for result in runner.execute(runs, out)])
        scores = scores.reshape(len(grid), -1)
        chosen[label] = grid[int(np.argmin(scores.mean(1)))]
        rows.append([label, *(report.mean_and_deviation(each, 2) for each in scores)])
        rows[-1].append(f"{chosen[label]:g}")
    columns = ["setting", *(f"{rate:g}" for rate in grid), "chosen"]
    text = report.markdown(columns, rows)
    print(f"\n{text}")
    name = "learning_rates.md" if len(settings) > 1 else "learning_rates_fixed.md"
    write_bytes(out / "table" / name, text.encode())
    return chosen


def _kind(setting):
    """The kind of a setting; all settings of one kind do the same work in a step."""
    normalised = "optimizer.clip_norm" in setting.settings
    process, colon, _ = setting.against.partition(":")
    return f"{process}: " * bool(colon) + setting.method + ", normalised" * normalised


def time_steps(preset: Preset, out: Path, settings: list[Setting]) -> dict[str, float]:
    """Median milliseconds of a step of each kind, in turn, on all cores of this machine."""
    kinds = {_kind(each): each for each in settings if each.clusters == "snr"}
    runs = {kind: runs_of(preset, each, None)[0] for kind, each in kinds.items()}

    def make():
        logging.info("timing %d kinds of steps", len(runs))
        source = dataset.open_data(next(iter(runs.values())).config)
        steps, states, batches, times = {}, {}, {}, {}
        for kind, run in runs.items():
            setup = experiment.build(run.config, source.image_shape[-1], source.num_classes)
            steps[kind] = compiled_step.training_step(run.config, setup)
            split = state_layout.layout(run.config, setup).split
            states[kind] = split(state_layout.new_state(run.config, setup))
            settings = run.config.data
            batches[kind] = next(
                data.batches(
                    source,
                    batch_size=settings.batch_size,
                    seed=0,
                    image_size=settings.image_size,
                    crop=settings.crop,
                )
            )
            times[kind] = []
        for round_number in range(_TIMED_ROUNDS + 1):
            for kind, step in steps.items():
                begin = time.perf_counter()
                for _ in range(5):
                    states[kind], _ = step(states[kind], batches[kind])
                jax.block_until_ready(states[kind])
                # The first round compiles.
                if round_number:
                    times[kind].append((time.perf_counter() - begin) / 5 * 1000)
        return {kind: float(np.median(each)) for kind, each in times.items()}

    made_from = [jax.devices()[0].device_kind, *(runner.made_from(run) for run in runs.values())]
    return runner.kept(out / "table" / "ms_per_step.json", made_from, make)


def quality(result: dict[str, Any], row: int = -1) -> float:
    """The compared figure: the Frechet distance or, without features, the validation loss."""
    if result["diverged"]:
        return np.inf
    measured = result["rows"][row]
    return measured.get("frechet_distance", measured.get("validation_loss"))


def chosen_before(out: Path) -> dict[str, Any]:
    """The learning rates and Nash's mean weights of a finished comparison; empty without one."""
    path = out / "table" / "chosen.json"
    return json.loads(path.read_text()) if path.exists() else {}


def ablate(preset: Preset, out: Path) -> None:
    """Trains, measures and reports the ablations, with the learning rates of the core."""
    chosen = chosen_before(out).get("learning_rates", {})
    if not chosen:
        logging.warning("%s: using the preset's learning rate; run --preset core first", out)
    settings = ablations(preset)
    plan = {each.label: runs_of(preset, each, chosen.get(each.tuned_as)) for each in settings}
    runs = [run for runs in plan.values() for run in runs]
    if runner.DRY_RUN.value:
        runner.print_plan({"ablations": runs}, out, preset)
        return
    runner.execute(runs, out, "ablations")
    results = {label: runner.execute(runs, out) for label, runs in plan.items()}
    against = {each.label: each.against for each in settings}
    write_report(results, against, {}, out / "table", "ablations")
    ours = ("uncertainty", "nash")
    panels = {
        "number of clusters (snr: k = 5)": [
            "snr: vanilla",
            *(f"{name}: nash" for name in ("k = 2", "snr", "k = 8", "k = 20", "renewed every 25")),
        ],
        "intervals and random clusters": [
            "snr: vanilla",
            *(f"{name}: {each}" for each in ours for name in ("timestep", "random")),
        ],
    }
    for name in changes(preset):
        panels[name] = [f"{name}: {method}" for method in CHANGED_METHODS]
    draw(results, panels, out / "table" / "ablations.png")
    logging.info("picture: %s", out / "table" / "ablations.png")


def write_report(
    results: dict[str, list[dict[str, Any]]],
    against: dict[str, str],
    milliseconds: dict[str, float],
    folder: Path,
    name: str,
) -> None:
    """Writes the numbers of every measurement as CSV and the table as Markdown.

    Columns:

    - the distance (mean and standard deviation over seeds) after a quarter, half and all steps;
    - the number of seeds at which it is below that of the setting compared with, after half and all
      steps;
    - the steps to reach that setting's mean last distance, interpolated between measurements;
    - the last loss on held-out images;
    - the share of samples that the classifier recognises as the requested class;
    - the distance of groups as large as the held-out images, to compare with the held-out images;
    - the mean distance of samples to the nearest training image, and the share of samples closer to
      one than 99 % of the held-out images are;
    - for methods with the Gram matrix, the share of steps with a negative cosine between two task
      gradients;
    - milliseconds per step.

    Columns without figures stay empty. Without features to evaluate samples, the distance is the
    loss on held-out images.
    """
    rows = [
        {"setting": label, "run": result["name"]}
        | {name: value for name, value in row.items() if not isinstance(value, list)}
        for label, group in results.items()
        for result in group
        for row in result["rows"]
    ]
    report.write_csv(folder / f"{name}.csv", rows)
    columns = ["setting", "distance by step", "ahead", "steps to reach", "validation loss"]
    columns += ["label accuracy", "in groups", "nearest", "copies", "conflicts", "ms per step"]
    lines = []
    for label, group in results.items():
        other = results[against[label]]
        diverged = [result for result in (*group, *other) if result["diverged"]]
        if diverged:
            names = ", ".join(result["name"] for result in diverged)
            lines.append([label, f"diverged: {names}", *[""] * (len(columns) - 2)])
            continue
        last = [result["rows"][-1] for result in group]
        steps = [row["step"] for row in group[0]["rows"]]
        shown = sorted({len(steps) // 4 - 1, len(steps) // 2 - 1, len(steps) - 1} - {-1})
        curve = [
            f"{steps[i]}: " + report.mean_and_deviation([quality(result, i) for result in group], 2)
            for i in shown
        ]
        ahead = [
            sum(quality(a, i) < quality(b, i) for a, b in zip(group, other, strict=True))
            for i in shown[-2:]
        ]
        mean = lambda key, digits, last=last: (
            f"{np.mean([row[key] for row in last]):.{digits}f}" if key in last[0] else ""
        )
        target = np.mean([quality(result) for result in other])
        same = group is other
        lines.append(
            [
                label,
                "; ".join(curve),
                "" if same else ", ".join(f"{count} of {len(group)}" for count in ahead),
                "" if same else _steps_to_reach(group, target),
                mean("validation_loss", 4),
                mean("label_accuracy", 3),
                mean("group_frechet_distance", 2),
                mean("nearest_train_distance", 3),
                mean("copies", 3),
                _conflicts(group, folder.parent),
                f"{milliseconds[label]:.1f}" if label in milliseconds else "",
            ]
        )
    text = report.markdown(columns, lines)
    first = next(iter(results.values()))[0]["rows"]
    if first and "real_frechet_distance" in first[-1]:
        real = first[-1]
        title = "in groups" if "group_frechet_distance" in real else "distance"
        floors = [f"{title} {real['real_frechet_distance']:.2f}"]
        if "real_nearest_train_distance" in real:
            floors += [f"nearest {real['real_nearest_train_distance']:.3f}", "copies 0.010"]
        if "classifier_test_accuracy" in real:
            floors.append(f"label accuracy {real['classifier_test_accuracy']:.3f}")
        count = real["real_num_samples"]
        text += f"\nHeld-out real images ({count}): {', '.join(floors)}.\n"
    write_bytes(folder / f"{name}.md", text.encode())
    print(f"\n{text}\ntable: {folder / f'{name}.md'}, all numbers: {folder / f'{name}.csv'}")


def _conflicts(group, out):
    logged = [report.curves(out / "runs" / result["name"]) for result in group]
    if "conflict" not in logged[0]:
        return ""
    return f"{np.mean([curves['conflict'].mean() for curves in logged]):.3f}"


def _steps_to_reach(group, target):
    """Mean step at which the curves reach a distance, or how many of the seeds reach it."""
    reached = []
    early = False
    for result in group:
        steps = [row["step"] for row in result["rows"]]
        # The distance falls roughly exponentially between measurements.
        excess = np.log([quality(result, i) / target for i in range(len(steps))])
        below = np.flatnonzero(excess <= 0)
        if not below.size:
            continue
        i = below[0]
        if i == 0:
            early = True
            reached.append(steps[0])
        else:
            part = excess[i - 1] / (excess[i - 1] - excess[i])
            reached.append(steps[i - 1] + part * (steps[i] - steps[i - 1]))
    if len(reached) < len(group):
        return f"{len(reached)} of {len(group)} reach it"
    return ("<= " if early else "") + f"{np.mean(reached):.0f}"


def draw(
    results: dict[str, list[dict[str, Any]]], panels: dict[str, list[str]], path: Path
) -> None:
    """Draws convergence curves; the band is one standard deviation over seeds."""
    rows = math.ceil(len(panels) / 5)
    columns = math.ceil(len(panels) / rows)
    figure, axes = plt.subplots(
        rows, columns, figsize=(16, 5.6 * rows), sharey="row", squeeze=False, layout="constrained"
    )
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    for ax, (title, labels) in zip(axes.flat, panels.items(), strict=False):
        for label in labels:
            _draw_curve(ax, results.get(label, []), label)
        _set_axes(ax, title)
        # Below the panel, where it covers no curve.
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.13), "columnspacing": 1}
        ax.legend(fontsize="small", ncols=1 if len(labels) < 4 else 2, **below)
    for ax in axes[:, 0]:
        ax.set_ylabel(_measured(results))
    report.save_figure(figure, path, palette=True)


def _draw_curve(ax, group, label, colour=None):
    """The mean of the runs that reached their end, and a band of one standard deviation."""
    group = [result for result in group if not result["diverged"]]
    if not group:
        return
    steps = [row["step"] for row in group[0]["rows"]]
    values = np.array([[quality(r, i) for i in range(len(steps))] for r in group])
    (line,) = ax.plot(steps, values.mean(0), marker="o", ms=3, label=label, color=colour)
    deviation = values.std(0, ddof=1) if len(group) > 1 else 0
    ax.fill_between(
        steps,
        values.mean(0) - deviation,
        values.mean(0) + deviation,
        color=line.get_color(),
        alpha=0.15,
    )


def _set_axes(ax, title):
    ax.set(title=title, xlabel="step", yscale="log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter(NullFormatter())


def _measured(results):
    has_distance = any(
        "frechet_distance" in row for group in results.values() for row in group[0]["rows"]
    )
    return "Frechet distance to the training data" if has_distance else "validation loss"


if __name__ == "__main__":
    runner.start(main, (*PRESETS, *_LISTS))
