"""Kills, starves and damages runs from the command line; `make torture` runs all of it.

A run that went through it ends as one that was left alone, bit for bit: parameters, EMA, optimizer,
method, metrics (and with them the order of the data) and pictures.
"""

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import forked
import numpy as np
import pytest
from forked import two
from PIL import Image
from tiny_runs import assert_same_state, lines

from ant_jax import experiment, results
from ant_jax import workdir as workdir_lib
from ant_jax.runtime.checkpoint import checkpoint_steps
from experiments import presets

ROOT = Path(__file__).parents[1]
EVERY = 20  # steps between checkpoints
PICTURES = 300  # steps between pictures
SMALL = presets.PRESETS["smoke"].settings | {"log_to": (), "sample.every": 0}


class Case(NamedTuple):
    """A run, and when it is killed: while drawing or saving, soon after, or at any instant."""

    argument: str
    num_steps: int
    settings: dict
    devices: int
    kills: tuple[str, ...]


CASES = {
    "short": Case("nash", 120, SMALL, 1, ("saving",)),
    "nash": Case(
        "nash",
        1500,
        {"sample.every": PICTURES, "sampler.num_steps": 100, "method.update_every": 7},
        1,
        ("drawing", "drawing") + ("saving", "any instant", "stepping") * 6,
    ),
    "uncertainty": Case(
        "uncertainty",
        800,
        SMALL | {"data.num_workers": 1},
        4,
        ("saving", "any instant", "stepping") * 4,
    ),
}
SOME = Case("uncertainty", 60, SMALL, 1, ())


def arguments(workdir, case, **changes):
    settings = {
        **case.settings,
        "num_steps": case.num_steps,
        "checkpoint.every": EVERY,
        # Does not divide the number of steps between checkpoints.
        "log_every": 7,
        **changes,
    }
    flags = [f"--config.{name}={value}" for name, value in settings.items()]
    return [f"--config=configs/digits.py:{case.argument}", f"--workdir={workdir}", *flags]


def start(workdir, case, log, **changes):
    flag = f" --xla_force_host_platform_device_count={case.devices}"
    with log.open("w") as stream:
        return subprocess.Popen(
            [sys.executable, "-m", "ant_jax.main", *arguments(workdir, case, **changes)],
            cwd=ROOT,
            # The last of equal flags counts.
            env=os.environ | {"XLA_FLAGS": os.environ["XLA_FLAGS"] + flag},
            stderr=stream,
            # Like a terminal.
            process_group=0,
        )


def finish(workdir, case, log, **changes):
    command = ["-m", "ant_jax.main", *arguments(workdir, case, **changes)]
    ((code, text),) = forked.run([command], case.devices, seconds=400)
    log.write_text(text)
    return code, text


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """For each case an uninterrupted run, and the seconds until its first steps, if asked for."""
    runs = {}

    def run(case):
        key = repr(case)
        if key not in runs:
            folder = tmp_path_factory.mktemp("reference")
            if "any instant" in case.kills:
                process = start(folder / "run", case, folder / "log")
                begin = time.perf_counter()
                wait_for(process, "logged", folder / "run")
                seconds = time.perf_counter() - begin
                code = process.wait(timeout=400)
            else:
                seconds = None
                code, _ = finish(folder / "run", case, folder / "log")
            assert code == 0, (folder / "log").read_text()
            runs[key] = folder / "run", seconds
        return runs[key]

    return run


def partial_checkpoints(workdir):
    return list((workdir / "checkpoints").glob("partial-*"))


def logged(workdir):
    with contextlib.suppress(FileNotFoundError):
        return (workdir / "metrics.jsonl").read_bytes().count(b"\n")
    return 0


def drawing(workdir):
    """The step of the newest checkpoint if its picture is due and still missing, else 0."""
    step = max(checkpoint_steps(workdir / "checkpoints"), default=0)
    there = (workdir / "samples" / f"{step:08d}.png").exists()
    return 0 if step % PICTURES or there else step


EVENTS = {
    "logged": logged,
    "drawing": drawing,
    "saving": lambda workdir: len(partial_checkpoints(workdir)),
    "saved": lambda workdir: max(checkpoint_steps(workdir / "checkpoints"), default=0),
}


def wait_for(process, event, workdir):
    """Waits until a trainer makes progress."""
    before = EVENTS[event](workdir)
    while process.poll() is None:
        now = EVENTS[event](workdir)
        if now > before:
            return
        # The start removes lines and partial checkpoints of the killed process.
        before = min(before, now)
        # A partial checkpoint is there for milliseconds.
        time.sleep(0.0005 if event == "saving" else 0.005)


def assert_same_run(workdir, expected, case):
    config = workdir_lib.load_config(workdir)
    setup = experiment.build(config, **workdir_lib.load_facts(workdir))
    (step, state), (_, other) = (
        workdir_lib.restore(config, setup, folder) for folder in (workdir, expected)
    )
    assert step == case.num_steps
    assert_same_state(state, other)
    assert lines(workdir) == lines(expected)
    assert sorted(os.listdir(workdir / "checkpoints")) == [
        str(case.num_steps - EVERY),
        str(case.num_steps),
    ]
    for picture in (expected / "samples").glob("*.png"):
        assert (workdir / "samples" / picture.name).read_bytes() == picture.read_bytes()


def workers_of(process):
    # Linux lists a child under the thread that started it.
    files = Path(f"/proc/{process.pid}/task").glob("*/children")
    return [int(number) for file in files for number in file.read_text().split()]


def is_alive(pid):
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        # The state comes after the name, which is in brackets.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def assert_gone(pids, seconds):
    deadline = time.perf_counter() + seconds
    while left := [pid for pid in pids if is_alive(pid)]:
        assert time.perf_counter() < deadline, f"workers {left} outlive their trainer"
        time.sleep(0.1)


def thorough(*values):
    return pytest.param(*values, marks=pytest.mark.torture)


@pytest.mark.parametrize("name", ["short", thorough("nash"), thorough("uncertainty")])
def test_a_run_killed_at_random_instants_ends_as_if_it_had_not_been(name, reference, tmp_path):
    case = CASES[name]
    expected, seconds = reference(case)
    workdir, log = tmp_path / "run", tmp_path / "log"
    rng = np.random.default_rng(len(name))
    left_behind, saved, lost = [], [], []
    for instant in case.kills:
        process = start(workdir, case, log)
        if instant == "any instant":
            time.sleep(rng.uniform(0, 1.2 * seconds))
        elif instant == "drawing":
            wait_for(process, "drawing", workdir)
        else:
            wait_for(process, "saved", workdir)
            if instant == "saving":
                wait_for(process, "saving", workdir)
            time.sleep(rng.uniform(0, 0.05 if instant == "saving" else 0.3))
        assert process.poll() is None, log.read_text()
        workers = workers_of(process)
        process.kill()
        process.wait()
        assert_gone(workers, 20)
        if instant == "drawing":
            lost.append(drawing(workdir))

        # It resumed from the newest checkpoint that the killed process had finished.
        resumed = re.search(r"resuming from step (\d+)", log.read_text())
        assert resumed is None or int(resumed[1]) == saved[-1]
        saved = checkpoint_steps(workdir / "checkpoints")
        left_behind += [path.name for path in partial_checkpoints(workdir)]
        print(f"{instant}: {logged(workdir)} lines, checkpoints {saved}, partial {left_behind}")
    assert len(left_behind) >= case.kills.count("saving") / 2
    assert len(set(lost)) == case.kills.count("drawing") and all(lost)

    code, text = finish(workdir, case, log)
    assert code == 0, text
    assert f"resuming from step {saved[-1]}" in text
    assert_same_run(workdir, expected, case)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.torture
@pytest.mark.parametrize("damage", [truncate, flip])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(damage, reference, tmp_path):
    expected, _ = reference(SOME)
    workdir, log = tmp_path / "run", tmp_path / "log"
    assert finish(workdir, SOME, log, num_steps=2 * EVERY)[0] == 0
    newest = workdir / "checkpoints" / str(2 * EVERY)
    damage(max(newest.rglob("*"), key=lambda path: path.is_file() and path.stat().st_size))
    code, text = finish(workdir, SOME, log)
    assert code == 0, text
    assert f"checkpoint {newest} is corrupt: " in text and f"resuming from step {EVERY} " in text
    # What was set aside tells that something happened.
    aside = workdir / "checkpoints" / f"corrupt-{2 * EVERY}"
    aside.rename(tmp_path / "aside")
    assert_same_run(workdir, expected, SOME)


@pytest.mark.torture
def test_a_disk_that_is_full_while_saving_leaves_the_older_checkpoint(reference, tmp_path):
    expected, _ = reference(SOME)
    workdir, log = tmp_path / "run", tmp_path / "log"
    # A run reports its last step. Here the longer run reports this step too.
    last = EVERY + 1
    assert finish(workdir, SOME, log, num_steps=last)[0] == 0
    # A limit on the size of files imitates a full disk without special rights.
    process = start(workdir, SOME, log)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (30_000, 30_000))
    code = process.wait(timeout=200)
    text = log.read_text()
    assert code == 1
    line = text.splitlines()[-1]
    assert line.startswith(f"error: saving a checkpoint in {workdir}/checkpoints failed:")
    assert line.endswith(f"newest complete checkpoint: step {last}") and "Traceback" not in text
    assert checkpoint_steps(workdir / "checkpoints") == [EVERY, last]
    assert finish(workdir, SOME, log)[0] == 0
    assert f"resuming from step {last} " in log.read_text()
    assert_same_run(workdir, expected, SOME)


@pytest.mark.torture
def test_a_run_asked_to_stop_saves_within_seconds_and_can_be_moved(reference, tmp_path):
    case = CASES["short"]
    expected, _ = reference(case)
    process = start(tmp_path / "run", case, tmp_path / "log")
    wait_for(process, "saved", tmp_path / "run")
    begin = time.perf_counter()
    process.terminate()
    assert process.wait(timeout=100) == 0, (tmp_path / "log").read_text()
    seconds = time.perf_counter() - begin
    print(f"stopped in {seconds:.1f} s")
    assert seconds < 10
    last = checkpoint_steps(tmp_path / "run/checkpoints")[-1]
    assert last < case.num_steps and lines(tmp_path / "run")[-1]["step"] <= last
    (tmp_path / "elsewhere").mkdir()
    workdir = (tmp_path / "run").rename(tmp_path / "elsewhere" / "moved")
    code, text = finish(workdir, case, tmp_path / "log")
    assert code == 0 and f"resuming from step {last} " in text, text
    assert_same_run(workdir, expected, case)


@pytest.mark.torture
def test_a_workdir_has_one_trainer_even_if_another_is_started(reference, tmp_path):
    case = CASES["short"]
    expected, _ = reference(case)
    workdir = tmp_path / "run"
    process = start(workdir, case, tmp_path / "log")
    wait_for(process, "saving", workdir)
    process.send_signal(signal.SIGSTOP)
    code, text = finish(workdir, case, tmp_path / "other")
    process.send_signal(signal.SIGCONT)
    assert code == 1 and "Traceback" not in text
    assert f"error: process {process.pid} on " in text and f"in {workdir}:" in text
    assert process.wait(timeout=200) == 0
    assert_same_run(workdir, expected, case)


@pytest.mark.torture
def test_a_run_of_an_older_config_is_told_which_settings_differ(reference, tmp_path):
    expected, _ = reference(SOME)
    path = tmp_path / "config.json"
    config = json.loads((expected / "config.json").read_text())
    del config["optimizer"]["microbatches"]
    config["ema_decay"] = 0.5
    path.write_text(json.dumps(config))
    code, text = finish(tmp_path, SOME, tmp_path / "log")
    assert code == 1 and "Traceback" not in text
    assert "config.optimizer.microbatches: 'not set' there, 1 now" in text
    assert "config.ema_decay: 0.5 there, 0.999 now" in text
    assert "config.optimizer.learning_rate" not in text


WITH_WORKERS = SOME._replace(settings=SMALL | {"data.num_workers": 2}, num_steps=4000)


def reading(process):
    """The processes that prepare batches."""
    found = []
    for pid in workers_of(process):
        with contextlib.suppress(FileNotFoundError):
            if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


@pytest.mark.torture
@pytest.mark.parametrize("instant", ["starting", "saving"])
def test_a_data_worker_that_dies_is_reported(instant, tmp_path):
    workdir, log = tmp_path / "run", tmp_path / "log"
    process = start(workdir, WITH_WORKERS, log)
    if instant == "starting":
        while not reading(process):
            assert process.poll() is None, log.read_text()
            time.sleep(0.001)
    else:
        wait_for(process, "saving", workdir)
        assert len(reading(process)) == 2
    workers = workers_of(process)
    begin = time.perf_counter()
    os.kill(reading(process)[0], signal.SIGKILL)
    assert process.wait(timeout=100) == 1
    seconds = time.perf_counter() - begin
    text = log.read_text()
    print(f"reported in {seconds:.1f} s")
    assert seconds < 30 and "Traceback" not in text
    assert re.search("^error: a process that prepares batches has failed.* -9", text, re.M)
    assert_gone(workers, 20)
    assert instant == "starting" or checkpoint_steps(workdir / "checkpoints")


@pytest.mark.torture
def test_a_run_whose_data_worker_is_stopped_saves_and_ends_when_asked(tmp_path):
    workdir, log = tmp_path / "run", tmp_path / "log"
    process = start(workdir, WITH_WORKERS, log)
    wait_for(process, "saving", workdir)
    workers = workers_of(process)
    os.kill(reading(process)[0], signal.SIGSTOP)
    before = -1
    while (now := logged(workdir)) > before:
        before = now
        time.sleep(2)
    begin = time.perf_counter()
    process.terminate()
    assert process.wait(timeout=100) == 0, log.read_text()
    seconds = time.perf_counter() - begin
    print(f"stopped in {seconds:.1f} s")
    (step,) = re.findall(
        r"asked to stop while waiting for data: saving step (\d+)", log.read_text()
    )
    assert seconds < 10 and checkpoint_steps(workdir / "checkpoints")[-1] == int(step)
    assert_gone(workers, 5)


@pytest.mark.torture
def test_processes_killed_together_leave_nothing_in_shared_memory(tmp_path):
    process = start(tmp_path / "run", WITH_WORKERS, tmp_path / "log")
    wait_for(process, "saving", tmp_path / "run")
    everybody = [process.pid, *workers_of(process)]
    assert len(everybody) >= 3
    for pid in everybody:
        os.kill(pid, signal.SIGSTOP)
    # Other programs create files there too.
    maps = "".join(Path(f"/proc/{pid}/maps").read_text() for pid in everybody)
    for pid in everybody:
        os.kill(pid, signal.SIGKILL)
    process.wait()
    assert_gone(everybody, 20)
    shared = re.findall(r"(/dev/shm/\S+)$", maps, re.M)
    shared = [name for name in shared if not name.startswith(tempfile.gettempdir())]
    assert not [name for name in shared if os.path.exists(name)]


def start_mode(mode, workdir, log, **settings):
    flags = [f"--config.{name.replace('__', '.')}={value}" for name, value in settings.items()]
    with log.open("w") as stream:
        return subprocess.Popen(
            [
                sys.executable,
                "-m",
                "ant_jax.main",
                f"--workdir={workdir}",
                f"--mode={mode}",
                *flags,
            ],
            cwd=ROOT,
            stderr=stream,
        )


def samples_of(path):
    with np.load(path) as stored:
        return stored["arr_0"]


@pytest.mark.torture
def test_drawings_at_once_never_mix_and_one_that_is_killed_goes_on(reference, tmp_path):
    expected, _ = reference(SOME)
    workdir = shutil.copytree(expected, tmp_path / "run")
    settings = {"sample__num": 800, "sample__batch_size": 40, "sampler__num_steps": 40}
    setup = lambda: len(list((workdir / "drawn").glob("*/*.npz")))

    def drawing(log):
        process = start_mode("sample", workdir, log, **settings)
        before = setup()
        while setup() == before and process.poll() is None:
            time.sleep(0.01)
        assert process.poll() is None, log.read_text()
        return process

    killed = drawing(tmp_path / "killed")
    killed.kill()
    killed.wait()
    first = drawing(tmp_path / "first")
    # Meanwhile nobody else can draw the same samples, but anybody can draw others.
    first.send_signal(signal.SIGSTOP)
    other = start_mode("sample", workdir, tmp_path / "other", **settings, sample__seed=1)
    for mode in ("sample", "evaluate"):
        second = start_mode(mode, workdir, tmp_path / "second", **settings)
        assert second.wait(timeout=100) == 1
        text = (tmp_path / "second").read_text()
        told = f"error: process {first.pid} on .* is drawing the same samples, of step 60 in "
        assert re.search(f"^{told}", text, re.M) and "Traceback" not in text
    assert other.wait(timeout=200) == 0, (tmp_path / "other").read_text()
    first.send_signal(signal.SIGCONT)
    assert first.wait(timeout=200) == 0
    assert re.search(r"\d+ of 800 samples were drawn before", (tmp_path / "first").read_text())
    found = sorted((workdir / "samples").glob("*.npz"))
    seeds = {}
    for path in found:
        said = json.loads(path.with_suffix(".json").read_text())["made_from"]
        seeds[said["settings"]["sample.seed"]] = samples_of(path)
    assert seeds.keys() == {0, 1} and (seeds[0] != seeds[1]).any()
    assert not list((workdir / "drawn").iterdir())
    # Killed or not, the samples are the same.
    whole = shutil.copytree(expected, tmp_path / "whole")
    assert start_mode("sample", whole, tmp_path / "log", **settings).wait(timeout=200) == 0
    (path,) = (whole / "samples").glob("*.npz")
    np.testing.assert_array_equal(samples_of(path), seeds[0])


@pytest.mark.torture
def test_a_run_is_sampled_evaluated_and_exported_while_it_goes_on(tmp_path):
    case = SOME._replace(num_steps=10**6)
    workdir = tmp_path / "run"
    trainer = start(workdir, case, tmp_path / "log", **{"checkpoint.every": 2})
    wait_for(trainer, "saved", workdir)
    config = workdir_lib.load_config(workdir)
    seen = []
    for mode in ("sample", "evaluate", "export"):
        log = tmp_path / mode
        process = start_mode(mode, workdir, log, sample__num=20, evaluation__features="")
        while process.poll() is None:
            time.sleep(0.2)
            # Over and over, what each of them does.
            step, _, _ = results.restore_run(config, workdir)
            seen.append(step)
        assert process.returncode == 0, log.read_text()
    assert trainer.poll() is None, (tmp_path / "log").read_text()
    trainer.terminate()
    assert trainer.wait(timeout=100) == 0
    print(f"{len(seen)} checkpoints, from step {seen[0]} to {seen[-1]}, of {len(set(seen))} steps")
    assert seen == sorted(seen) and len(set(seen)) > 5
    for files in ("samples/*.npz", "evaluation/*.json", "weights/*/*.safetensors"):
        assert len(list(workdir.glob(files))) == 1


def stopped_by_ctrl_c(workdir, case, log, wait, **changes):
    """Starts a trainer in its own process group, like a terminal, and signals the group."""
    process = start(workdir, case, log, **changes)
    wait(process)
    os.killpg(process.pid, signal.SIGINT)
    begin = time.perf_counter()
    code = process.wait(timeout=100)
    return code, log.read_text(), time.perf_counter() - begin


def seconds(number):
    return lambda workdir: lambda process: time.sleep(number)


def words(text):
    def wait(workdir, process):
        log = workdir.with_name("log")
        while process.poll() is None and text not in log.read_text():
            time.sleep(0.002)

    return lambda workdir: lambda process: wait(workdir, process)


def further(event):
    return lambda workdir: lambda process: wait_for(process, event, workdir)


INSTANTS = {
    "starting": seconds(0.1),
    "importing": seconds(1),
    "compiling": words("compiling the step"),
    "stepping": further("logged"),
    "saving": further("saving"),
    "saved": further("saved"),
}


@pytest.mark.torture
def test_ctrl_c_at_any_instant_is_one_line_and_loses_nothing(reference, tmp_path):
    case = Case("nash", 400, SMALL | {"data.num_workers": 1}, 1, ())
    expected, _ = reference(case)
    workdir, log = tmp_path / "run", tmp_path / "log"
    for name, instant in INSTANTS.items():
        code, text, taken = stopped_by_ctrl_c(workdir, case, log, instant(workdir))
        print(f"{name}: status {code} after {taken:.1f} s, checkpoints {saved_in(workdir)}")
        assert "Traceback" not in text and "Error" not in text, text
        assert code == 130 or (code, text) == (-signal.SIGINT, ""), text
        if name in ("stepping", "saving", "saved"):
            step = re.search(r"asked to stop: saving step (\d+)", text)
            assert saved_in(workdir)[-1] == int(step[1])
    code, text = finish(workdir, case, log)
    assert code == 0, text
    # Each stop saved an additional step, so the two newest checkpoints differ.
    assert lines(workdir) == lines(expected)
    config = workdir_lib.load_config(workdir)
    setup = experiment.build(config, **workdir_lib.load_facts(workdir))
    (_, state), (_, other) = (
        workdir_lib.restore(config, setup, folder) for folder in (workdir, expected)
    )
    assert_same_state(state, other)


def saved_in(workdir):
    return checkpoint_steps(workdir / "checkpoints")


@pytest.mark.torture
@pytest.mark.parametrize(
    ("changes", "named"),
    {
        (
            "--config.data.batch_size=80",
        ): f"config.data.batch_size: {SMALL['data.batch_size']} in process 0, 80 in process 1",
        ("--config.sample.every=3",): "config.sample.every: 0 in process 0, 3 in process 1",
        ("--mode=sample",): "--mode: 'train' in process 0, 'sample' in process 1",
        ("--workdir=elsewhere",): "--workdir: ",
        ("--config.data.dir={other}",): "num_images: 8 in process 0, 9 in process 1",
    }.items(),
    ids=lambda value: str(value)[:30],
)
def test_mismatched_processes_end_and_name_what_differs(changes, named, tmp_path):
    for name, count in (("one", 4), ("other", 5)):
        for label, number in (("a", 4), ("b", count)):
            (tmp_path / name / label).mkdir(parents=True)
            for i in range(number):
                image = np.full((8, 8, 3), 20 * i, np.uint8)
                Image.fromarray(image).save(tmp_path / name / label / f"{i}.png")
    settings = SMALL | {"data.name": "folder", "data.dir": tmp_path / "one", "data.split": ""}
    settings |= {"evaluation.features": "", "data.crop": "center"}
    run = ["-m", "ant_jax.main", *arguments(tmp_path / "run", SOME, **settings)]
    changes = [change.format(other=tmp_path / "other") for change in changes]
    for code, text in two(run, [*run, *changes]):
        assert code == 1 and named in text and "Traceback" not in text, text
    assert not saved_in(tmp_path / "run")


LATE = {
    "compiling": """
compile = jax.stages.Lowered.compile
jax.stages.Lowered.compile = lambda self, *a: (time.sleep(45), compile(self, *a))[1]
""",
    "reading": """
from ant_jax import data
from ant_jax import workdir as workdir_lib
batches = data.batches
def late(*a, **k):
    for i, batch in enumerate(batches(*a, **k)):
        time.sleep(45 * (i == 3))
        yield batch
data.batches = late
""",
    "saving": """
from ant_jax.runtime import checkpoint_arrays
open_orbax = checkpoint_arrays.open_orbax
checkpoint_arrays.open_orbax = lambda: (time.sleep(45), open_orbax())[1]
""",
}


@pytest.mark.torture
@pytest.mark.parametrize("what", LATE)
def test_a_process_that_is_late_does_not_end_the_other(what, tmp_path):
    """Gloo's collectives, which CPUs use, time out after half a minute."""
    # Nash-MTL has a reduce-scatter, the strictest about this timeout.
    case = Case("nash", 8, SMALL, 8, ())
    main = "runpy.run_module('ant_jax.main', run_name='__main__', alter_sys=True)"
    late = tmp_path / "late.py"
    late.write_text(f"import runpy, sys, time, jax\n{LATE[what]}\n{main}")
    run = arguments(tmp_path / "run", case, **{"checkpoint.every": 8, "log_every": 2})
    (first, text), (second, other) = two(["-m", "ant_jax.main", *run], [late, *run])
    assert first == second == 0, text + other
    assert saved_in(tmp_path / "run") == [8]
