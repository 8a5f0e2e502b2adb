"""Auxiliary tasks on real images: ``python -m experiments.auxiliary_tasks``.

The main task is to classify handwritten digits with few labels. Auxiliary tasks share the trunk of
its network: some help, others harm. Every method of ``ant_jax.mtl`` trains on helpful tasks alone,
on harmful ones alone, and on all. The accuracy on held-out images, beside that of the main task
alone and of equal weights, tells which methods use the helpful tasks and ignore the harmful ones.

All methods have the same network, initial parameters, batches and grid of learning rates. A method
that needs held-out examples takes them from its labelled images, so it trains on fewer. A finished
result in the output folder is not computed again: delete it after a change of the method.
"""

import functools
import inspect
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.experimental import aggregating
from tqdm import tqdm

from ant_jax import mtl, settings
from ant_jax.data.digits import digits
from ant_jax.mtl.aggregators.halves import OnHalves
from ant_jax.runtime.files import write_bytes
from experiments import report, runner

import matplotlib.pyplot as plt  # isort: skip  (after report, which chooses the backend)
from matplotlib.figure import Figure  # isort: skip
from matplotlib.ticker import NullLocator  # isort: skip

MAIN = "digit"
SINGLE, EQUAL = "single task", "linear"
LEARNING_RATES = (1e-3, 3e-3, 1e-2)
WIDTH = 32
CLASSES = 10
# In so many steps a batch has had all images with auxiliary targets, once each on average.
STEPS_PER_EPOCH = 20

_CAPTION = """\
Accuracy of the main task on {test} held-out images, in %: mean and standard error over {seeds}
seeds, and the paired differences to the main task alone and to equal weights. Learning rate: the
best of the grid on other images. Time: CPU time of a step relative to that of equal weights.
"""


class Size(NamedTuple):
    """The size of the experiment.

    Attributes:
      seeds: number of seeds; each has its own labelled images.
      steps: number of steps.
      labelled: number of images with a label of the main task, a multiple of the classes.
      held_out: how many of these a method keeps for itself if it needs held-out examples.
      others: number of images with targets of the auxiliary tasks alone.
      batch: number of labelled images in a batch, and of the others.
    """

    seeds: int = 10
    steps: int = 600
    labelled: int = 100
    held_out: int = 20
    others: int = 800
    batch: int = 40


class Task(NamedTuple):
    """A task of the benchmark.

    Attributes:
      outputs: size of its output.
      targets: images (n, 64) in 0..1, labels (n,) and a generator to the targets: (n,) classes or
        (n, outputs) numbers.
    """

    outputs: int
    targets: Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]


def _ink(images, labels, rng):
    mean = images.mean(1, keepdims=True)
    return (mean - mean.mean()) / mean.std()


TASKS = {
    MAIN: Task(CLASSES, lambda images, labels, rng: labels),
    "reconstruction": Task(64, lambda images, labels, rng: images),
    "parity": Task(2, lambda images, labels, rng: labels % 2),
    "ink": Task(1, _ink),
    "random labels": Task(
        CLASSES, lambda images, labels, rng: rng.integers(CLASSES, size=len(labels))
    ),
    "noise": Task(16, lambda images, labels, rng: 6 * rng.normal(size=(len(labels), 16))),
}
# The main task is the first: it is the default of methods that know a main task.
GROUPS = {
    "helpful": (MAIN, "reconstruction", "parity", "ink"),
    "harmful": (MAIN, "random labels", "noise"),
    "all": tuple(TASKS),
}

TRUNK = nn.Sequential([nn.Dense(WIDTH), nn.relu, nn.Dense(WIDTH), nn.relu])
# All heads are one layer, whatever the group: the initial parameters are always the same.
HEADS = nn.Dense(sum(task.outputs for task in TASKS.values()))


class Examples(NamedTuple):
    """Images (n, 64), the targets of each task, and (n,) whether the main task has a target."""

    images: jax.Array | np.ndarray
    targets: Mapping[str, jax.Array | np.ndarray]
    labelled: jax.Array | np.ndarray


class Data(NamedTuple):
    """The data of one seed.

    Attributes:
      examples: first the labelled images, then the others.
      order: (steps, 2 batch) which examples are in each batch.
      order_held_out: the same without the last ``held_out`` labelled images.
      validation: images and labels to choose the learning rate by.
    """

    examples: Examples
    order: np.ndarray
    order_held_out: np.ndarray
    validation: tuple[np.ndarray, np.ndarray]


class Method(NamedTuple):
    """A way to train on several tasks.

    Attributes:
      start: ``(tasks, seed, params) -> (state, gradient)``, where ``gradient`` is
        ``(params, examples, held_out, learning_rate, state) -> (gradient, state)``.
      holds_out: whether it keeps labelled images out of its batches, for ``held_out``.
    """

    start: Callable[[tuple[str, ...], jax.Array, Any], tuple[Any, Callable]]
    holds_out: bool = False


def trunk(params: Any, examples: Examples) -> jax.Array:
    """The features of the images, (n, WIDTH)."""
    features: Any = TRUNK.apply({"params": params["trunk"]}, examples.images)
    return features


def _outputs(params, features):
    ends = np.cumsum([task.outputs for task in TASKS.values()])[:-1]
    together: Any = HEADS.apply({"params": params["heads"]}, features)
    return dict(zip(TASKS, jnp.split(together, ends, axis=-1), strict=True))


def example_losses(
    params: Any, features: jax.Array, examples: Examples, tasks: Sequence[str]
) -> jax.Array:
    """The loss of each task on each example, (k, n); 0 where there is no label."""
    outputs = _outputs(params, features)

    def losses(name):
        output, target = outputs[name], examples.targets[name]
        if target.ndim == 2:
            return jnp.mean((output - target) ** 2, -1)
        found = optax.softmax_cross_entropy_with_integer_labels(output, target)
        return jnp.where(examples.labelled, found, 0) if name == MAIN else found

    return jnp.stack([losses(name) for name in tasks])


def task_losses(
    params: Any, features: jax.Array, examples: Examples, tasks: Sequence[str]
) -> jax.Array:
    """The mean loss of each task over the examples that have its target, (k,)."""
    return example_losses(params, features, examples, tasks).sum(1) / _counts(examples, tasks)


def _counts(examples, tasks):
    count = lambda name: examples.labelled.sum() if name == MAIN else examples.labelled.size
    return jnp.stack([jnp.float32(count(name)) for name in tasks])


def weighted(make: Callable[..., mtl.Weighting]) -> Method:
    """Trains the trunk by a weighting, and each head by its own loss."""

    def start(tasks, seed, params):
        weighting = _built(make, tasks, seed)
        if "gram" in weighting.needs:
            return _by_aggregator(mtl.combine(weighting), tasks, params)
        heads = functools.partial(task_losses, tasks=tasks)

        def gradient(params, examples, held_out, learning_rate, state):
            counts = _counts(examples, tasks)
            # The same gradient by one backward pass.
            found = mtl.backward_at_features(
                trunk, heads, params, examples, weighting, state, counts=counts
            )
            return found.gradient, found.state

        return mtl.init_combine(weighting), gradient

    return Method(start)


def aggregated(make: Callable[..., aggregating.Aggregator], parts: int = 1) -> Method:
    """Trains the trunk by an aggregator, and each head by its own loss.

    Args:
      make: k and settings to the aggregator.
      parts: into how many parts of each task's examples it wants the batch to be split.
    """

    def start(tasks, seed, params):
        return _by_aggregator(_built(make, tasks, seed), tasks, params, parts)

    return Method(start)


def _built(make, tasks, seed):
    given = {"seed": seed, "steps_per_epoch": STEPS_PER_EPOCH}
    names = inspect.signature(make).parameters
    return make(len(tasks), **{name: value for name, value in given.items() if name in names})


def _by_aggregator(aggregator, tasks, params, parts=1):
    def gradients(params, examples):
        losses_of = lambda params: task_losses(params, trunk(params, examples), examples, tasks)
        losses, pullback = jax.vjp(losses_of, params)
        return losses, jax.lax.map(pullback, jnp.eye(len(tasks)))[0], _counts(examples, tasks)

    def gradient(params, examples, held_out, learning_rate, state):
        # Every n-th example, so that each part has its share of the labelled ones.
        found = [
            gradients(params, jax.tree.map(lambda leaf, i=i: leaf[i::parts], examples))
            for i in range(parts)
        ]
        losses, stacked, counts = jax.tree.map(lambda *rows: jnp.concatenate(rows), *found)
        of_trunk, state = aggregator.update(stacked["trunk"], state, losses=losses, counts=counts)
        of_heads = jax.tree.map(lambda leaf: leaf.sum(0) / parts, stacked["heads"])
        return {"trunk": of_trunk, "heads": of_heads}, state

    return aggregator.init(params["trunk"]), gradient


def _main_loss(params, held_out):
    return task_losses(params, trunk(params, held_out), held_out, (MAIN,))[0]


def _lookahead(tasks, seed, params):
    """HydaLearn by real steps, measured on the held-out images."""
    heads = functools.partial(task_losses, tasks=tasks)

    def gradient(params, examples, held_out, learning_rate, state):
        weights, _ = mtl.lookahead_weights(
            lambda params: heads(params, trunk(params, examples), examples),
            lambda params: _main_loss(params, held_out),
            params,
            learning_rate,
        )
        found = mtl.Weighting(tuple, lambda stats, state: (weights, state), len(tasks), frozenset())
        back = mtl.backward_at_features(
            trunk, heads, params, examples, found, mtl.init_combine(found)
        )
        return back.gradient, state

    return (), gradient


def _slgrad(tasks, seed, params):
    def gradient(params, examples, held_out, learning_rate, state):
        along = jax.grad(_main_loss)(params, held_out)
        # The inner products run over the shared parameters, as in the authors' code.
        along = along | {"heads": jax.tree.map(jnp.zeros_like, along["heads"])}
        losses = lambda params: example_losses(params, trunk(params, examples), examples, tasks)
        return mtl.slgrad(losses, params, along).gradient, state

    return (), gradient


def _rep_mtl(tasks, seed, params):
    def gradient(params, examples, held_out, learning_rate, state):
        def loss(params):
            heads = lambda features: task_losses(params, features, examples, tasks)
            return mtl.rep_mtl(heads, trunk(params, examples)).total

        return jax.grad(loss)(params), state

    return (), gradient


def methods() -> dict[str, Method]:
    """All methods of ``ant_jax.mtl`` by name: weightings, aggregators and systems."""
    names = settings.names_in(mtl, mtl.Weighting)
    found = {name: weighted(settings.resolve(mtl, name, mtl.Weighting)) for name in names}
    on_halves = settings.names_in(mtl.aggregators, OnHalves)
    for name in mtl.aggregators.__all__:
        found[name] = aggregated(getattr(mtl, name), parts=2 if name in on_halves else 1)
    return found | {
        "hydalearn, real steps": Method(_lookahead, holds_out=True),
        "slgrad": Method(_slgrad, holds_out=True),
        "rep_mtl": Method(_rep_mtl),
    }


def data_of(seed: int, size: Size) -> Data:
    """Draws the labelled images, equally many of each class, the others, and the batches."""
    source = digits("train")
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(source.labels))
    # Position of an image among those of its class: the first of all classes are labelled.
    rank = np.zeros(len(order), int)
    for label in range(CLASSES):
        of_class = order[source.labels[order] == label]
        rank[of_class] = np.arange(len(of_class))
    first = order[np.argsort(rank[order], kind="stable")][: size.labelled]
    order = np.concatenate([first, order[~np.isin(order, first)]])
    used, rest = np.split(order, [size.labelled + size.others])
    images, labels = _images(source)
    number = lambda target: target.astype(np.int32 if target.ndim == 1 else np.float32)
    targets = {
        name: number(task.targets(images, labels, rng))[used] for name, task in TASKS.items()
    }
    draws = rng.random((2, size.steps, size.batch))
    batches = lambda labelled: np.concatenate(
        [draws[0] * labelled, size.labelled + draws[1] * size.others], axis=1
    ).astype(np.int32)
    return Data(
        Examples(images[used], targets, np.arange(len(used)) < size.labelled),
        batches(size.labelled),
        batches(size.labelled - size.held_out),
        (images[rest], labels[rest]),
    )


def _images(source):
    return source.images.reshape(-1, 64) / np.float32(255), source.labels.astype(np.int32)


def run(method: Method, tasks: tuple[str, ...], size: Size) -> dict[str, Any]:
    """Trains with all learning rates and seeds, in one compiled program.

    Returns:
      "validation" and "test": the accuracies, (rates, seeds); "seconds": CPU time of a step.
    """

    def train(params, learning_rate, seed, data, test):
        state, gradient = method.start(tasks, seed, params)
        tx = optax.adam(learning_rate)
        pick = lambda rows: jax.tree.map(lambda leaf: leaf[rows], data.examples)
        held_out = pick(np.arange(size.labelled - size.held_out, size.labelled))

        def step(carry, rows):
            params, tx_state, state = carry
            found, state = gradient(params, pick(rows), held_out, learning_rate, state)
            updates, tx_state = tx.update(found, tx_state)
            return (optax.apply_updates(params, updates), tx_state, state), None

        order = data.order_held_out if method.holds_out else data.order
        (params, _, _), _ = jax.lax.scan(step, (params, tx.init(params), state), order)
        return accuracy(params, *data.validation), accuracy(params, *test)

    def accuracy(params, images, labels):
        examples = Examples(images, {}, labels)
        found = _outputs(params, trunk(params, examples))[MAIN]
        return jnp.mean(found.argmax(-1) == labels)

    seeds = np.arange(size.seeds)
    each = jax.vmap(train, (0, None, 0, 0, None))
    program = jax.jit(jax.vmap(each, (None, 0, None, None, None)))
    data = jax.tree.map(
        lambda *leaves: np.stack(leaves), *(data_of(seed, size) for seed in range(size.seeds))
    )
    rates = np.array(LEARNING_RATES, np.float32)
    arguments = init_params(size.seeds), rates, seeds, data, _images(digits("test"))
    compiled = program.lower(*arguments).compile()
    # Other programs on the machine do not count.
    begin = time.process_time()
    validation, test = jax.block_until_ready(compiled(*arguments))
    seconds = (time.process_time() - begin) / size.steps
    return {"validation": validation.tolist(), "test": test.tolist(), "seconds": seconds}


@functools.cache
def init_params(seeds: int) -> Any:
    """The initial parameters of each seed, on the leading axis; the same for all methods."""

    def init(key):
        for_trunk, for_heads = jax.random.split(key)
        return {
            "trunk": TRUNK.init(for_trunk, jnp.zeros((1, 64)))["params"],
            "heads": HEADS.init(for_heads, jnp.zeros((1, WIDTH)))["params"],
        }

    return jax.jit(jax.vmap(init))(jax.vmap(jax.random.key)(jnp.arange(seeds)))


def main(argv: list[str]) -> None:
    out = runner.out_folder(argv, "auxiliary_tasks")
    write(out, methods(), Size())


def write(out: Path, compared: dict[str, Method], size: Size) -> None:
    """Computes what is not yet in a folder, and writes the tables, the CSV and the picture.

    Args:
      out: folder.
      compared: the methods by name; equal weights must be among them.
      size: of the experiment.
    """
    jobs = [("main", SINGLE, weighted(mtl.linear), (MAIN,))]
    jobs += [
        (group, name, method, tasks)
        for name, method in compared.items()
        for group, tasks in GROUPS.items()
    ]
    source = {"size": size._asdict(), "learning rates": LEARNING_RATES}
    results = {}
    with tqdm(jobs, desc="runs") as bar:
        for group, name, method, tasks in bar:
            bar.set_postfix_str(f"{name}, {group}")
            path = out / "runs" / group / f"{name}.json"
            make = functools.partial(run, method, tasks, size)
            results[group, name] = _chosen(runner.kept(path, source, make))
    rows = {
        group: {SINGLE: results["main", SINGLE]} | {name: results[group, name] for name in compared}
        for group in GROUPS
    }
    report.write_csv(out / "auxiliary_tasks.csv", list(_csv(rows)))
    report.save_figure(draw(rows), out / "auxiliary_tasks.png")
    tables = [f"{group}: {', '.join(GROUPS[group])}\n\n{_table(rows[group])}" for group in GROUPS]
    caption = _CAPTION.format(test=len(digits("test").labels), seeds=size.seeds)
    text = "\n".join([*tables, caption])
    write_bytes(out / "table.md", text.encode())
    print(f"\n{text}\npicture: {out / 'auxiliary_tasks.png'}")


class Result(NamedTuple):
    """A method at the learning rate that is best on the validation images.

    Attributes:
      learning_rate: that rate.
      validation: (seeds,) accuracy there, in %.
      accuracy: (seeds,) accuracy on the test images, in %.
      seconds: CPU time of a step.
    """

    learning_rate: float
    validation: np.ndarray
    accuracy: np.ndarray
    seconds: float


def _chosen(value):
    validation, test = 100 * np.array(value["validation"]), 100 * np.array(value["test"])
    best = int(validation.mean(1).argmax())
    return Result(LEARNING_RATES[best], validation[best], test[best], value["seconds"])


def mean_and_error(values: Iterable[float]) -> tuple[float, float]:
    """The mean over seeds and its standard error; the error of a single value is 0."""
    values = np.asarray(values)
    return values.mean(), values.std(ddof=min(1, len(values) - 1)) / np.sqrt(len(values))


def _csv(rows):
    for group, found in rows.items():
        for name, result in found.items():
            for seed, (validation, accuracy) in enumerate(
                zip(result.validation, result.accuracy, strict=True)
            ):
                yield {
                    "group": group,
                    "method": name,
                    "seed": seed,
                    "learning rate": result.learning_rate,
                    "validation accuracy": validation,
                    "accuracy": accuracy,
                    "seconds per step": result.seconds,
                }


def _sorted(found):
    """From the best to the worst."""
    return sorted(found.items(), key=lambda item: -item[1].accuracy.mean())


def _table(found):
    single, equal = found[SINGLE], found[EQUAL]
    words = lambda values, sign="": "{:{}.1f} ± {:.1f}".format(
        mean_and_error(values)[0], sign, mean_and_error(values)[1]
    )
    lines = [
        [
            name,
            words(result.accuracy),
            words(result.accuracy - single.accuracy, "+"),
            words(result.accuracy - equal.accuracy, "+"),
            f"{result.learning_rate:g}",
            f"{result.seconds / equal.seconds:.1f}",
        ]
        for name, result in _sorted(found)
    ]
    columns = ["method", "accuracy", "- single task", "- equal weights", "learning rate", "time"]
    return report.markdown(columns, lines)


def draw(rows: dict[str, dict[str, Result]]) -> Figure:
    """The paired differences to the main task alone, sorted, one panel for each group."""
    height = 2.5 + 0.18 * max(map(len, rows.values()))
    figure, axes = plt.subplots(
        1, len(rows), figsize=(4.2 * len(rows), height), sharex=True, layout="constrained"
    )
    lines = ()
    for axis, (group, found) in zip(axes, rows.items(), strict=True):
        single = found[SINGLE].accuracy
        names = [name for name, _ in reversed(_sorted(found))]
        for y, name in enumerate(names):
            mean, error = mean_and_error(found[name].accuracy - single)
            color = "C1" if name in (SINGLE, EQUAL) else "C0"
            axis.errorbar(mean, y, xerr=error, fmt="o", color=color, ms=4, lw=1)
        alone = axis.axvline(0, color="C1", lw=0.8)
        difference = np.mean(found[EQUAL].accuracy - single)
        lines = alone, axis.axvline(difference, color="C1", lw=0.8, ls="--")
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.set(
            title=f"{group} auxiliary tasks",
            xlabel="accuracy - single task\n(points; logarithmic beyond 5)",
        )
        # Most methods are within 5 points of each other, a few are 30 points away.
        axis.set_xscale("symlog", linthresh=5, linscale=0.8)
        axis.set_xticks([-30, -10, -5, -2, 0, 2])
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_locator(NullLocator())
        axis.margins(y=0.01)
        axis.grid(axis="x", lw=0.3)
    names = "single task: the main task alone", "linear: equal weights"
    figure.legend(lines, names, loc="outside lower center", ncols=2, fontsize="small")
    return figure


if __name__ == "__main__":
    runner.start(main, presets=())
