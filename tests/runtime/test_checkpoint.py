import contextlib
import json
import logging
import os
import shutil
import threading
from pathlib import Path

import forked
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ant_jax.runtime import checkpoint, checkpoint_arrays, checkpoint_files
from ant_jax.runtime.checkpoint import (
    Checkpointer,
    CheckpointError,
    CorruptCheckpointError,
    checkpoint_steps,
    read_record,
    restore,
    restore_part,
)
from ant_jax.runtime.devices import replicate


def make_state(step, devices=None):
    """A state that depends on the step, with all kinds of leaves of ours: scalars, ints, None."""
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


def test_copies_on_many_devices_are_saved_without_compiling_anything(tmp_path):
    state = replicate({"w": np.ones((8, 5, 7), np.float32)}, jax.devices())
    compiled = []

    def listener(event, *_, **__):
        compiled.extend([event] if event == "/jax/core/compile/backend_compile_duration" else [])

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        with contextlib.closing(Checkpointer(tmp_path)) as checkpoints:
            checkpoints.save(1, state)
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    assert not compiled
    assert_equal(restore(tmp_path, state)[1], state)


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
    "b is () there and missing now": lambda state: state | {"params": {"w": state["params"]["w"]}},
    "c is missing there and () now": lambda state: with_leaf(state, "c", state["params"]["b"]),
    "w is (8, 3) there and (9, 3) now": lambda state: with_leaf(state, "w", jnp.zeros((9, 3))),
    "w is (8, 3) there and (7, 3) now": lambda state: with_leaf(state, "w", jnp.zeros((7, 3))),
    "w is (8, 3) there and (3, 8) now": lambda state: with_leaf(state, "w", jnp.zeros((3, 8))),
}


@pytest.mark.parametrize("mismatch", MISMATCHES)
def test_a_state_of_another_structure_is_refused(three, mismatch):
    template = replicate(MISMATCHES[mismatch](make_state(0)), jax.devices())
    words = f"3 does not fit this config, .*: params.{mismatch}"
    words = words.replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(CheckpointError, match=words):
        restore(three, template)
    with pytest.raises(CheckpointError, match=words):
        restore_part(three, "params", template["params"])


def test_a_part_is_read_alone(three):
    for step in (None, 2):
        found, part = restore_part(three, "params", make_state(0)["params"], step)
        assert found == (step or 3)
        assert_equal(part, make_state(found)["params"])
    with pytest.raises(FileNotFoundError):
        restore_part(three, "params", step=7)


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
    # Large enough that the write still runs when its buffers are reused.
    state = {"w": jax.random.normal(jax.random.key(0), (1000, 1000)), "step": jnp.int32(4)}
    state = replicate(state, jax.devices()[:devices])
    expected = jax.tree.map(np.array, state)
    step_fn = jax.jit(lambda s: jax.tree.map(lambda x: -x - 1, s), donate_argnums=0)
    # Compiled now, because the write would end during the compilation.
    step_fn = step_fn.lower(state).compile()
    checkpoints = Checkpointer(tmp_path)
    checkpoints.save(4, state)
    donated = []
    for _ in range(5):
        old, state = state, step_fn(state)
        donated.append(old["w"].is_deleted())
    # The first result may be a copy: the runtime does not reuse a buffer that is being read.
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


def test_a_checkpoint_that_cannot_be_read_back_is_a_failed_save(tmp_path, monkeypatch):
    checkpoints = Checkpointer(tmp_path)
    checkpoints.save(1, make_state(1))
    checkpoints.wait()

    def unreadable(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(checkpoint_files.hashlib, "file_digest", unreadable)
    checkpoints.save(2, make_state(2))
    with pytest.raises(CheckpointError, match=r"Input/output error.*newest .*: step 1"):
        checkpoints.wait()
    checkpoints.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "partial-2"]


NEXT = {
    "save": lambda checkpoints: checkpoints.save(3, make_state(3)),
    "check": lambda checkpoints: (checkpoints._pending.exception(), checkpoints.check()),
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
    released, saved = threading.Event(), []
    monkeypatch.setattr(
        Checkpointer, "_commit", lambda *args: (released.wait(60), saved.append(True))
    )
    checkpoints = Checkpointer(tmp_path)
    checkpoints.save(1, make_state(1))
    checkpoints.check()
    assert not saved
    # `close` waits.
    threading.Timer(0.1, released.set).start()
    checkpoints.close()
    assert saved


def test_a_checkpoint_has_its_name_only_when_it_is_whole(tmp_path, monkeypatch):
    checksums = checkpoint_files._checksums
    seen = []

    def spy(path):
        seen.append((path.name, checkpoint_steps(tmp_path)))
        return checksums(path)

    monkeypatch.setattr(checkpoint_files, "_checksums", spy)
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
    # A limit on the size of files imitates a full disk without special rights.
    program = tmp_path / "program.py"
    program.write_text("""
import resource, signal, sys
import jax, jax.numpy as jnp
from ant_jax.runtime.checkpoint import Checkpointer, CheckpointError, restore
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
""")
    folder = tmp_path / "checkpoints"
    ((status, said),) = forked.run([[program, folder]], devices=1)
    assert status == 0, said
    assert f"RAISED saving a checkpoint in {folder} failed" in said
    assert "newest complete checkpoint: step 1" in said
    assert "RESTORED (1, {'w': Array([0., 1., 2., 3.]" in said


ODD = ["a[1]", "a*b", "a?", "#1", "a%20b", " a b ", "ünï☃", "new\nline", "q\"'", "back\\slash", "~"]
ODD += [os.fsdecode(b"\xff"), "-r", "{x}", "$HOME"]


@pytest.mark.parametrize("name", ODD)
def test_a_path_may_have_any_characters(tmp_path, name):
    directory = write(tmp_path / name / "checkpoints", [1, 2])
    assert_equal(restore(directory, make_state(0))[1], make_state(2))
    # A backslash is not taken for a slash, and no file is written elsewhere.
    assert os.listdir(tmp_path) == [name]
    assert sorted(os.listdir(tmp_path / name)) == ["checkpoints", "checkpoints.json"]


def test_a_path_may_be_relative_and_a_link(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.chdir(tmp_path)
    directory = write("link/a[1]", [1])
    assert_equal(restore("real/a[1]", make_state(0))[1], make_state(1))
    assert_equal(restore(directory, make_state(0))[1], make_state(1))


def test_what_was_not_written_gets_no_name(tmp_path, monkeypatch):
    """With a path that orbax can't handle, it writes nothing readable and raises no error."""
    monkeypatch.setattr(checkpoint_arrays, "plain_path", contextlib.nullcontext)
    with pytest.raises(CheckpointError, match="holds 0 of 4 arrays"):
        write(tmp_path / "a[1]", [1])
    assert checkpoint_steps(tmp_path / "a[1]") == []


@pytest.mark.parametrize("what", ["manifest.ocdbt", "d"])
def test_what_lacks_a_part_gets_no_name(tmp_path, monkeypatch, what):
    check = checkpoint_arrays.check

    def damaged(path, arrays):
        checkpoint._remove(path / what)
        check(path, arrays)

    monkeypatch.setattr(checkpoint_arrays, "check", damaged)
    with pytest.raises(CheckpointError, match=r"what was saved in .*partial-1 "):
        write(tmp_path, [1])
    assert checkpoint_steps(tmp_path) == []


def test_what_holds_other_arrays_gets_no_name(tmp_path, monkeypatch):
    described = checkpoint_arrays.shape_and_dtype
    monkeypatch.setattr(
        checkpoint_arrays, "shape_and_dtype", lambda leaf: described(leaf.astype(jnp.int16))
    )
    with pytest.raises(CheckpointError, match="holds 0 of 4 arrays"):
        write(tmp_path, [1])
    assert checkpoint_steps(tmp_path) == []


FOREIGN = [".DS_Store", "._manifest.ocdbt", ".nfs0000012", "Thumbs.db", "d/._x", ".x/y"]


def litter(path):
    for name in FOREIGN:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("x")


def test_files_of_file_browsers_and_network_disks_do_not_count(tmp_path, monkeypatch, caplog):
    check = checkpoint_arrays.check
    monkeypatch.setattr(
        checkpoint_arrays, "check", lambda path, arrays: (litter(path), check(path, arrays))
    )
    directory = write(tmp_path, [1, 2], keep=2)
    monkeypatch.undo()
    assert not {*FOREIGN} & json.loads((directory / "2" / "checksums.json").read_text()).keys()
    for step in (1, 2):
        shutil.rmtree(directory / str(step) / ".x")
        (directory / str(step) / ".DS_Store").write_text("changed")
        (directory / str(step) / "Thumbs.db").unlink()
        (directory / str(step) / "notes of mine").touch()
    litter(directory)
    assert restore(directory, make_state(0))[0] == 2
    assert "corrupt" not in caplog.text
    assert checkpoint_steps(write(directory, [3], keep=1)) == [3]


def test_a_checkpoint_of_an_older_version_may_list_such_files(directory):
    path = directory / "3" / "checksums.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {".DS_Store": "0"}))
    assert restore(directory, make_state(0))[0] == 3


NO_STEPS = [
    "007",
    "041",
    "²",
    "+5",
    "-1",
    "0",
    "1_0",
    " 9",
    "9 ",
    "1e1",
    "٣",
    "99999999999",
    "9" * 200,
]


def test_what_only_looks_like_a_step_is_none(directory, caplog):
    for name in NO_STEPS:
        (directory / name).mkdir()
    (directory / "6").write_text("a file")
    assert checkpoint_steps(directory) == [1, 2, 3]
    assert restore(directory, make_state(0))[0] == 3
    write(directory, [4, 5, 6, 7], keep=1)
    assert checkpoint_steps(directory) == [7]
    assert {*NO_STEPS, "corrupt-6"} <= {*os.listdir(directory)}
    assert "corrupt" not in caplog.text


def run_goes_on(directory):
    """Saves two more checkpoints and keeps one; all earlier ones are removed."""
    newest = checkpoint_steps(directory)[-1]
    write(directory, [newest + 1, newest + 2], keep=1)


@pytest.mark.parametrize("instant", ["before the checksums", "before the arrays", "in between"])
def test_a_reader_takes_the_newest_again_where_the_run_goes_on(directory, monkeypatch, instant):
    module, name = {
        "before the checksums": (checkpoint_files, "verify"),
        "before the arrays": (checkpoint_arrays, "open_orbax"),
        "in between": (checkpoint_files, "_digest"),
    }[instant]
    function, calls = getattr(module, name), []

    def meanwhile(*args):
        calls.append(args)
        # In between: some files have been read.
        if len(calls) == (3 if instant == "in between" else 1):
            with monkeypatch.context() as patch:
                patch.setattr(module, name, function)
                run_goes_on(directory)
        return function(*args)

    monkeypatch.setattr(module, name, meanwhile)
    step, state = restore(directory, make_state(0))
    assert step == 5
    assert_equal(state, make_state(5))


def test_a_step_that_is_removed_while_it_is_read_is_not_there(directory, monkeypatch):
    open_orbax = checkpoint_arrays.open_orbax
    remove = lambda: (shutil.rmtree(directory / "2", ignore_errors=True), open_orbax())[1]
    monkeypatch.setattr(checkpoint_arrays, "open_orbax", remove)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 2 in .*\[1, 3\]"):
        restore(directory, make_state(0), 2)


def test_a_writer_is_not_broken_by_who_reads(tmp_path, monkeypatch):
    """Files that another machine reads on a network disk can't be removed; they stay for later."""
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda path, ignore_errors=False: None)
    directory = write(tmp_path, [1, 2, 3], keep=1)
    assert sorted(os.listdir(directory)) == ["3", "partial-old-1", "partial-old-2"]
    write(directory, [1], keep=1)
    write(directory, [2], keep=1)
    assert checkpoint_steps(directory) == [2]
    monkeypatch.undo()
    write(directory, [])
    assert sorted(os.listdir(directory)) == ["2", "corrupt-3"]


def test_checkpoints_that_are_gone_are_missed(tmp_path, caplog):
    directory = write(tmp_path / "checkpoints", [1, 2, 3], keep=3)
    shutil.rmtree(directory / "3")
    assert restore(directory, make_state(0))[0] == 2
    assert "a checkpoint of step 3, which is gone; the newest is of step 2" in caplog.text
    for empty in (False, True):
        shutil.rmtree(directory)
        if empty:
            directory.mkdir()
        with pytest.raises(CheckpointError, match=r"step 3: bring it back .* or remove .*s\.json"):
            restore(directory, make_state(0))
        directory.mkdir(exist_ok=True)
    for content in ("", "[]", "{}", "[" * 9999):
        (tmp_path / "checkpoints.json").write_text(content)
        with pytest.raises(CheckpointError, match="step unknown: bring it back"):
            restore(directory, make_state(0))
    (tmp_path / "checkpoints.json").unlink()
    assert restore(directory, make_state(0)) is None


def test_pruning_leaves_what_is_passed_over_and_what_was_before_it(directory):
    checkpoints = Checkpointer(directory, keep=1)
    checkpoints.prune(2)
    checkpoints.close()
    assert checkpoint_steps(directory) == [2, 3]


def with_records(directory, records):
    checkpoints = Checkpointer(directory, keep=9)
    for step, record in records.items():
        checkpoints.save(step, make_state(step), record)
    checkpoints.close()
    return checkpoints.directory


def test_a_checkpoint_tells_what_it_is_of(tmp_path, caplog):
    of_a, of_b = {"id": "a", "n": [0.1, None]}, {"id": "b"}
    directory = with_records(tmp_path, {1: None, 2: of_a, 3: of_a | {"n": 3}, 4: of_b})
    assert read_record(directory) == of_b
    assert read_record(directory, 2) == of_a
    assert read_record(directory, 1) is read_record(directory, 7) is None
    # Checkpoints of another run are skipped; those of older versions, without records, are not.
    assert read_record(directory, run="a") == of_a | {"n": 3}
    assert restore(directory, make_state(0), run="a")[0] == 3
    assert "checkpoint" in caplog.text and "is of another run" in caplog.text
    flip_byte(directory / "3" / "run.json")
    (directory / "4" / "run.json").unlink()
    (directory / "4" / "run.json").mkdir()
    assert read_record(directory) == of_a
    assert restore(directory, make_state(0))[0] == 2
    assert restore(directory, make_state(0), run="c")[0] == 1
    with pytest.raises(CorruptCheckpointError, match="is of another run"):
        restore(directory, make_state(0), 2, run="b")


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_place_that_has_become_anothers_gets_no_checkpoint(tmp_path, when):
    asked = []

    def guard():
        asked.append(os.listdir(tmp_path))
        if len(asked) == (1 if when == "before" else 2):
            raise CheckpointError("not ours")

    checkpoints = Checkpointer(tmp_path, guard=guard)
    with pytest.raises(CheckpointError, match="not ours"):
        checkpoints.save(1, make_state(1))
        checkpoints.check()
        checkpoints._finish()
    checkpoints.close()
    assert checkpoint_steps(tmp_path) == []
