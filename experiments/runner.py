"""Running many training runs: in parallel where that pays, restartable, with progress.

The runs of a preset lie in one folder, ``OUT/runs``, by names that tell their settings, so that
experiments share them. A finished run is not done again; an interrupted one goes on from its
checkpoint.
"""

import contextlib
import json
import math
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed, wait
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import ConfigDict
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from ant_jax import config as config_lib
from ant_jax import evaluate, experiment, train
from ant_jax.files import write_bytes
from ant_jax.metrics import duration
from experiments import report
from experiments.presets import Preset, make_config

PRESET = flags.DEFINE_string("preset", "digits", "At which size the experiment runs.")
OUT = flags.DEFINE_string("out", None, "Where everything goes; default runs/experiments/PRESET.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the plan and do nothing.")

# Below so many steps a process costs more to start than it saves.
_WORTH_A_PROCESS = 1000


class Run(NamedTuple):
    """One training run and the steps at which its EMA model is measured."""

    name: str
    config: ConfigDict
    steps: tuple[int, ...]


def choose(presets: dict[str, Preset]) -> tuple[Preset, Path]:
    """The preset of the command line and the folder for its output.

    Raises:
      app.UsageError: for an unknown preset or an ``--out`` that is no folder.
    """
    name = PRESET.value
    if name not in presets:
        raise app.UsageError(f"--preset={name}: must be one of {', '.join(presets)}")
    out = Path(OUT.value or f"runs/experiments/{name}")
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
      measurements: at how many evenly spaced steps to measure, the last of them the end; None is
        the preset's number.
    """
    plain = config_lib.flatten(make_config(preset, method, clusters, seed))
    # What changes nothing does not count, so that equal runs have equal names.
    settings = {key: value for key, value in (settings or {}).items() if value != plain[key]}
    config = make_config(preset, method, clusters, seed, settings)
    if measurements is None:
        measurements = preset.measurements
    every = math.ceil(config.num_steps / max(measurements, 1))
    config.checkpoint.every = config.checkpoint.keep_period = every
    steps = sorted({*range(every, config.num_steps, every), config.num_steps})[:measurements]
    words = [
        f"{key.split('.')[-1]}={Path(value).stem if key.endswith('affinity') else value}"
        for key, value in settings.items()
    ]
    return Run("-".join([method, clusters, *words, f"seed={seed}"]), config, tuple(steps))


def print_plan(stages: dict[str, Sequence[Run]], out: Path, preset: Preset) -> None:
    """Says how many runs and steps are to be done, how many are done, and how long it may take.

    The estimate is that of the finished runs in the folder, or else the preset's.
    """
    total = 0.0
    known = True
    for name, runs in stages.items():
        waiting = [run for run in runs if _result(run, out) is None]
        steps = sum(run.config.num_steps for run in waiting)
        line = f"{name}: {len(runs)} runs, {len(waiting)} of them to do, {steps} steps"
        pace = _pace(out) or preset.seconds_per_step
        if pace is None:
            known = False
        else:
            seconds = pace * sum(_work(run) for run in waiting)
            total += seconds
            line += f", about {duration(seconds)}"
        print(line)
    print(
        f"in {out}: about {duration(total)} in all" if known else f"in {out}: nobody timed it yet"
    )


def _work(run):
    """Steps of a run in units of the preset's; a smaller batch is cheaper, but not for free."""
    reference = 120 if run.config.data.name == "digits" else run.config.data.batch_size
    return run.config.num_steps * min(1, (run.config.data.batch_size + 30) / (reference + 30))


def _pace(out):
    """Seconds of all workers together for a step, by the finished runs; None if there are none."""
    results = [json.loads(path.read_text()) for path in (out / "runs").glob("*/result.json")]
    steps = sum(result["num_steps"] for result in results if result["batch_size"] >= 120)
    seconds = sum(result["seconds"] for result in results if result["batch_size"] >= 120)
    return seconds / _workers() / steps if steps else None


def _workers():
    """Runs side by side: one a core on CPUs, where threads do not help a small step."""
    return len(os.sched_getaffinity(0)) if jax.default_backend() == "cpu" else 1


def execute(runs: Sequence[Run], out: Path, title: str = "runs") -> list[dict[str, Any]]:
    """Does what is not done yet and returns the results in the order of the runs.

    A result has ``name``, ``num_steps``, ``seconds``, ``ms_per_step`` (median), ``rows`` (one a
    measurement, see `evaluate.evaluate`) and ``diverged``, the message where a loss was not finite,
    or "".

    Raises:
      RuntimeError: naming the run, if one fails for another reason than divergence.
      ConfigError: if a finished run of the same name has another config.
    """
    for run in runs:
        config_lib.validate(run.config)
    waiting = [run for run in runs if _result(run, out) is None]
    if waiting:
        verbosity = logging.get_verbosity()
        # The runs' own lines would tear the bar.
        logging.set_verbosity(logging.WARNING)
        experiment.open_data(waiting[0].config)
        total = sum(run.config.num_steps for run in waiting)
        done = sum(_progress(run, out) for run in waiting)
        with (
            _executor(total) as executor,
            tqdm(desc=title, total=total, unit="step", smoothing=0.05, initial=done) as bar,
        ):
            groups = _groups(waiting, _workers())
            unfinished = {executor.submit(_run_all, group, out) for group in groups}
            while unfinished:
                finished, unfinished = wait(unfinished, timeout=2)
                bar.update(sum(_progress(run, out) for run in waiting) - bar.n)
                for future in finished:
                    future.result()
        logging.set_verbosity(verbosity)
    return [_result(run, out) for run in runs]


def parallel(function: Callable, arguments: Sequence[tuple], title: str) -> list[Any]:
    """``[function(*a) for a in arguments]``, each beginning with a run, as runs are executed."""
    with _executor(sum(run.config.num_steps for run, *_ in arguments)) as executor:
        futures = [executor.submit(function, *each) for each in arguments]
        for future in tqdm(as_completed(futures), title, len(futures)):
            future.result()
    return [future.result() for future in futures]


def folder(run: Run, out: Path) -> Path:
    """The workdir of a run."""
    return out / "runs" / run.name


def _result(run, out):
    """The result of a finished run, or None."""
    path = folder(run, out) / "result.json"
    if not path.exists():
        return None
    config_lib.check_same(config_lib.load(path.parent), run.config, path.parent)
    result = json.loads(path.read_text())
    complete = result["diverged"] or [row["step"] for row in result["rows"]] == list(run.steps)
    return result if complete and result["num_steps"] == run.config.num_steps else None


def _progress(run, out):
    """Steps that a run has logged; all of them once it has a result, however it ended."""
    path = folder(run, out) / "metrics.jsonl"
    if (path.parent / "result.json").exists():
        return run.config.num_steps
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines[-2:] if line.endswith(b"\n")]
    return json.loads(whole[-1])["step"] if whole else 0


def _groups(runs, workers):
    """Runs that share a compiled step, the longest group first so that no core waits at the end.

    A group is split, and compiled twice, where there would be work for some of the workers only.
    """
    groups = {}
    for run in runs:
        config = config_lib.flatten(run.config)
        key = tuple((name, value) for name, value in config.items() if name not in _SHARE_A_STEP)
        groups.setdefault(key, []).append(run)
    steps = lambda group: sum(run.config.num_steps for run in group)
    groups = sorted(groups.values(), key=steps, reverse=True)
    while len(groups) < min(workers, len(runs)):
        largest = groups.pop(0)
        groups += [largest[::2], largest[1::2]]
        groups.sort(key=steps, reverse=True)
    return groups


_SHARE_A_STEP = ("seed", "optimizer.learning_rate", "num_steps")


@contextlib.contextmanager
def _executor(steps: int) -> Iterator[Executor]:
    count = _workers()
    if count == 1 or steps < _WORTH_A_PROCESS:
        executor = ThreadPoolExecutor(1)
        processes = lambda: ()
    else:
        context = multiprocessing.get_context("spawn")
        cores = context.SimpleQueue()
        for core in sorted(os.sched_getaffinity(0)):
            cores.put(core)
        executor = ProcessPoolExecutor(count, context, _start_worker, (cores, os.getpid()))
        processes = lambda: executor._processes.values()
    try:
        yield executor
    except BaseException:
        workers = list(processes())
        executor.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.terminate()
        raise
    executor.shutdown()


def _start_worker(cores, parent):
    """One core each, set before JAX counts them; nobody works on for a parent that is gone."""
    os.sched_setaffinity(0, {cores.get()})
    # NumPy counted the cores when it was imported; its threads would wait for each other on one.
    threadpool_limits(1)
    logging.set_verbosity(logging.WARNING)

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _run_all(runs: Sequence[Run], out: Path) -> None:
    for run in runs:
        try:
            _run(run, out)
        except Exception as error:
            raise RuntimeError(f"run {run.name} in {folder(run, out)}: {error!r}") from error


def _run(run, out):
    workdir = folder(run, out)
    begin = time.perf_counter()
    diverged = ""
    rows = []
    try:
        train.train(run.config, workdir)
        rows = [evaluate.evaluate(run.config, workdir, step) for step in run.steps]
    except FloatingPointError as error:
        diverged = str(error)
    result = {
        "name": run.name,
        "num_steps": run.config.num_steps,
        "batch_size": run.config.data.batch_size,
        "seconds": time.perf_counter() - begin,
        "ms_per_step": float(np.median(1000 / report.curves(workdir)["steps_per_second"])),
        "diverged": diverged,
        "rows": rows,
    }
    write_bytes(workdir / "result.json", (json.dumps(result, indent=1) + "\n").encode())
