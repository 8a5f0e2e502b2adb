"""Compares two processes of four devices each with one process of eight devices."""

import json
import re
import shutil
import socket
from pathlib import Path

import forked
import jax
import numpy as np
import pytest
from forked import free_address, pair, two
from host_program import record
from PIL import Image
from tiny_runs import STEPS, TINY, lines, tiny

import ant_jax
from ant_jax import evaluate, experiment, sample
from ant_jax import train as trainer
from ant_jax import workdir as workdir_lib
from ant_jax.runtime import checkpoint, connection

pytestmark = pytest.mark.usefixtures("small_model")
ROOT = Path(__file__).parents[1]
STOP, EVALUATED = 5, 4
SETTINGS = TINY | {"checkpoint.keep": 9, "evaluation.features": ""}
BATCH = SETTINGS["data.batch_size"]


def configured():
    return tiny("nash", checkpoint__keep=9, evaluation__features="")


def programs(folder, workdir, stops, samples, **more):
    changes = {name.replace("__", "."): value for name, value in more.items()}
    settings = [f"--config.{name}={value}" for name, value in (SETTINGS | changes).items()]
    run = ["--config=configs/digits.py:nash", f"--workdir={workdir}", *settings]
    return [
        ["tests/host_program.py", folder / f"reads{i}", str(stops[i]), str(samples), *run]
        for i in (0, 1)
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run of one process with eight devices, and the images it reads."""
    workdir = tmp_path_factory.mktemp("whole")
    reads = []
    with pytest.MonkeyPatch.context() as patch:
        record(patch, reads)
        state = trainer.train(configured(), workdir)
    return workdir, state, reads


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The run of two processes, evaluated once; the second one gets a signal to stop."""
    folder = tmp_path_factory.mktemp("stopped")
    more = {"evaluation__features": "digits", "evaluation__every": EVALUATED}
    ended = two(*programs(folder, folder / "run", stops=(0, STOP), samples=0, **more))
    reads = [json.loads((folder / f"reads{i}").read_text()) for i in (0, 1)]
    return folder / "run", ended, reads


def states(workdir, step):
    config = configured()
    setup = experiment.build(config, **workdir_lib.load_facts(workdir))
    return workdir_lib.restore(config, setup, workdir, step)[1]


def assert_close(tree, other):
    """With tolerance: sums over the devices of two processes round differently than over one."""
    assert jax.tree.structure(tree) == jax.tree.structure(other)
    for (path, leaf), expected in zip(
        jax.tree.leaves_with_path(tree), jax.tree.leaves(other), strict=True
    ):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(leaf, expected, rtol=1e-4, atol=1e-6, err_msg=name)


def figures(workdir, whole, step, last=STEPS):
    """The figures of the evaluation after a step; all else is as in a run up to the last step."""
    found, expected = lines(workdir), lines(whole)[:last]
    names = found[step - 1].keys() - expected[step - 1].keys()
    measured = {name: found[step - 1].pop(name) for name in names}
    assert_close(found, expected)
    return measured


def test_two_processes_find_the_losses_and_the_checkpoint_of_one(whole, stopped):
    workdir, ended, _ = stopped
    assert [status for status, _ in ended] == [0, 0], ended
    # Both know the same new run, by which the folder of their samples is named.
    assert figures(workdir, whole[0], EVALUATED, STOP)["frechet_distance"] > 0
    assert_close(states(workdir, 4), states(whole[0], 4))


def test_steps_of_every_layout_are_those_of_one_device():
    address = free_address()
    programs = [["tests/host_layouts.py", address, i] for i in (0, 1)]
    ended = forked.run(programs, devices=4, together=True)
    assert [status for status, _ in ended] == [0, 0], ended


def test_each_process_reads_its_own_part_of_every_batch(whole, stopped):
    batches = np.reshape(whole[2][: STOP * BATCH], (STOP, 2, BATCH // 2))
    for process, reads in enumerate(stopped[2]):
        np.testing.assert_array_equal(np.reshape(reads, (STOP, -1)), batches[:, process])


def test_a_signal_to_one_stops_both_at_the_same_step(stopped):
    workdir, ended, _ = stopped
    assert checkpoint.checkpoint_steps(workdir / "checkpoints") == [2, 4, STOP]
    for _, text in ended:
        assert f"asked to stop: saving step {STOP}" in text


@pytest.mark.parametrize("count", [8, 1])
def test_one_process_goes_on_from_the_checkpoint_of_two(
    count, whole, stopped, tmp_path, monkeypatch
):
    workdir = shutil.copytree(stopped[0], tmp_path / "run")
    devices = jax.devices()[:count]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    monkeypatch.setattr(jax, "device_count", lambda: count)
    state = trainer.train(configured(), workdir)
    assert_close(state, whole[1])
    figures(workdir, whole[0], EVALUATED)


def test_two_go_on_from_the_checkpoint_of_one_and_share_the_drawing(whole, tmp_path, monkeypatch):
    workdir = shutil.copytree(whole[0], tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / "8")
    more = {"evaluation__features": "digits", "evaluation__every": STEPS}
    ended = two(*programs(tmp_path, workdir, stops=(0, 0), samples=1, **more))
    assert [status for status, _ in ended] == [0, 0], ended
    assert_close(states(workdir, STEPS), whole[1])
    measured = figures(workdir, whole[0], STEPS)

    alone = shutil.copytree(workdir, tmp_path / "alone")
    shutil.rmtree(alone / "samples")
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:4])
    expected = sample.sample(configured(), alone)
    found = workdir / "samples" / expected.name
    for name in ("arr_0", "arr_1"):
        np.testing.assert_array_equal(np.load(found)[name], np.load(expected)[name])
    best = evaluate.evaluate(tiny("nash", checkpoint__keep=9), alone, "best")
    assert "frechet_distance" in measured and measured.items() <= best.items()
    grids = [Image.open(path.with_suffix(".png")) for path in (found, expected)]
    np.testing.assert_array_equal(*map(np.asarray, grids))
    assert list((workdir / "drawn").iterdir()) == []


def test_two_that_shard_the_parameters_over_all_devices_go_on(whole, tmp_path):
    workdir = shutil.copytree(whole[0], tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / "8")
    more = {"parallel__params": "sharded", "sample__every": STEPS, "evaluation__every": STEPS}
    ended = two(*programs(tmp_path, workdir, stops=(0, 0), samples=1, **more))
    assert [status for status, _ in ended] == [0, 0], ended
    assert_close(states(workdir, STEPS), whole[1])
    measured = figures(workdir, whole[0], STEPS)
    assert measured.keys() == {"validation_loss", "validation_cluster_losses"}
    assert_close(ant_jax.load_run(workdir, "best").params, jax.device_get(whole[1].ema_params))
    assert {path.suffix for path in (workdir / "samples").iterdir()} == {".json", ".npz", ".png"}


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    """What the programs of three tests say, none of which can run, and the workdir of the second.

    Two pairs, and two that are alone. They start together, because they wait most of the time.
    """
    folders = [tmp_path_factory.mktemp("refused") / "run" for _ in range(3)]
    runs = [["-m", "ant_jax.main", f"--workdir={folder}"] for folder in folders]
    changes = ["--config.seed=1", "--config.checkpoint.every=7", "--config.data.num_workers=1"]
    alone = folders[2].with_name("alone.py")
    alone.write_text(
        "from ant_jax.runtime import connection; connection._CONNECT_SECONDS = 1\n"
        "connection.initialize('localhost:1', 2, 1)"
    )
    lines = [
        *pair(runs[0], [*runs[0], "--config.data.num_workers=-1"]),
        *pair(runs[1], [*runs[1], *changes]),
        *([*runs[2], "--process_id=1"], [alone]),
    ]
    ended = forked.run(lines, devices=4, together=True)
    return ended[:2], ended[2:4], ended[4:], folders[1]


def test_one_that_fails_ends_the_other_with_its_reason(refused):
    (first, told), (second, reason) = refused[0]
    assert first == second == 1
    message = "config.data.num_workers must be an integer >= 0 and <= 1024, got -1"
    assert f"\nerror: {message}" in f"\n{reason}"
    assert re.search(f"^error: process 1 on .* failed: {message}", told, re.M)
    assert "Traceback" not in told + reason


def test_processes_with_other_settings_name_them_and_write_nothing(refused):
    _, ((first, told), (second, reason)), _, workdir = refused
    assert first == second == 1
    message = (
        "the processes of a run must have the same: "
        "config.checkpoint.every: 500 in process 0, 7 in process 1; "
        "config.seed: 0 in process 0, 1 in process 1\n"
    )
    assert f"error: {message}" in told
    assert re.search(f"^error: process 0 on .* failed: {message}", reason, re.M)
    assert "Traceback" not in told + reason
    assert not workdir.exists()


def test_what_cannot_meet_says_so(refused):
    (incomplete, reason), (alone, told) = refused[2]
    assert incomplete == alone == 1
    assert "need --coordinator, --num_processes too" in reason
    (line,) = told.splitlines()
    assert line.startswith("error: the processes have not come together at localhost:1 within 1 s")
    for arguments, message in {
        ("localhost", 2, 0): "must be HOST:PORT",
        ("localhost:1", 2, 2): "--process_id=2 must be from 0",
    }.items():
        with pytest.raises(ValueError, match=message):
            connection.initialize(*arguments)
    with socket.create_server(("localhost", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"port {port} of this machine: .*in use"):
            connection.initialize(f"localhost:{port}", 2, 0)


@pytest.mark.parametrize(
    ("tasks", "gpus", "expected"), [("3", "2", [0, 1]), ("6", "2", None), ("3", None, None)]
)
def test_under_slurm_a_process_that_is_alone_on_its_node_has_all_gpus(
    tasks, gpus, expected, monkeypatch
):
    monkeypatch.setenv("SLURM_NTASKS", tasks)
    monkeypatch.setenv("SLURM_STEP_NUM_NODES", "3")
    monkeypatch.delenv("SLURM_GPUS_ON_NODE", raising=False)
    if gpus:
        monkeypatch.setenv("SLURM_GPUS_ON_NODE", gpus)
    assert connection._gpus_of_the_node() == expected
