import json
import logging
import os
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ant_jax import checkpoint
from ant_jax.checkpoint import (
    Checkpointer,
    CheckpointError,
    CorruptCheckpointError,
    checkpoint_steps,
    restore,
)
from ant_jax.parallel import replicate

ROOT = Path(__file__).parents[1]


def make_state(step, devices=None):
    """A state of step-dependent numbers, with the odd leaves that ours has: scalars, ints, None."""
    rng = np.random.default_rng(step)
    state = {
        "step": np.int32(step),
        "params": {"w": rng.normal(size=(8, 3)).astype(np.float32), "b": np.float32(0.1 * step)},
        "method": ((), rng.normal(size=2).astype(np.float32), None),
    }
    return replicate(state, devices or jax.devices())


def assert_equal(tree, expected):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(tree), jax.device_get(expected))
    assert jax.tree.structure(tree) == jax.tree.structure(expected)


def write(directory, steps, **settings):
    checkpoints = Checkpointer(directory, **settings)
    for step in steps:
        checkpoints.save(step, make_state(step))
    checkpoints.close()
    return checkpoints.directory


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Checkpoints of the steps 1, 2 and 3; not to be changed."""
    return write(tmp_path_factory.mktemp("three"), [1, 2, 3], keep=3)


@pytest.fixture
def directory(three, tmp_path):
    return Path(shutil.copytree(three, tmp_path / "checkpoints"))


def files(path):
    return sorted(file for file in path.rglob("*") if file.is_file())


def largest_file(path):
    return max(files(path), key=lambda file: file.stat().st_size)


def test_the_newest_checkpoint_is_restored_as_it_was(three):
    step, state = restore(three, make_state(0))
    assert step == 3
    assert_equal(state, make_state(3))
    assert state["params"]["w"].sharding == make_state(0)["params"]["w"].sharding


def test_a_step_can_be_asked_for(three):
    step, state = restore(three, make_state(0), 2)
    assert step == 2
    assert_equal(state, make_state(2))
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 7 in .*\[1, 2, 3\]"):
        restore(three, make_state(0), 7)


def test_steps_are_ordered_as_numbers(tmp_path):
    for name in ("5", "10", "100", "partial-200", "notes", "7.orbax-checkpoint-tmp"):
        (tmp_path / name).mkdir()
    assert checkpoint_steps(tmp_path) == [5, 10, 100]


def test_nothing_to_restore(tmp_path):
    assert checkpoint_steps(tmp_path / "missing") == []
    assert restore(tmp_path / "missing", make_state(0)) is None
    assert restore(write(tmp_path / "empty", []), make_state(0)) is None


def test_every_file_has_a_checksum(three):
    names = {file.relative_to(three / "3").as_posix() for file in files(three / "3")}
    assert json.loads((three / "3" / "checksums.json").read_text()).keys() == names - {
        "checksums.json"
    }
    assert len(names) > 3


def truncate(file):
    file.write_bytes(file.read_bytes()[:-1])


def flip_byte(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "truncated": lambda path: truncate(largest_file(path)),
    "flipped byte": lambda path: flip_byte(largest_file(path)),
    "missing file": lambda path: largest_file(path).unlink(),
    "no checksums": lambda path: (path / "checksums.json").unlink(),
    "torn checksums": lambda path: truncate(path / "checksums.json"),
    "checksums of nothing": lambda path: (path / "checksums.json").write_text("[]"),
    "empty directory": lambda path: [file.unlink() for file in files(path)],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_corrupt_checkpoint_is_named_and_the_one_before_is_used(directory, damage, caplog):
    DAMAGE[damage](directory / "3")
    with caplog.at_level(logging.ERROR):
        step, state = restore(directory, make_state(0))
    assert step == 2
    assert_equal(state, make_state(2))
    assert str(directory / "3") in caplog.text


def test_damage_to_any_file_is_noticed(directory):
    everything = files(directory / "3")
    for file in everything:
        content = file.read_bytes()
        flip_byte(file)
        with pytest.raises(CorruptCheckpointError):
            restore(directory, make_state(0), 3)
        file.write_bytes(content)
    restore(directory, make_state(0), 3)


def test_no_intact_checkpoint_is_an_error_and_not_a_fresh_start(directory):
    for step in (1, 2, 3):
        flip_byte(largest_file(directory / str(step)))
    with pytest.raises(CorruptCheckpointError) as error:
        restore(directory, make_state(0))
    assert all(str(directory / str(step)) in str(error.value) for step in (1, 2, 3))


def test_corrupt_checkpoints_are_set_aside_when_the_run_gets_there_again(directory):
    for step in (2, 3):
        flip_byte(largest_file(directory / str(step)))
    write(directory, [2], keep=3)
    assert sorted(os.listdir(directory)) == ["1", "2", "corrupt-2", "corrupt-3"]
    assert_equal(restore(directory, make_state(0))[1], make_state(2))


def test_the_newest_and_the_periodic_checkpoints_are_kept(tmp_path):
    directory = write(tmp_path, [1, 2, 4, 5, 8, 9, 10], keep=2, keep_period=4)
    assert checkpoint_steps(directory) == [4, 8, 9, 10]
    assert len(os.listdir(directory)) == 4


def test_what_an_interrupted_save_left_is_ignored_and_removed(directory):
    shutil.copytree(directory / "3", directory / "partial-4")
    (directory / "partial-4" / "checksums.json").unlink()
    (directory / "partial-5.orbax-checkpoint-tmp-1").mkdir()
    assert restore(directory, make_state(0))[0] == 3
    assert len(os.listdir(directory)) == 5
    write(directory, [], keep=3)
    assert sorted(os.listdir(directory)) == ["1", "2", "3"]


def with_leaf(state, name, value):
    return state | {"params": state["params"] | {name: value}}


MISMATCHES = {
    "missing leaf": lambda state: state | {"params": {"w": state["params"]["w"]}},
    "additional leaf": lambda state: with_leaf(state, "c", state["params"]["b"]),
    "larger": lambda state: with_leaf(state, "w", jnp.zeros((9, 3))),
    "smaller": lambda state: with_leaf(state, "w", jnp.zeros((7, 3))),
    "transposed": lambda state: with_leaf(state, "w", jnp.zeros((3, 8))),
}


@pytest.mark.parametrize("mismatch", MISMATCHES)
def test_a_state_of_another_structure_is_refused(three, mismatch):
    template = replicate(MISMATCHES[mismatch](make_state(0)), jax.devices())
    with pytest.raises(CheckpointError, match=r"3 does not fit this config"):
        restore(three, template)


def test_a_checkpoint_does_not_depend_on_the_number_of_devices(tmp_path):
    one, eight = jax.devices()[:1], jax.devices()
    checkpoints = Checkpointer(tmp_path)
    checkpoints.save(1, make_state(1, one))
    checkpoints.save(8, make_state(8, eight))
    checkpoints.close()
    for step, devices in ((1, eight), (8, one)):
        template = make_state(0, devices)
        _, state = restore(tmp_path, template, step)
        assert_equal(state, make_state(step))
        assert state["params"]["w"].sharding == template["params"]["w"].sharding
        assert state["params"]["w"].devices() == set(devices)


@pytest.mark.parametrize("devices", [1, 8])
def test_the_state_may_be_donated_while_it_is_saved(tmp_path, devices):
    # Large enough that the write is still going on when its buffers are used for something else.
    state = {"w": jax.random.normal(jax.random.key(0), (1000, 1000)), "step": jnp.int32(4)}
    state = replicate(state, jax.devices()[:devices])
    expected = jax.tree.map(np.array, state)
    step_fn = jax.jit(lambda s: jax.tree.map(lambda x: -x - 1, s), donate_argnums=0)
    # Compiled now, or the write would be over by then.
    step_fn = step_fn.lower(state).compile()
    checkpoints = Checkpointer(tmp_path)
    checkpoints.save(4, state)
    donated = []
    for _ in range(5):
        old, state = state, step_fn(state)
        donated.append(old["w"].is_deleted())
    # The first may be a copy: the runtime spares a buffer that is being read.
    assert all(donated[1:])
    checkpoints.close()
    assert_equal(restore(tmp_path, state)[1], expected)


def fail_on(monkeypatch, step):
    commit = Checkpointer._commit

    def failing(self, partial, now, *rest):
        if now == step:
            raise OSError(28, "No space left on device")
        commit(self, partial, now, *rest)

    monkeypatch.setattr(Checkpointer, "_commit", failing)


NEXT = {
    "save": lambda checkpoints: checkpoints.save(3, make_state(3)),
    "check": lambda checkpoints: (time.sleep(0.5), checkpoints.check()),
    "close": lambda checkpoints: checkpoints.close(),
}


@pytest.mark.parametrize("call", NEXT)
def test_a_failed_save_is_raised_by_the_next_call(tmp_path, monkeypatch, call):
    fail_on(monkeypatch, 2)
    checkpoints = Checkpointer(tmp_path)
    checkpoints.save(1, make_state(1))
    checkpoints.save(2, make_state(2))
    message = rf"{tmp_path} failed: .*No space left.*newest complete checkpoint: step 1"
    with pytest.raises(CheckpointError, match=message):
        NEXT[call](checkpoints)
    checkpoints.close()
    assert restore(tmp_path, make_state(0))[0] == 1
    assert_equal(restore(tmp_path, make_state(0))[1], make_state(1))


def test_check_does_not_wait_for_a_save(tmp_path, monkeypatch):
    monkeypatch.setattr(Checkpointer, "_commit", lambda *args: time.sleep(1))
    checkpoints = Checkpointer(tmp_path)
    checkpoints.save(1, make_state(1))
    begin = time.perf_counter()
    checkpoints.check()
    assert time.perf_counter() - begin < 0.5
    checkpoints.close()
    assert time.perf_counter() - begin > 0.9


def test_a_checkpoint_has_its_name_only_when_it_is_whole(tmp_path, monkeypatch):
    checksums = checkpoint._checksums
    seen = []

    def spy(path):
        seen.append((path.name, checkpoint_steps(tmp_path)))
        return checksums(path)

    monkeypatch.setattr(checkpoint, "_checksums", spy)
    write(tmp_path, [5])
    assert seen == [("partial-5", [])]
    assert checkpoint_steps(tmp_path) == [5]


def test_a_checkpoint_that_has_no_room_is_not_begun(tmp_path, monkeypatch):
    checkpoints = Checkpointer(tmp_path)
    checkpoints.save(1, make_state(1))
    checkpoints.check()
    usage = checkpoint.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage._replace(free=90))
    with pytest.raises(
        CheckpointError, match=r"no room .* 9e-08 GB are free; newest complete checkpoint: step 1"
    ):
        checkpoints.save(2, make_state(2))
    monkeypatch.undo()
    checkpoints.save(3, make_state(3))
    checkpoints.close()
    assert checkpoint_steps(tmp_path) == [1, 3]


def test_a_full_disk_leaves_the_older_checkpoint(tmp_path):
    # A limit on the size of files is the nearest thing to a full disk that needs no privileges.
    program = """
        import resource, signal, sys
        import jax, jax.numpy as jnp
        from ant_jax.checkpoint import Checkpointer, CheckpointError, restore
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        small = {"w": jnp.arange(4.0)}
        checkpoints = Checkpointer(sys.argv[1])
        checkpoints.save(1, small)
        checkpoints._finish()
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            checkpoints.save(2, {"w": jax.random.normal(jax.random.key(0), (100_000,))})
            checkpoints.close()
        except CheckpointError as error:
            print("RAISED", error)
        print("RESTORED", restore(sys.argv[1], small))
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), tmp_path],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert f"RAISED saving a checkpoint in {tmp_path} failed" in result.stdout, result.stderr
    assert "newest complete checkpoint: step 1" in result.stdout
    assert "RESTORED (1, {'w': Array([0., 1., 2., 3.]" in result.stdout
