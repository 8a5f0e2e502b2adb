"""ANT against vanilla training on handwritten digits: ``python -m experiments.demo``.

Trains each method from the same seed with the same batches and steps, draws samples from each, and
prints how far they are from real digits. A finished run is not done again; an interrupted one goes
on from its checkpoint.
"""

import json
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from absl import app, flags, logging

from ant_jax import builders, evaluate
from ant_jax import train as trainer
from ant_jax.config import RULES, check_same, load
from ant_jax.files import write_bytes
from ant_jax.metrics import duration, quiet_console
from configs import digits
from experiments import report

_METHODS = flags.DEFINE_list("methods", ["vanilla", "nash"], "Methods to compare.")
_CLUSTERS = flags.DEFINE_string("clusters", "snr", "What clusters the timesteps.")
_SEEDS = flags.DEFINE_list("seeds", ["0"], "Seeds of each method.")
_STEPS = flags.DEFINE_integer("num_steps", 3000, "Steps of each run.", lower_bound=1)
_EVERY = flags.DEFINE_integer("every", 1000, "Steps between measurements.", lower_bound=1)
_OUT = flags.DEFINE_string("out", "runs/demo", "Where the runs, the table and the picture go.")

_COLUMNS = (
    "method",
    "steps",
    "ms per step",
    "Frechet distance",
    "in groups of 300",
    "label accuracy",
    "time",
)


def main(argv):
    del argv
    quiet_console()
    unknown = [name for name in _METHODS.value if not RULES["method.name"].holds(name)]
    if unknown:
        raise app.UsageError(f"--methods={unknown[0]}: must be {RULES['method.name'].allowed}")
    out = Path(_OUT.value)
    begin = time.perf_counter()
    runs = [(method, int(seed)) for seed in _SEEDS.value for method in _METHODS.value]
    results = []
    for i, (method, seed) in enumerate(runs):
        elapsed = time.perf_counter() - begin
        eta = f", about {duration(elapsed / i * (len(runs) - i))} left" if i else ""
        logging.info("--- run %d of %d: %s, seed %d%s", i + 1, len(runs), method, seed, eta)
        results.append(run(method, seed, out / f"{method}-{_CLUSTERS.value}-{seed}"))
    table = make_table(results)
    write_bytes(out / "table.md", table.encode())
    picture = out / "demo.png"
    draw(results, picture)
    last = results[-1]["evaluations"][-1]
    print(f"\n{table}")
    print(
        "Frechet distance to the real training digits, lower is better, in the features of a\n"
        f"classifier that is right on {last['classifier_test_accuracy']:.1%} of held-out digits. "
        "The 300 held-out real\ndigits are at "
        f"{last['real_frechet_distance']:.2f}: compare that with the groups of 300 samples.\n"
        "Label accuracy: the share of samples that the classifier takes for the digit asked for."
    )
    print(f"picture: {picture}\ntook {duration(time.perf_counter() - begin)}")


def make_config(method, seed):
    config = digits.get_config(f"{method},{_CLUSTERS.value}")
    config.seed = seed
    config.num_steps = _STEPS.value
    config.checkpoint.keep_period = _EVERY.value
    config.checkpoint.every = _EVERY.value
    config.sample.every = 0
    config.tensorboard = False
    return config


def run(method, seed, workdir):
    """Trains and measures one run; its result is kept in a file."""
    path = workdir / "result.json"
    config = make_config(method, seed)
    steps = sorted({*range(_EVERY.value, _STEPS.value, _EVERY.value), _STEPS.value})
    if path.exists():
        check_same(load(workdir), config, workdir)
        result = json.loads(path.read_text())
        if [row["step"] for row in result["evaluations"]] == steps:
            logging.info("finished before: %s", path)
            return result
    begin = time.perf_counter()
    trainer.train(config, workdir)
    seconds = time.perf_counter() - begin
    result = {
        "method": method,
        "seed": seed,
        "workdir": str(workdir),
        "seconds": seconds,
        "evaluations": [evaluate.evaluate(config, workdir, step) for step in steps],
    }
    write_bytes(path, json.dumps(result, indent=1).encode())
    return result


def make_table(results):
    """Markdown, a line for each method and step count; over several seeds mean +- deviation."""
    lines = []
    for method in dict.fromkeys(result["method"] for result in results):
        group = [result for result in results if result["method"] == method]
        speed = np.median(
            [
                np.median(report.curves(Path(result["workdir"]))["steps_per_second"])
                for result in group
            ]
        )
        for i, row in enumerate(group[0]["evaluations"]):
            last = i == len(group[0]["evaluations"]) - 1
            rows = [result["evaluations"][i] for result in group]
            lines.append(
                [
                    method,
                    row["step"],
                    f"{1000 / speed:.1f}",
                    report.mean_and_deviation([row["frechet_distance"] for row in rows], 2),
                    report.mean_and_deviation([row["group_frechet_distance"] for row in rows], 2),
                    report.mean_and_deviation([row["label_accuracy"] for row in rows], 3),
                    duration(np.mean([result["seconds"] for result in group])) if last else "",
                ]
            )
    return report.markdown(_COLUMNS, lines)


def draw(results, path):
    """Grids and curves of the first two methods, all distances, and the clusters over log-SNR."""
    first, last = results[0], results[min(1, len(results) - 1)]
    config = make_config(last["method"], 0)
    process = builders.build_diffusion(config)
    boundaries = builders.build_method(config, process.log_snr).boundaries
    k = len(boundaries) - 1
    colours = plt.colormaps["viridis"](np.linspace(0, 0.9, k))
    figure = plt.figure(figsize=(15, 9), layout="constrained")
    axes = figure.subplot_mosaic(
        [["first", "last", "clusters"], ["losses", "weights", "distance"]],
        height_ratios=[1.25, 1],
    )
    for place, result in (("first", first), ("last", last)):
        grid = Path(result["workdir"]) / "evaluation" / f"{_STEPS.value:08d}.png"
        axes[place].imshow(plt.imread(grid))
        axes[place].set_axis_off()
        row = result["evaluations"][-1]
        axes[place].set_title(
            f"{result['method']}, {row['step']} steps: distance {row['frechet_distance']:.2f}, "
            f"accuracy {row['label_accuracy']:.1%}\n(columns: asked for 0 to 9)"
        )
    ax = axes["clusters"]
    for i in range(k):
        ax.axvspan(boundaries[i], boundaries[i + 1], color=colours[i], alpha=0.35)
    ax.plot(process.log_snr, color="black")
    ax.set(
        title=f"{k} {config.clusters.cost} clusters of timesteps",
        xlabel="timestep t",
        ylabel="log-SNR",
        xlim=(0, process.num_timesteps),
    )
    for result, style in ((first, "--"), (last, "-")):
        data = report.curves(Path(result["workdir"]))
        for i in range(k):
            losses = data["cluster_losses"][:, i]
            axes["losses"].plot(data["step"], losses, style, color=colours[i])
    axes["losses"].set(
        title=f"cluster losses ({last['method']} solid, {first['method']} dashed)",
        xlabel="step",
        yscale="log",
    )
    data = report.curves(Path(last["workdir"]))
    for i in range(k):
        label = f"t in [{boundaries[i]}, {boundaries[i + 1]})"
        weights = data["weights"][:, i]
        axes["weights"].plot(data["step"], weights, color=colours[i], label=label)
    axes["weights"].legend(fontsize="small", loc="upper left")
    axes["weights"].set(
        title=f"weights of the clusters, {last['method']}", xlabel="step", yscale="log"
    )
    for method in dict.fromkeys(result["method"] for result in results):
        group = [r["evaluations"] for r in results if r["method"] == method]
        steps = [row["step"] for row in group[0]]
        distances = np.array([[row["frechet_distance"] for row in rows] for rows in group])
        spread = distances.std(0, ddof=1) if len(group) > 1 else None
        axes["distance"].errorbar(
            steps, distances.mean(0), spread, marker="o", capsize=3, label=method
        )
    axes["distance"].set(
        title=f"Frechet distance to real digits, {len(_SEEDS.value)} seed(s)",
        xlabel="step",
        yscale="log",
    )
    axes["distance"].legend(fontsize="small")
    report.save_figure(figure, path)


if __name__ == "__main__":
    app.run(main)
