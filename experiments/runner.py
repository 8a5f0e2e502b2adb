"""Running many training runs: side by side where that pays, restartable, with progress.

The runs of a preset lie in one folder, ``OUT/runs``, by names that tell their settings, so that
experiments share them. A finished run is not done again; an interrupted one goes on from its
checkpoint.
"""

import contextlib
import json
import math
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from ant_jax import config as config_lib
from ant_jax import evaluate, experiment, train
from ant_jax import workdir as workdir_lib
from ant_jax.config import ConfigError
from ant_jax.evaluation import evaluator
from ant_jax.latents import dataset
from ant_jax.runtime import compilation_cache, logs, progress, signals
from ant_jax.runtime.files import user_path, write_bytes
from experiments.presets import Preset, make_config

PRESET = flags.DEFINE_string("preset", "digits", "At which size the experiment runs.")
OUT = flags.DEFINE_string("out", None, "Where everything goes; default runs/experiments/PRESET.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the plan and do nothing.")

# Below so many steps a process costs more to start than it saves.
_WORTH_A_PROCESS = 1000
# Neither what is learnt nor what is measured depends on these.
_INCIDENTAL = ("log_every", "tensorboard", "profile_steps", "data.num_workers", "data.dir")
_INCIDENTAL += ("checkpoint.", "sample.every", "clusters.affinity")
_SHARE_A_STEP = ("seed", "optimizer.learning_rate", "num_steps", "clusters.cost", "clusters.only")
_SHARE_A_STEP += ("clusters.affinity", "method.share_weighted")


class Run(NamedTuple):
    """One training run and the steps at which its EMA model is measured."""

    name: str
    config: ConfigDict
    steps: tuple[int, ...]


class Stopped(RuntimeError):
    """A run was asked to stop before its end; it has saved its state."""


def start(main: Callable[[list[str]], None]) -> None:
    """Runs a program of the command line, which ends in one line where it is asked to stop."""

    def run(argv):
        with signals.ending_the_program("start again to go on") as stop:
            try:
                main(argv)
            except Stopped as error:
                print(error, file=sys.stderr)
                sys.exit(signals.status(stop.signum))

    app.run(run)


def choose(argv: Sequence[str], presets: dict[str, Preset]) -> tuple[Preset, Path]:
    """The preset of the command line and the folder for its output.

    Raises:
      app.UsageError: for an unknown argument or preset, or an ``--out`` that is no folder.
    """
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    name = PRESET.value
    if name not in presets:
        raise app.UsageError(f"--preset={name}: must be one of {', '.join(presets)}")
    try:
        out = user_path(OUT.value or f"runs/experiments/{presets[name].name}")
    except OSError as error:
        raise app.UsageError(f"--out={error}") from None
    if out.exists() and not out.is_dir():
        raise app.UsageError(f"--out={out} is not a folder")
    return presets[name], out


def make_run(
    preset: Preset,
    method: str,
    clusters: str,
    seed: int,
    settings: dict[str, Any] | None = None,
    measurements: int | None = None,
) -> Run:
    """A run of a preset.

    Args:
      preset: the preset.
      method: of the config.
      clusters: of the config.
      seed: of the run.
      settings: what to change in the preset's config, by ``"group.name"``; they make the name.
      measurements: how many of the preset's evenly spaced measurements to make, counted from the
        last, at the end of the run; None for all.
    """
    plain = config_lib.flatten(make_config(preset, method, clusters, seed))
    # What changes nothing does not count, so that equal runs have equal names.
    settings = {key: value for key, value in (settings or {}).items() if value != plain[key]}
    config = make_config(preset, method, clusters, seed, settings)
    every = math.ceil(config.num_steps / preset.measurements)
    # All are kept, whoever asks first: another experiment may measure the same run elsewhere.
    config.checkpoint.keep_period = every
    config.checkpoint.every = math.gcd(every, config.checkpoint.every)
    steps = [*range(every, config.num_steps, every), config.num_steps]
    words = [
        f"{key.split('.')[-1]}={Path(value).stem if key == 'clusters.affinity' else value}"
        for key, value in settings.items()
    ]
    count = len(steps) if measurements is None else measurements
    name = "-".join([method, clusters, *words, f"seed={seed}"])
    return Run(name, config, tuple(steps[len(steps) - count :]))


def print_plan(stages: dict[str, Sequence[Run]], out: Path, preset: Preset) -> None:
    """Says how many runs and steps are to be done, how many are done, and how long it may take.

    The estimate is by the finished runs in the folder, or else by the preset's.
    """
    pace = _pace(out) or preset.seconds_per_step
    total = 0.0
    for title, runs in stages.items():
        waiting = [run for run in runs if _result(run, out) is None]
        seconds = (pace or 0) * sum(map(_work, waiting))
        total += seconds
        print(
            f"{title}: {len(runs)} runs, {len(waiting)} of them to do, "
            f"{sum(run.config.num_steps for run in waiting)} steps"
            + (f", about {progress.duration(seconds)}" if pace else "")
        )
    estimate = (
        f"about {progress.duration(total)} in all" if pace else "no run of it has been timed yet"
    )
    print(f"in {out}: {estimate}")


def execute(runs: Sequence[Run], out: Path, title: str = "runs") -> list[dict[str, Any]]:
    """Does what is not done yet and returns the results in the order of the runs.

    A result has ``name``, ``num_steps``, ``batch_size``, ``config`` (flat), ``seconds``, ``rows``
    (one a measurement, see `evaluate.evaluate`) and ``diverged``: the message where a loss was not
    finite, otherwise "".

    Raises:
      ConfigError: naming the setting, if a run is impossible or its folder holds another one.
      Stopped: if a run was asked to stop.
      RuntimeError: naming the run, if it fails for another reason than divergence.
    """
    waiting = [run for run in runs if _result(run, out) is None]
    if waiting:
        _check(waiting)
        with _progress(waiting, out, title):
            groups = _groups(waiting, _workers())
            if _workers() == 1 or sum(run.config.num_steps for run in waiting) < _WORTH_A_PROCESS:
                # In the main thread, which a signal can stop.
                for group in groups:
                    _run_all(group, out)
            else:
                for _ in _in_processes(_run_all, [(group, out) for group in groups]):
                    pass
    return [_result(run, out) for run in runs]


def finished(runs: Sequence[Run], out: Path, title: str = "runs") -> list[dict[str, Any]]:
    """`execute` where every run must reach its end.

    Raises:
      RuntimeError: naming the runs that diverged.
    """
    results = execute(runs, out, title)
    diverged = [result for result in results if result["diverged"]]
    if diverged:
        raise RuntimeError(
            "diverged: "
            + "; ".join(f"{result['name']}: {result['diverged']}" for result in diverged)
        )
    return results


def parallel(function: Callable, arguments: Sequence[tuple], title: str) -> list[Any]:
    """``[function(*a) for a in arguments]``, each beginning with a run, as runs are executed."""
    bar = lambda each: tqdm(each, title, len(arguments))
    if _workers() == 1 or sum(run.config.num_steps for run, *_ in arguments) < _WORTH_A_PROCESS:
        return [function(*each) for each in bar(arguments)]
    results = dict(bar(_in_processes(function, arguments)))
    return [results[number] for number in range(len(arguments))]


def folder(run: Run, out: Path) -> Path:
    """The workdir of a run."""
    return out / "runs" / run.name


def made_from(run: Run) -> dict[str, Any]:
    """What a run and its measurements depend on, to tell whether something kept is still true."""
    flat = config_lib.flatten(run.config)
    kept = {
        name: value for name, value in flat.items() if not config_lib.is_among(name, _INCIDENTAL)
    }
    return json.loads(json.dumps(kept))


def kept(path: Path, source: Any, make: Callable[[], Any]) -> Any:
    """The JSON value in a file if it was made from the same source, otherwise made anew."""
    source = json.loads(json.dumps(source))
    if path.exists():
        before = json.loads(path.read_text())
        if before["made from"] == source:
            return before["value"]
    value = make()
    write_bytes(path, json.dumps({"made from": source, "value": value}, indent=1).encode())
    return value


def _check(runs):
    """What can fail fails before the first run, and not hours later."""
    source = dataset.open_data(runs[0].config)
    evaluator.check(runs[0].config)
    for run in runs:
        try:
            pieces = experiment.build(run.config, source.image_shape[-1], source.num_classes)
            experiment.check_batch(run.config, pieces.method)
        except ConfigError as error:
            raise ConfigError(f"run {run.name}: {error}") from error


def _result(run, out):
    """The result of a finished run, or None."""
    path = folder(run, out) / "result.json"
    if not path.exists():
        return None
    config_lib.check_same(workdir_lib.load_config(path.parent), run.config, path.parent)
    result = json.loads(path.read_text())
    if result["config"] != made_from(run):
        return None
    rows = [row for row in result["rows"] if row["step"] in run.steps]
    if not result["diverged"] and len(rows) < len(run.steps):
        return None
    return result | {"rows": rows}


def _done(run, out):
    """Steps that a run has logged; all of them once it has a result, however it ended."""
    if _result(run, out) is not None:
        return run.config.num_steps
    path = folder(run, out) / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    # The last one may not be written to its end.
    steps = [logs.step_of(line) or 0 for line in lines[-2:]]
    return min(max(steps, default=0), run.config.num_steps)


@contextlib.contextmanager
def _progress(runs, out, title):
    """A bar over the steps of all runs, by what they have logged."""
    steps = lambda: sum(_done(run, out) for run in runs)
    total = sum(run.config.num_steps for run in runs)
    over = threading.Event()
    verbosity = logging.get_verbosity()
    # The runs' own lines would tear the bar.
    logging.set_verbosity(logging.WARNING)
    with tqdm(desc=title, total=total, unit="step", smoothing=0.05, initial=steps()) as bar:

        def follow():
            while not over.wait(2):
                bar.update(steps() - bar.n)

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            bar.update(steps() - bar.n)
            logging.set_verbosity(verbosity)


def _groups(runs, workers):
    """Runs that share a compiled step, as a rule; the longest group first.

    A group is split, and compiled anew, where it would keep one worker busy when the others are
    done.
    """
    groups = {}
    for run in runs:
        config = config_lib.flatten(run.config)
        key = tuple((name, value) for name, value in config.items() if name not in _SHARE_A_STEP)
        groups.setdefault(key, []).append(run)
    steps = lambda group: sum(run.config.num_steps for run in group)
    most = sum(map(steps, groups.values())) / (workers if workers == 1 else 3 * workers)
    pieces = []
    for group in groups.values():
        count = min(len(group), math.ceil(steps(group) / most))
        pieces += [group[i::count] for i in range(count)]
    return sorted(pieces, key=steps, reverse=True)


def _cores():
    """The cores that this process may use; not every system can tell or pin."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _workers():
    """Runs side by side: one a core on CPUs, where threads do not help a small step."""
    return len(_cores()) if jax.default_backend() == "cpu" else 1


def _in_processes(function: Callable, arguments: Sequence[tuple]) -> Iterator[tuple[int, Any]]:
    """Which call is done and what it has returned, as they end; a core for each process."""
    context = multiprocessing.get_context("spawn")
    cores = context.SimpleQueue()
    for core in _cores():
        cores.put(core)
    count = min(_workers(), len(arguments))
    pool = ProcessPoolExecutor(count, context, _start_worker, (cores, os.getpid()))
    try:
        with signals.deaf_children():
            numbers = {pool.submit(_call, function, *each): i for i, each in enumerate(arguments)}
        with signals.saving() as stop:
            stop.saving = True
            waiting = set(numbers)
            while waiting:
                done, waiting = wait(waiting, 0.5, FIRST_COMPLETED)
                if stop.signum is not None:
                    # Each run saves its state.
                    for process in pool._processes.values():
                        process.terminate()
                    pool.shutdown(cancel_futures=True)
                    raise Stopped("the runs that were under way are saved: start again to go on")
                for future in done:
                    yield numbers[future], future.result()
    except BaseException:
        for process in (pool._processes or {}).values():
            process.kill()
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def _start_worker(cores, parent):
    """One core each, set before JAX counts them; nobody works on for a parent that is gone."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {cores.get()})
    # NumPy counted the cores when it was imported; its threads would wait for each other on one.
    threadpool_limits(1)
    compilation_cache.enable()
    logging.set_verbosity(logging.WARNING)

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _call(function, *arguments):
    """In a worker: what is no run, or has no step yet, stops too."""
    with signals.listening():
        try:
            return function(*arguments)
        except KeyboardInterrupt:
            raise Stopped("asked to stop: start again to go on") from None


def _run_all(runs: Sequence[Run], out: Path) -> None:
    for run in runs:
        try:
            _run(run, out)
        except Stopped:
            raise
        except Exception as error:
            raise RuntimeError(f"run {run.name} in {folder(run, out)}: {error!r}") from error


def _run(run, out):
    workdir = folder(run, out)
    begin = time.perf_counter()
    diverged = ""
    rows = []
    try:
        state = train.train(run.config, workdir)
        if int(state.step) < run.config.num_steps:
            raise Stopped(f"{run.name} stopped at step {int(state.step)}: start again to go on")
        rows = [evaluate.evaluate(run.config, workdir, step) for step in run.steps]
    except FloatingPointError as error:
        diverged = str(error)
    result = {
        "name": run.name,
        "num_steps": run.config.num_steps,
        "batch_size": run.config.data.batch_size,
        "config": made_from(run),
        "seconds": time.perf_counter() - begin,
        "diverged": diverged,
        "rows": rows,
    }
    write_bytes(workdir / "result.json", (json.dumps(result, indent=1) + "\n").encode())


def _pace(out):
    """Seconds for a unit of work, by the finished runs; None if there are none."""
    results = [json.loads(path.read_text()) for path in (out / "runs").glob("*/result.json")]
    work = sum(_steps_of_work(result["num_steps"], result["batch_size"]) for result in results)
    return sum(result["seconds"] for result in results) / _workers() / work if work else None


def _work(run):
    return _steps_of_work(run.config.num_steps, run.config.data.batch_size)


def _steps_of_work(num_steps, batch_size):
    """Steps in units of those of a batch of 120: a smaller one is cheaper, but not for free."""
    return num_steps * (batch_size + 30) / 150
