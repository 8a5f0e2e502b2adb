"""Runs many training runs: in parallel where this saves time, restartable, with progress.

All runs of a preset are in one folder, ``OUT/runs``. Their names contain their settings, so
experiments share runs. A finished run is not repeated; an interrupted one resumes from its
checkpoint.
"""

import contextlib
import itertools
import json
import math
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from ant_jax import cli, dataset, evaluate, experiment, measuring, train
from ant_jax import config as config_lib
from ant_jax import workdir as workdir_lib
from ant_jax.config import ConfigError
from ant_jax.runtime import compilation_cache, garbage, logs, progress, signals
from ant_jax.runtime.files import user_path, write_bytes
from ant_jax.runtime.logs import quiet_console
from ant_jax.settings import Affects
from experiments.presets import PRESETS, Preset, make_config

PRESET = flags.DEFINE_string("preset", "digits", "Size of the experiment.")
OUT = flags.DEFINE_string(
    "out", None, "Folder for all output; by default a folder in runs/experiments."
)
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the plan and stop.")
WORKERS = flags.DEFINE_integer(
    "workers",
    None,
    "Number of runs at a time; by default one for each core on CPUs and 1 on an accelerator. More "
    "runs can share one GPU.",
    lower_bound=1,
)

# For fewer steps than this, starting a process takes longer than it saves.
_WORTH_A_PROCESS = 1000


class Run(NamedTuple):
    """One training run and the steps at which its EMA model is measured."""

    name: str
    config: ConfigDict
    steps: tuple[int, ...]


class Diverged(RuntimeError):
    """Runs that an experiment needs have diverged."""


class Stopped(RuntimeError):
    """A run stopped on request before its end; it has saved its state."""


def start(main: Callable[[list[str]], None], presets: Collection[str] = tuple(PRESETS)) -> None:
    """Runs a command; if it is asked to stop, it prints one line and exits.

    Args:
      main: the command.
      presets: the names of its presets; without any, ``--out`` is its only flag.
    """
    flags.FLAGS[PRESET.name].help = f"Size of the experiment: {', '.join(presets)}."
    # Without this, --help would not list the flags, because they are defined here.
    for flag in (PRESET, OUT, DRY_RUN, WORKERS) if presets else (OUT,):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flags.FLAGS[flag.name])

    def run(argv):
        quiet_console()
        garbage.collect_less()
        if (_chosen_workers() or 1) > 1:
            # JAX reserves three quarters of a GPU's memory for each process, this one included,
            # unless it is told not to before it finds the devices.
            os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        with signals.ending_the_program("start again to resume") as stop:
            try:
                with cli.errors_in_one_line():
                    main(argv)
            except (Diverged, app.UsageError) as error:
                # Without all flags, which --help lists.
                cli.refuse(error)
            except Stopped as error:
                print(error, file=sys.stderr)
                assert stop.signum is not None  # a signal asked
                sys.exit(signals.status(stop.signum))

    app.run(run, flags_parser=cli.parse_flags)


def choose(argv: Sequence[str], presets: dict[str, Preset]) -> tuple[Preset, Path]:
    """The preset and the output folder of the command line.

    Raises:
      app.UsageError: for an unknown argument or preset, or if ``--out`` is not a folder.
    """
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    name = PRESET.value
    if name not in presets:
        raise app.UsageError(f"--preset={name}: must be one of {', '.join(presets)}")
    return presets[name], folder_of(presets[name].name)


def out_folder(argv: Sequence[str], name: str) -> Path:
    """The output folder of a command that has no presets and no dry run.

    Args:
      argv: the command line.
      name: of the folder in ``runs/experiments``, if there is no ``--out``.

    Raises:
      app.UsageError: for any argument but ``--out``, or if that is not a folder.
    """
    if len(argv) > 1:
        raise app.UsageError(f"unknown argument {argv[1]!r}")
    for flag in (PRESET, DRY_RUN, WORKERS):
        if flag.present:
            raise app.UsageError(f"this command has no --{flag.name}")
    return folder_of(name)


def folder_of(name: str) -> Path:
    """The output folder: ``--out``, or one with this name."""
    try:
        out = user_path(OUT.value or f"runs/experiments/{name}")
    except OSError as error:
        raise app.UsageError(f"--out={error}") from None
    if out.exists() and not out.is_dir():
        raise app.UsageError(f"--out={out} is not a folder")
    return out


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
      method: the method in the config.
      clusters: the clusters in the config.
      seed: the seed of the run.
      settings: changes of the preset's config, by ``"group.name"``; the run's name contains them.
      measurements: how many of the preset's evenly spaced measurements to make, counted back from
        the end of the run; None for all.
    """
    plain = config_lib.flatten(make_config(preset, method, clusters, seed))
    # What changes nothing does not count, so that equal runs have equal names.
    settings = {key: value for key, value in (settings or {}).items() if value != plain.get(key)}
    config = make_config(preset, method, clusters, seed, settings)
    every = math.ceil(config.num_steps / preset.measurements)
    # Keep the checkpoints of all measurements, for other experiments that measure the same run.
    config.checkpoint.keep_period = every
    config.checkpoint.every = math.gcd(every, config.checkpoint.every)
    steps = [*range(every, config.num_steps, every), config.num_steps]
    count = len(steps) if measurements is None else measurements
    name = "-".join([method, clusters, *config_lib.in_words(config, settings), f"seed={seed}"])
    return Run(name, config, tuple(steps[len(steps) - count :]))


def print_plan(stages: Mapping[str, Sequence[Run]], out: Path, preset: Preset) -> None:
    """Prints how many runs and steps remain and an estimate of their time.

    The estimate uses the finished runs in the folder or, without any, the preset's time per step.
    """
    timed = _pace(out)
    pace = timed or preset.seconds_per_step
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
    estimate = f"about {progress.duration(total)} in total" if pace else "no run has been timed yet"
    if pace and not timed:
        estimate += " on two CPU cores"
    print(f"in {out}: {estimate}")


def execute(runs: Sequence[Run], out: Path, title: str = "runs") -> list[dict[str, Any]]:
    """Executes the unfinished runs and returns all results in the order of the runs.

    A result has ``name``, ``num_steps``, ``batch_size``, ``config`` (flat), ``seconds``, ``rows``
    (one per measurement, see `evaluate.evaluate`) and ``diverged``: the error message if a loss was
    not finite, otherwise "".

    Raises:
      ConfigError: if a run is impossible or its folder holds another run; it names the setting.
      Stopped: if a run was asked to stop.
      RuntimeError: if a run fails for another reason than divergence; it names the run.
    """
    waiting = [run for run in runs if _result(run, out) is None]
    if waiting:
        _check(waiting)
        # What all evaluations share is made and cached before the bar, which hides its log lines,
        # and not in all workers at once.
        measured = [run.config for run in waiting if run.steps]
        if measured and measured[0].evaluation.features:
            measuring.build(measured[0])
        with _progress(waiting, out, title):
            groups = _groups(waiting, _workers())
            if _workers() == 1 or sum(run.config.num_steps for run in waiting) < _WORTH_A_PROCESS:
                # In the main thread, so that a signal can stop it.
                for group in groups:
                    _run_all(group, out)
            else:
                for _ in _in_processes(_run_all, [(group, out) for group in groups]):
                    pass
    return [_known_result(run, out) for run in runs]


def finished(runs: Sequence[Run], out: Path, title: str = "runs") -> list[dict[str, Any]]:
    """Like `execute`, but every run must reach its end.

    Raises:
      Diverged: if runs diverged; it names them.
    """
    results = execute(runs, out, title)
    diverged = [result for result in results if result["diverged"]]
    if diverged:
        raise Diverged(
            "diverged: "
            + "; ".join(f"{result['name']}: {result['diverged']}" for result in diverged)
        )
    return results


def parallel(function: Callable, arguments: Sequence[tuple], title: str) -> list[Any]:
    """``[function(*a) for a in arguments]``, parallel as in `execute`; each ``a[0]`` is a run."""
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
    anything = Affects.PARAMETERS | Affects.SAMPLES | Affects.MEASUREMENTS
    return json.loads(json.dumps(config_lib.affecting(run.config, anything)))


def kept(path: Path, source: Any, make: Callable[[], Any]) -> Any:
    """The JSON value stored in a file if its source is the same; otherwise calls ``make``."""
    source = json.loads(json.dumps(source))
    if path.exists():
        before = json.loads(path.read_text())
        if before["made from"] == source:
            return before["value"]
    value = make()
    write_bytes(path, json.dumps({"made from": source, "value": value}, indent=1).encode())
    return value


def _is_measured(config):
    """Whether a config names something to measure by, which a user's own may not."""
    return bool(config.evaluation.features or config.evaluation.split)


def _check(runs):
    """Raises errors before the first run, not hours later."""
    source = dataset.open_data(runs[0].config)
    if _is_measured(runs[0].config):
        measuring.check(runs[0].config)
    for run in runs:
        try:
            setup = experiment.build(run.config, source.image_shape[-1], source.num_classes)
            experiment.check_batch(run.config, setup)
        except ConfigError as error:
            raise ConfigError(f"run {run.name}: {error}") from error


def _result(run, out):
    """The result of a finished run, or None."""
    path = folder(run, out) / "result.json"
    if not path.exists():
        return None
    saved = workdir_lib.load_config(path.parent)
    if saved is not None:
        config_lib.check_same(saved, run.config, path.parent)
    result = json.loads(path.read_text())
    if not _of_any_version(result["config"], made_from(run)):
        return None
    rows = [row for row in result["rows"] if row["step"] in run.steps]
    if not result["diverged"] and len(rows) < len(run.steps):
        return None
    return result | {"rows": rows}


def _of_any_version(before, now):
    """Whether settings of this or an earlier version are those of now; both by "group.name"."""
    nested: dict[str, Any] = {}
    for name, value in before.items():
        group, _, leaf = name.rpartition(".")
        (nested.setdefault(group, {}) if group else nested)[leaf] = value
    today = json.loads(json.dumps(config_lib.flatten(config_lib.from_json(nested))))
    return {name: today[name] for name in now if name in today} == now


def _known_result(run, out) -> dict[str, Any]:
    result = _result(run, out)
    assert result is not None  # the run has ended
    return result


def _done(run, out):
    """The number of steps that a run has logged; all of them once it has a result."""
    if _result(run, out) is not None:
        return run.config.num_steps
    path = folder(run, out) / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    # The last line may be incomplete.
    steps = [logs.step_of(line) or 0 for line in lines[-2:]]
    return min(max(steps, default=0), run.config.num_steps)


@contextlib.contextmanager
def _progress(runs, out, title):
    """A progress bar over the steps of all runs, from their logs."""
    steps = lambda: sum(_done(run, out) for run in runs)
    total = sum(run.config.num_steps for run in runs)
    over = threading.Event()
    verbosity = logging.get_verbosity()
    # Log lines of the runs would break the bar.
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
    """Groups of runs that usually share a compiled step; the longest group first.

    A group is split, and compiled once more, if it would keep one worker busy after the others have
    finished.
    """
    groups = {}
    for run in runs:
        key = config_lib.program(run.config), run.config.clusters.k, run.config.data.batch_size
        groups.setdefault(key, []).append(run)
    steps = lambda group: sum(run.config.num_steps for run in group)
    most = sum(map(steps, groups.values())) / (workers if workers == 1 else 3 * workers)
    setup = []
    for group in groups.values():
        count = min(len(group), math.ceil(steps(group) / most))
        setup += [group[i::count] for i in range(count)]
    return sorted(setup, key=steps, reverse=True)


def _cores():
    """The cores that this process may use, or all cores where the system does not say."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _workers():
    """Number of parallel runs: one per core on CPUs, where threads don't help a small step."""
    return _chosen_workers() or (len(_cores()) if jax.default_backend() == "cpu" else 1)


def _chosen_workers():
    """The value of ``--workers``; None without it, also where no command line was parsed."""
    return flags.FLAGS[WORKERS.name].value


def _shares(cores, count):
    """Divides cores among workers; each has at least one, which others may have too."""
    first = [i * len(cores) // count for i in range(count + 1)]
    return [cores[a : max(b, a + 1)] for a, b in itertools.pairwise(first)]


def _in_processes(function: Callable, arguments: Sequence[tuple]) -> Iterator[tuple[int, Any]]:
    """Yields the index and the result of each call as it ends; each process has its own cores."""
    context = multiprocessing.get_context("spawn")
    shares = context.SimpleQueue()
    for share in _shares(_cores(), _workers()):
        shares.put(share)
    count = min(_workers(), len(arguments))
    pool = ProcessPoolExecutor(count, context, _start_worker, (shares, os.getpid()))
    try:
        with signals.terminal_signals_blocked():
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
                    raise Stopped("the runs have saved their state: start again to resume")
                for future in done:
                    yield numbers[future], future.result()
    except BaseException:
        for process in (pool._processes or {}).values():
            process.kill()
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def _start_worker(shares, parent):
    """Pins the worker to its cores before JAX counts them; it exits when its parent is gone."""
    share = shares.get()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, share)
    # NumPy counted all cores at its import; its threads would wait for each other on fewer.
    threadpool_limits(len(share))
    compilation_cache.enable()
    garbage.collect_less()
    logging.set_verbosity(logging.WARNING)

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# Whether this worker was asked to stop.
_asked = False


def _call(function, *arguments):
    """In a worker: stops on request also outside of training."""
    global _asked
    # The pool has already given this worker its next call, and can't cancel that.
    if _asked:
        raise Stopped("asked to stop")
    with signals.listening() as stop:
        try:
            return function(*arguments)
        except KeyboardInterrupt:
            raise Stopped("stopped on request: start again to resume") from None
        finally:
            _asked = stop.signum is not None


def _run_all(runs: Sequence[Run], out: Path) -> None:
    for run in runs:
        try:
            _run(run, out)
        except Stopped:
            raise
        except cli.expected_errors() as error:
            raise type(error)(f"run {run.name} in {folder(run, out)}: {error}") from error
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
            raise Stopped(f"{run.name} stopped at step {int(state.step)}: start again to resume")
        if _is_measured(run.config):
            rows = [_figures(run.config, workdir, step) for step in run.steps]
        else:
            rows = [{"step": step} for step in run.steps]
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


def _figures(config, workdir, step):
    found = evaluate.measured(config, workdir, step) if config.evaluation.every else None
    return found or evaluate.evaluate(config, workdir, step)


def _pace(out):
    """Seconds per unit of work, from the finished runs; None if there are none."""
    results = [json.loads(path.read_text()) for path in (out / "runs").glob("*/result.json")]
    work = sum(_steps_of_work(result["num_steps"], result["batch_size"]) for result in results)
    return sum(result["seconds"] for result in results) / _workers() / work if work else None


def _work(run):
    return _steps_of_work(run.config.num_steps, run.config.data.batch_size)


def _steps_of_work(num_steps, batch_size):
    """Steps in units of a step with batch size 120; smaller batches cost less, but not nothing."""
    return num_steps * (batch_size + 30) / 150
