import contextlib
import dataclasses
import functools
import json
import os
import re
import shutil
import signal
import threading
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image
from tiny_runs import (
    STEPS,
    TINY,
    Model,
    assert_same_state,
    before_batch,
    lines,
    signal_at,
    tiny,
    use_small_model,
)

from ant_jax import (
    compiled_step,
    data,
    evaluate,
    experiment,
    export,
    hooks,
    mtl,
    sample,
    state_layout,
)
from ant_jax import config as config_lib
from ant_jax import train as trainer
from ant_jax import workdir as workdir_lib
from ant_jax.config import ConfigError
from ant_jax.runtime import checkpoint
from ant_jax.runtime import devices as devices_lib
from ant_jax.runtime.lock import InUseError
from ant_jax.runtime.processes import DisagreementError
from ant_jax.tasks import affinity
from ant_jax.train_step import TrainState
from ant_jax.workdir import compatibility
from configs import digits

pytestmark = pytest.mark.usefixtures("small_model")
STOP = 5


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """For each method one run without interruption, to compare with; not to be changed."""
    runs = {}

    def run(method="uncertainty"):
        if method not in runs:
            workdir = tmp_path_factory.mktemp(method)
            runs[method] = workdir, trainer.train(tiny(method), workdir)
        return runs[method]

    return run


@pytest.fixture
def finished(reference):
    return tiny(), *reference()


@pytest.mark.parametrize("method", ["uncertainty", "nash"])
def test_a_run_stopped_by_sigterm_goes_on_as_if_it_had_not_been(
    method, reference, tmp_path, monkeypatch
):
    config = tiny(method)
    whole, expected = reference(method)
    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        before_batch(patch, signal_at(STOP, signal.SIGTERM))
        stopped = trainer.train(config, tmp_path)
    assert int(stopped.step) == STOP
    assert signal.getsignal(signal.SIGTERM) is handler
    assert checkpoint.checkpoint_steps(tmp_path / "checkpoints") == [4, STOP]

    steps = []
    before_batch(monkeypatch, lambda step, batch: (steps.append(step), batch)[1])
    state = trainer.train(config, tmp_path)
    assert steps == list(range(STOP + 1, STEPS + 1))
    assert_same_state(state, expected)
    assert lines(tmp_path) == lines(whole)
    assert [row["step"] for row in lines(tmp_path)] == list(range(1, STEPS + 1))


def test_a_run_whose_data_do_not_come_can_be_stopped(reference, tmp_path, monkeypatch):
    whole, expected = reference()
    digits = data.digits("train")
    hangs = dataclasses.make_dataclass("Hangs", [], bases=(type(digits),), frozen=True, eq=False)
    released, seen = threading.Event(), []

    def read(source, index):
        seen.append(index)
        if len(seen) == STOP * tiny().data.batch_size + 1:
            threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGHUP]).start()
            released.wait()
        return type(digits).__getitem__(source, index)

    hangs.__getitem__ = read
    with monkeypatch.context() as patch:
        patch.setattr(trainer.dataset, "open_data", lambda *_: hangs(**vars(digits)))
        begin = time.perf_counter()
        state = trainer.train(tiny(), tmp_path)
    released.set()
    assert int(state.step) == STOP and time.perf_counter() - begin < 60
    assert checkpoint.checkpoint_steps(tmp_path / "checkpoints") == [4, STOP]
    assert_same_state(trainer.train(tiny(), tmp_path), expected)
    assert lines(tmp_path) == lines(whole)


def test_a_finished_run_is_left_alone(finished, monkeypatch, caplog):
    config, workdir, expected = finished
    content = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    before_batch(monkeypatch, lambda step, batch: pytest.fail("took a step"))
    free = tiny(log_every=3, sample__num=5, checkpoint__keep=4)
    with caplog.at_level("INFO", logger="absl"):
        for again in (config, free):
            assert_same_state(trainer.train(again, workdir), expected)
    said = f"is finished, at step {STEPS} of config.num_steps = {STEPS}; to train on, "
    assert caplog.text.count(f"{said}set config.num_steps higher") == 2
    assert "uncertainty; clusters by snr: t = 0.." in caplog.text
    for name in ("cosine", "wsd"):
        caplog.clear()
        config_lib.update(config, {"schedule.name": name})
        with caplog.at_level("INFO", logger="absl"):
            trainer._log_resumed(config, Path("w"), STEPS)
            trainer._log_resumed(config, Path("w"), STEPS + 1)
        assert f"{said}begin another run with config.init_from = 'w'" in caplog.text
        assert f"at step {STEPS + 1} beyond config.num_steps = {STEPS}" in caplog.text
    after = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    for path in content.keys() - {workdir / "config.json"}:
        assert after[path] == content[path], path


def test_a_run_that_was_killed_before_its_first_checkpoint_says_so(tmp_path, caplog):
    config = tiny(num_steps=1)
    workdir_lib.save_config(config, tmp_path)
    with caplog.at_level("INFO", logger="absl"):
        trainer.train(config, tmp_path)
    assert f"the run in {tmp_path} has no checkpoint yet: it begins at step 0" in caplog.text


def test_another_config_is_refused_with_both_values(finished, monkeypatch):
    _, workdir, _ = finished
    monkeypatch.setattr(experiment, "init_params", lambda *_: pytest.fail("came too late"))
    with pytest.raises(ConfigError) as error:
        trainer.train(tiny(model__width=32, ema_decay=0.5, log_every=2), workdir)
    message = str(error.value)
    assert "config.model.width: 64 there, 32 now" in message
    assert "config.ema_decay: 0.999 there, 0.5 now" in message
    assert str(workdir) in message and "log_every" not in message
    assert json.loads((workdir / "config.json").read_text())["model"]["width"] == 64


def test_the_run_does_not_depend_on_the_devices_it_is_resumed_on(finished, tmp_path, monkeypatch):
    config, whole, expected = finished
    one = jax.devices()[:1]

    def run(devices, workdir, stop):
        with monkeypatch.context() as patch:
            patch.setattr(jax, "local_devices", lambda: devices)
            patch.setattr(jax, "device_count", lambda: len(devices))
            before_batch(patch, signal_at(stop, signal.SIGTERM))
            state = trainer.train(config, workdir)
            assert state.params["Dense_0"]["kernel"].devices() == set(devices)
        return state

    for name, devices in (("one first", (one, jax.devices())), ("last", (jax.devices(), one))):
        run(devices[0], tmp_path / name, 4)
        state = run(devices[1], tmp_path / name, STEPS)
        assert int(state.step) == STEPS
        for row, other in zip(lines(tmp_path / name), lines(whole), strict=True):
            np.testing.assert_allclose(row["cluster_losses"], other["cluster_losses"], rtol=1e-5)
        jax.tree.map(
            lambda leaf, other: np.testing.assert_allclose(leaf, other, rtol=1e-3, atol=1e-4),
            state.params,
            expected.params,
        )


def test_a_run_may_go_on_with_its_parameters_on_shards_and_back(reference, tmp_path, monkeypatch):
    expected = reference("nash")[1]
    sharded = tiny("nash", parallel__params="sharded", sample__every=STEPS, evaluation__features="")

    def run(config, folder, stop=STEPS):
        with monkeypatch.context() as patch:
            before_batch(patch, signal_at(stop, signal.SIGTERM))
            return trainer.train(config, tmp_path / folder)

    whole = run(sharded, "whole")
    assert whole.params["Dense_0"]["kernel"].addressable_shards[0].data.shape == (8, 64 // 8)
    run(sharded, "stopped", 4)
    assert_same_state(run(sharded, "stopped"), whole)
    assert lines(tmp_path / "stopped") == lines(tmp_path / "whole")
    for name, first, last in (("on", tiny("nash"), sharded), ("back", sharded, tiny("nash"))):
        run(first, name, 4)
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
        jax.tree.map(close, run(last, name), expected)

    # What is made from the checkpoint does not depend on where the parameters are.
    assert (tmp_path / "whole" / "samples" / f"{STEPS:08d}.png").exists()
    made = []
    for config in (sharded, tiny("nash", evaluation__features="")):
        workdir = shutil.copytree(
            tmp_path / "whole", tmp_path / f"copy of {config.parallel.params}"
        )
        samples = np.load(sample.sample(config, workdir))["arr_0"]
        weights = (export.export(config, workdir) / "model.safetensors").read_bytes()
        figures = evaluate.evaluate(config, workdir)["validation_loss"]
        made.append((samples, weights, figures))
    np.testing.assert_array_equal(made[0][0], made[1][0])
    assert made[0][1] == made[1][1]
    assert made[0][2] == pytest.approx(made[1][2], rel=1e-5)


def test_a_checkpoint_takes_no_second_copy_of_the_parameters():
    config = tiny()
    setup = experiment.build(config, 1, 10)
    layout, state = state_layout.layout(config, setup), state_layout.new_state(config, setup)
    split = layout.split(state)
    for each in (split, layout.whole(split)):
        assert jax.tree.all(jax.tree.map(lambda a, b: a is b, each.params, state.params))


def test_a_corrupt_checkpoint_is_passed_over(finished, tmp_path):
    config, whole, expected = finished
    trainer.train(tiny(num_steps=4), tmp_path)
    (tmp_path / "checkpoints" / "4" / "checksums.json").unlink()
    heard = []
    state = trainer.train(config, tmp_path, callback=lambda *line: heard.append(line))
    assert_same_state(state, expected)
    assert lines(tmp_path) == lines(whole)
    # It starts after the checkpoint of step 2.
    told = [{"step": step, **metrics} for step, metrics in heard]
    assert all(row.pop("steps_per_second") > 0 for row in told)
    assert told == lines(tmp_path)[2:]


def test_what_is_compiled_with_options_trains(tmp_path, monkeypatch):
    """Under the flags of these tests programs have none otherwise."""
    one = jax.devices()[:1]
    monkeypatch.setattr(jax, "local_devices", lambda: one)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    options = {"xla_backend_optimization_level": 0}
    for module in (devices_lib, state_layout):
        monkeypatch.setattr(module, "compiler_options", lambda devices: options)
    # No other test has this decay: their programs would be taken.
    assert trainer.train(tiny(ema_decay=0.91, num_steps=2), tmp_path).step == 2


def test_a_run_that_begins_meanwhile_is_noticed(tmp_path, monkeypatch):
    build = experiment.build

    def slow(config, *args):
        workdir_lib.save_config(tiny(ema_decay=0.5), tmp_path)
        return build(config, *args)

    monkeypatch.setattr(experiment, "build", slow)
    with pytest.raises(ConfigError, match="another run has begun in"):
        trainer.train(tiny(), tmp_path)
    assert workdir_lib.load_config(tmp_path).ema_decay == 0.5


@pytest.mark.parametrize("devices", [1, 8])
def test_the_step_is_compiled_once(devices, tmp_path, monkeypatch):
    """By its thread, before the first batch; not in a resumed run or one of another seed."""
    here = jax.local_devices()[:devices]
    monkeypatch.setattr(jax, "local_devices", lambda: here)
    # No other test has this decay: their step would be taken.
    config = tiny(checkpoint__every=100, ema_decay=0.93)
    other = tiny(checkpoint__every=100, ema_decay=0.93, seed=3, optimizer__learning_rate=1e-4)
    now, compiled = [0], []

    def hook(step, batch):
        now[0] = step
        return signal_at(4, signal.SIGTERM)(step, batch)

    def listener(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append((threading.current_thread().name.split("_")[0], now[0]))

    before_batch(monkeypatch, hook)
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        for i, (first, last, run, folder) in enumerate(
            [(1, 4, config, "a"), (5, STEPS, config, "a"), (1, 4, other, "b")]
        ):
            compiled.clear()
            now[0] = 0
            trainer.train(run, tmp_path / folder)
            assert [thread for thread, _ in compiled].count("compiler") == (i == 0)
            # The last step also saves.
            assert not [
                each for each in compiled if each[0] != "compiler" and first <= each[1] < last
            ]
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)


def refused(*_):
    raise ConfigError("refused")


def test_what_goes_wrong_in_compiling_is_raised_by_the_first_step(tmp_path, monkeypatch):
    def failing(*args, **kwargs):
        raise MemoryError("too large a program")

    monkeypatch.setattr(jax.stages.Lowered, "compile", failing)
    compiled_step._compilation.cache_clear()
    # Not once only: the next run compiles again.
    for _ in range(2):
        with pytest.raises(MemoryError, match="too large a program"):
            trainer.train(tiny(), tmp_path)
    assert checkpoint.checkpoint_steps(tmp_path / "checkpoints") == []
    # Nor does a run that ends before its first step leave the error to the next.
    monkeypatch.setattr(workdir_lib, "restore", refused)
    with pytest.raises(ConfigError, match="refused"):
        trainer.train(tiny(), tmp_path)
    monkeypatch.undo()
    trainer.train(tiny(num_steps=1), tmp_path)


def test_a_run_that_fails_early_leaves_no_thread_behind(tmp_path, monkeypatch):
    threads, lower = [], jax.stages.Lowered.compile

    def compiling(self):
        threads.append(threading.current_thread())
        return lower(self)

    monkeypatch.setattr(jax.stages.Lowered, "compile", compiling)
    compiled_step._compilation.cache_clear()
    monkeypatch.setattr(workdir_lib, "restore", refused)
    with pytest.raises(ConfigError, match="refused"):
        trainer.train(tiny(), tmp_path / "run")
    (thread,) = threads
    thread.join(timeout=60)
    assert not thread.is_alive()


@pytest.fixture
def one_device(monkeypatch):
    """For what has nothing to do with devices, because it compiles sooner."""
    devices = jax.local_devices()[:1]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    monkeypatch.setattr(jax, "device_count", lambda: 1)


def nan_at(step):
    def hook(now, batch):
        image = batch["image"] / np.float32(127.5) - 1
        image[0] = np.nan if now == step else image[0]
        return batch | {"image": image}

    return hook


@pytest.fixture
def floats(monkeypatch):
    """The step is compiled for the images that `nan_at` makes, and for no others."""
    abstract = compiled_step._abstract_batch

    def of_floats(*args):
        batch = abstract(*args)
        return batch | {"image": jax.ShapeDtypeStruct(batch["image"].shape, np.float32)}

    monkeypatch.setattr(compiled_step, "_abstract_batch", of_floats)


@pytest.mark.usefixtures("floats")
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    before_batch(monkeypatch, nan_at(6))
    config = tiny(log_every=100)
    with pytest.raises(FloatingPointError) as error:
        trainer.train(config, tmp_path)
    message = str(error.value)
    assert message.startswith("step 6: loss nan")
    assert re.search(r"task losses \[.*nan.*\]; last", message)
    assert f"last good checkpoint: step 4 in {tmp_path / 'checkpoints'}" in message
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["2", "4"]


@pytest.mark.usefixtures("floats")
def test_a_step_that_is_not_finite_can_be_skipped(tmp_path, monkeypatch, caplog):
    config = tiny(optimizer__nonfinite="skip", log_every=2, checkpoint__every=1)
    config.num_steps = 5
    before_batch(monkeypatch, nan_at(6))
    before = jax.device_get(trainer.train(config, tmp_path))
    config.num_steps = 6
    after = trainer.train(config, tmp_path)
    assert int(after.step) == 6
    assert_same_state(after._replace(step=before.step), before)
    (warning,) = [record.message for record in caplog.records if "skipped" in record.message]
    assert re.match(r"step 6: loss nan, gradient norm nan; task losses \[.*nan.*\]", warning)

    config.num_steps = 8
    state = trainer.train(config, tmp_path)
    kernel = lambda state: state.params["Dense_0"]["kernel"]
    assert not np.array_equal(kernel(state), kernel(before))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    rows = {row["step"]: row for row in lines(tmp_path)}
    # Step 5 was logged when the first run ended, so the skipped one is alone in its interval.
    assert [rows[step]["skipped_steps"] for step in (4, 5, 6, 8)] == [0, 0, 1, 0]
    assert rows[6]["loss"] is None and rows[8]["loss"] > 0


@pytest.mark.usefixtures("floats")
def test_skipping_ends_where_it_does_not_help(tmp_path, monkeypatch):
    bad = {"steps": range(3, 13)}
    hook = lambda step, batch: nan_at(step if step in bad["steps"] else 0)(step, batch)
    before_batch(monkeypatch, hook)
    config = tiny(num_steps=30, checkpoint__every=100)
    with pytest.raises(FloatingPointError, match="step 3: loss nan"):
        trainer.train(config, tmp_path / "run")
    # A run that has stopped may go on and skip.
    config.optimizer.nonfinite = "skip"
    with pytest.raises(FloatingPointError, match="step 12: loss nan"):
        trainer.train(config, tmp_path / "run")
    bad["steps"] = [*range(3, 12), *range(13, 20)]
    assert trainer.train(config, tmp_path / "run").step == 30


def test_a_workdir_has_one_trainer(tmp_path, monkeypatch):
    refused = []

    def hook(step, batch):
        if step == 3:
            with pytest.raises(
                InUseError,
                match=rf"process {os.getpid()} on .* is training in .* remove .*/\.lock",
            ):
                trainer.train(tiny(), tmp_path)
            refused.append(step)
        return batch

    before_batch(monkeypatch, hook)
    assert trainer.train(tiny(), tmp_path).step == STEPS
    assert refused == [3]
    assert [row["step"] for row in lines(tmp_path)] == list(range(1, STEPS + 1))


def test_a_workdir_can_be_moved(finished, tmp_path):
    config, whole, expected = finished
    trainer.train(tiny(num_steps=4), tmp_path / "here")
    (tmp_path / "far").mkdir()
    (tmp_path / "here").rename(tmp_path / "far" / "there")
    assert_same_state(trainer.train(config, tmp_path / "far" / "there"), expected)
    assert lines(tmp_path / "far" / "there") == lines(whole)


@pytest.mark.usefixtures("floats")
def test_the_message_says_that_there_is_no_good_checkpoint(tmp_path, monkeypatch):
    before_batch(monkeypatch, nan_at(2))
    with pytest.raises(FloatingPointError, match=r"step 2: .*last good checkpoint: none yet"):
        trainer.train(tiny(), tmp_path)
    assert checkpoint.checkpoint_steps(tmp_path / "checkpoints") == []


@pytest.mark.usefixtures("one_device")
def test_a_state_that_is_not_finite_is_not_saved(tmp_path, monkeypatch):
    """The loss and gradient of step 4 are finite; what the optimizer makes of them is not."""
    build = experiment.build_optimizer
    spoil = optax.scale_by_schedule(lambda count: jnp.where(count == 3, jnp.nan, 1.0))

    def spoiled(*args):
        optimizer = build(*args)
        return optimizer._replace(transformation=optax.chain(optimizer.transformation, spoil))

    monkeypatch.setattr(experiment, "build_optimizer", spoiled)
    # Steps are shared between runs of one config: neither an earlier one here, nor this one there.
    for module, name in (
        (compiled_step, "_training_step"),
        (state_layout, "_first_state"),
        (state_layout, "_layout"),
    ):
        monkeypatch.setattr(module, name, getattr(module, name).__wrapped__)
    with pytest.raises(FloatingPointError, match="last good checkpoint: step 2 "):
        trainer.train(tiny(), tmp_path)
    assert checkpoint.checkpoint_steps(tmp_path / "checkpoints") == [2]


def with_another_copy(array, number):
    """An array that the devices hold whole, whose copy on one device is another."""
    copies = [shard.data for shard in array.addressable_shards]
    copies[number] = copies[number] + 1
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, copies)


def test_a_state_whose_copies_differ_is_not_saved(tmp_path, monkeypatch):
    start = compiled_step.start_compiling

    def starting(*args):
        take_step = start(*args)

        def take(state, batch):
            state, metrics = take_step(state, batch)
            # Of the step that is saved: the next one makes all copies anew, from their parts.
            if int(state.step) == 4:
                first, *others = jax.tree.leaves(state.params)
                leaves = [with_another_copy(first, 5), *others]
                state = state._replace(
                    params=jax.tree.unflatten(jax.tree.structure(state.params), leaves)
                )
            return state, metrics

        return take

    monkeypatch.setattr(compiled_step, "start_compiling", starting)
    message = (
        r"same: the state after step 4: \d+ in devices 0-4, 6-7, \d+ in device 5. One of them "
    )
    with pytest.raises(DisagreementError, match=message):
        trainer.train(tiny(), tmp_path)
    assert checkpoint.checkpoint_steps(tmp_path / "checkpoints") == [2]


def test_a_failing_save_stops_the_run_with_the_reason(tmp_path, monkeypatch):
    commit = checkpoint.Checkpointer._commit

    def failing(self, partial, step, *rest):
        if step == 4:
            raise OSError(28, "No space left on device")
        commit(self, partial, step, *rest)

    monkeypatch.setattr(checkpoint.Checkpointer, "_commit", failing)
    with pytest.raises(
        checkpoint.CheckpointError, match=r"No space left.*newest complete checkpoint: step 2"
    ):
        trainer.train(tiny(), tmp_path)


def test_no_state_is_made_whole_while_another_is_written(tmp_path, monkeypatch):
    order = []

    def slow(*_):
        time.sleep(0.2)
        order.append("written")

    monkeypatch.setattr(checkpoint.Checkpointer, "_commit", slow)
    whole = lambda state: (order.append("whole"), state)[1]
    state = TrainState(*[jnp.ones(2)] * 5)
    with contextlib.closing(checkpoint.Checkpointer(tmp_path)) as checkpointer:
        saves = hooks.Saves(checkpointer, {}, dict, None, whole)
        saves.save(1, state)
        saves.save(2, state)
        saves.whole(state)
    assert order == ["whole", "written", "whole", "written", "whole"]


def test_a_source_that_fails_does_not_lose_the_last_checkpoint(finished, tmp_path, monkeypatch):
    def hook(step, batch):
        if step == 5:
            raise OSError("cannot read image")
        return batch

    with monkeypatch.context() as patch:
        before_batch(patch, hook)
        with pytest.raises(OSError, match="cannot read image"):
            trainer.train(tiny(), tmp_path)
    assert checkpoint.checkpoint_steps(tmp_path / "checkpoints") == [2, 4]
    assert_same_state(trainer.train(tiny(), tmp_path), finished[2])


def test_the_log_is_the_mean_of_its_interval_and_grids_are_drawn(finished, tmp_path):
    _, whole, expected = finished
    config = tiny(log_every=3, sample__every=4, checkpoint__every=100)
    assert_same_state(trainer.train(config, tmp_path), expected)
    rows, every = lines(tmp_path), lines(whole)
    assert [row["step"] for row in rows] == [3, 6, 8]
    for row, first in zip(rows, (0, 3, 6), strict=True):
        inside = every[first : row["step"]]
        assert row["loss"] == pytest.approx(np.mean([step["loss"] for step in inside]))
    assert checkpoint.checkpoint_steps(tmp_path / "checkpoints") == [STEPS]
    assert sorted(os.listdir(tmp_path / "samples")) == ["00000004.png", "00000008.png"]


IMPOSSIBLE = {
    "data.batch_size = 20 must be divisible by the number of devices, 8": {"data__batch_size": 20},
    "data.batch_size = 16: .* 24 = 1 microbatches x .*8 devices and 3 tasks.: for example 24": {
        "clusters__k": 3
    },
    "data.batch_size = 16: .* 32 = 4 microbatches x .*8 devices and 2 tasks.: for example 32": {
        "optimizer__microbatches": 4
    },
    "the images of .*digits.* are 8x8": {"data__image_size": 16},
    "digits has no split 'validation'": {"data__split": "validation"},
    "config.clusters.k = 60 must not exceed config.process.timesteps = 50": {"clusters__k": 60},
    "config.clusters.name = 'random': .* need tasks that are intervals": {
        "clusters__name": "random",
        "method__suppress": 5.0,
    },
    "config.method.pike = 0.5 chooses the tasks": {
        "method__pike": 0.5,
        "method__draw": "uniform",
    },
    "config.method.curriculum_steps = 9 needs all tasks": {
        "clusters__specialist": 1,
        "method__curriculum_steps": 9,
    },
}


@pytest.mark.parametrize("message", IMPOSSIBLE)
def test_what_cannot_work_is_said_before_anything_is_compiled(message, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "init_params", lambda *_: pytest.fail("came too late"))
    with pytest.raises(ConfigError, match=message):
        trainer.train(tiny(**IMPOSSIBLE[message]), tmp_path)
    assert os.listdir(tmp_path) == [], "a workdir that says it is a run of this config"


def test_the_state_of_a_step_is_restored(finished, tmp_path):
    config, workdir, expected = finished
    setup = experiment.build(config, channels=1, num_classes=10)
    step, state = workdir_lib.restore(config, setup, workdir)
    assert step == STEPS
    assert_same_state(state, expected)
    step, state = workdir_lib.restore(config, setup, workdir, 6)
    assert step == int(state.step) == 6
    assert workdir_lib.restore(config, setup, tmp_path) is None


# SNR clusters that are not evenly spaced, and eight devices that can hold them.
FOUR = {"clusters__k": 4, "data__batch_size": 32}


def save_affinity(path, timesteps, width):
    """Two blocks: timesteps below 20 are alike, and so are the others."""
    block = np.asarray(timesteps) >= 20
    with path.open("wb") as file:
        affinity.save(file, np.where(block == block[:, None], 1.0, 0.1) ** width, timesteps, 50)


@pytest.mark.parametrize("n", [50, 11])
def test_gradient_clusters_come_from_the_affinity_even_of_a_coarser_grid(tmp_path, n):
    path = tmp_path / "affinity.npz"
    save_affinity(path, affinity.timestep_grid(50, n), 1)
    config = tiny("nash,gradient", clusters__affinity=str(path), num_steps=2)
    trainer.train(config, tmp_path / "run")
    facts = workdir_lib.load_facts(tmp_path / "run")
    # Between grid points the border is anywhere.
    assert facts["boundaries"][::2] == [0, 50]
    assert facts["boundaries"][1] == 20 if n == 50 else 15 < facts["boundaries"][1] <= 25
    # The run keeps its clusters, whatever becomes of the file.
    path.unlink()
    config.num_steps = 3
    assert trainer.train(config, tmp_path / "run").step == 3
    assert workdir_lib.load_facts(tmp_path / "run") == facts


def test_a_missing_affinity_is_named_before_anything_is_made(tmp_path):
    path = str(tmp_path / "affinity.npz")
    with pytest.raises(ConfigError, match=r"config.clusters: .*affinity.npz"):
        trainer.train(tiny("nash,gradient", clusters__affinity=path), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_own_clusters_keep_their_order_when_a_run_goes_on(tmp_path, monkeypatch):
    (tmp_path / "own_clusters.py").write_text(
        "import numpy as np\n"
        "from ant_jax.tasks.clusterings import Clusters\n"
        "def reverse(log_snr: np.ndarray, k: int) -> Clusters:\n"
        "    n = len(log_snr)\n"
        "    return Clusters(np.linspace(0, n, k + 1).astype(int), np.arange(n)[::-1])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = tiny()
    config_lib.update(config, {"clusters.name": "own_clusters:reverse"})
    new = experiment.build(config, 1, 10).clusters
    resumed = experiment.build(config, 1, 10, new.boundaries.tolist()).clusters
    np.testing.assert_array_equal(resumed.order, new.order)
    assert new.order[0] > new.order[-1]


def test_a_specialist_trains_on_one_cluster(tmp_path):
    config = tiny("vanilla,timestep", clusters__specialist=1, num_steps=2, evaluation__features="")
    trainer.train(config, tmp_path)
    (first, second) = lines(tmp_path)
    assert workdir_lib.load_facts(tmp_path)["boundaries"] == [25, 50]
    assert first["counts"] == second["counts"] == [16]
    result = evaluate.evaluate(config, tmp_path)
    assert result["validation_loss"] > 0 and "frechet_distance" not in result


@pytest.mark.parametrize(
    "changes",
    [
        {
            **{"process.name": "flow", "process.density": "logit_normal"},
            **{"clusters.name": "timestep", "method.suppress": 5.0, "method.curriculum_steps": 2},
        },
        {
            **{"process.name": "edm", "sampler.name": "heun"},
            **{"method.weight_by_interval_size": True, "method.level_uncertainty": 0.01},
            **{"method.pike": 100.0, "method.pike_every": 1},
        },
    ],
    ids=["flow", "edm"],
)
def test_a_run_of_continuous_levels(changes, tmp_path, monkeypatch):
    """Trained, interrupted, resumed, sampled and measured as one of timesteps."""
    process = changes.pop("process.name")
    config = digits.get_config("nash")
    config_lib.update(config, {"process.name": process})
    rest = {name: value for name, value in TINY.items() if name != "process.timesteps"}
    config_lib.update(config, rest | {"num_steps": 4} | changes)
    whole = trainer.train(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        before_batch(patch, signal_at(2, signal.SIGTERM))
        trainer.train(config, tmp_path / "stopped")
    assert_same_state(trainer.train(config, tmp_path / "stopped"), whole)
    assert lines(tmp_path / "stopped") == lines(tmp_path / "whole")
    low, middle, high = workdir_lib.load_facts(tmp_path / "whole")["boundaries"]
    assert (low, high) == (0, 1) and 0 < middle < 1
    if process == "flow":
        # The median of the density.
        np.testing.assert_allclose(middle, 0.5)
    counts = [row["counts"] for row in lines(tmp_path / "whole")]
    if process == "flow":
        assert counts == [[0, 16]] * 2 + [[8, 8]] * 2
    else:
        # The shares change.
        assert counts[0] == [8, 8] != counts[-1] and all(sum(each) == 16 for each in counts)
    figures = evaluate.evaluate(config, tmp_path / "whole")
    assert figures["validation_loss"] > 0 and figures["frechet_distance"] > 0
    assert figures["nfe"] == (2 if process == "flow" else 3)


def test_random_clusters_need_timesteps(tmp_path):
    config = digits.get_config("nash,random")
    config_lib.update(config, {"process.name": "flow"})
    with pytest.raises(ConfigError, match=r"clusters.name = 'random' .* continuous levels"):
        trainer.train(config, tmp_path)


def test_damaged_images_of_a_folder_are_counted_or_named(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for i in range(16):
        path = tmp_path / "images" / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:40])
    settings = {
        "num_steps": 4,
        "log_every": 2,
        "data__name": "folder",
        "data__dir": str(tmp_path / "images"),
        "data__split": "",
        "data__crop": "center",
        "evaluation__features": "",
    }
    trainer.train(tiny(**settings, data__replace_unreadable=True), tmp_path / "replaced")
    # Every step sees each of the 16 images once.
    assert [row["replaced_images"] for row in lines(tmp_path / "replaced")] == [2, 2]
    with monkeypatch.context() as patch:
        # As if a second process had found three more.
        patch.setattr(trainer.processes, "all_gather", lambda mine: [mine, (mine or 0) + 3])
        patch.setattr(hooks, "check_replicas", lambda *_: None)
        trainer.train(tiny(**settings, data__replace_unreadable=True), tmp_path / "two")
    assert [row["replaced_images"] for row in lines(tmp_path / "two")] == [2 + 5, 2 + 5]
    with pytest.raises(RuntimeError, match=r"class1/15\.png: "):
        trainer.train(tiny(**settings), tmp_path / "named")


@pytest.mark.usefixtures("one_device")
def test_runs_of_every_control_differ(tmp_path):
    """Each setting reaches the step: none of these gradients is that of another."""
    norms = {}
    for name, settings in {
        "plain": {},
        "shares": {"method__weight_by_interval_size": True},
        "weights": {"method__weights": (0.1, 0.2, 0.3, 0.4)},
        "random": {"clusters__name": "random"},
    }.items():
        workdir = tmp_path / name
        trainer.train(tiny("linear", num_steps=1, **FOUR, **settings), workdir)
        norms[name] = lines(workdir)[0]["grad_norm"]
    assert len(set(norms.values())) == len(norms)
    cosines = tiny("linear", num_steps=1, method__cosines=True, **FOUR)
    trainer.train(cosines, tmp_path / "cosines")
    (row,) = lines(tmp_path / "cosines")
    np.testing.assert_allclose(row["grad_norm"], norms["plain"], rtol=1e-5)
    assert len(row["cosines"]) == 6 and row["conflict"] == (min(row["cosines"]) < 0)


def test_a_shared_step_is_each_run_s_own(tmp_path, monkeypatch):
    """Seed (of PCGrad's order too), learning rate and clusters are not those of the first run."""
    first = tiny("pcgrad", num_steps=3, **FOUR)
    second = tiny(
        "pcgrad,timestep",
        num_steps=3,
        seed=7,
        optimizer__learning_rate=1e-2,
        method__weight_by_interval_size=True,
        **FOUR,
    )
    monkeypatch.setattr(compiled_step, "_training_step", compiled_step._training_step.__wrapped__)
    alone = trainer.train(second, tmp_path / "alone")
    counted = functools.cache(compiled_step._training_step)
    monkeypatch.setattr(compiled_step, "_training_step", counted)
    other = trainer.train(first, tmp_path / "first")
    shared = trainer.train(second, tmp_path / "shared")
    assert compiled_step._training_step.cache_info().misses == 1
    assert_same_state(shared, alone)
    kernels = [np.asarray(state.params["Dense_0"]["kernel"]) for state in (shared, other)]
    assert np.abs(kernels[0] - kernels[1]).max() > 0.01


class Killed(BaseException):
    """Ends a run without its being asked, as far as that can be in one process."""


def kill_at(*steps):
    def hook(now, batch):
        if now in steps:
            raise Killed
        return batch

    return hook


def odd_batches(then=lambda step, batch: batch):
    """Batches of which that of step 4 is not finite and each has replaced as many as its step."""

    def hook(step, batch):
        batch = nan_at(4)(step, then(step, batch))
        return batch | {"replaced": np.full(1, step)}

    return hook


@pytest.mark.usefixtures("floats")
@pytest.mark.parametrize("log_every", [3, 100])
def test_metrics_do_not_depend_on_where_a_run_was_interrupted(log_every, tmp_path, monkeypatch):
    settings = {"optimizer__nonfinite": "skip", "data__replace_unreadable": True}
    config = tiny(log_every=log_every, **settings)

    def life(folder, then):
        with monkeypatch.context() as patch:
            before_batch(patch, odd_batches(then))
            with contextlib.suppress(Killed):
                return trainer.train(config, tmp_path / folder)

    whole = life("whole", lambda step, batch: batch)
    assert life("parts", kill_at(4)) is None
    life("parts", signal_at(5, signal.SIGTERM))
    assert life("parts", kill_at(8)) is None
    assert_same_state(life("parts", lambda step, batch: batch), whole)
    rows = lines(tmp_path / "parts")
    assert rows == lines(tmp_path / "whole")
    assert [row["step"] for row in rows] == ([3, 6, 8] if log_every == 3 else [8])
    assert sum(row["skipped_steps"] for row in rows) == 1
    assert sum(row["replaced_images"] for row in rows) == sum(range(9))


def test_a_picture_that_a_kill_has_cost_is_drawn_at_the_next_start(tmp_path, monkeypatch):
    config = tiny(sample__every=4, sample__num=4, checkpoint__keep=1)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = trainer.train(config, whole)

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(hooks.Pictures, "draw", killed)
        # The same instant costs the pruning.
        patch.setattr(checkpoint.Checkpointer, "prune", lambda *_: None)
        with pytest.raises(Killed):
            trainer.train(config, parts)
    assert checkpoint.checkpoint_steps(parts / "checkpoints") == [2, 4]
    before_batch(monkeypatch, kill_at(6))
    with pytest.raises(Killed):
        trainer.train(config, parts)
    assert os.listdir(parts / "samples") == ["00000004.png"]
    assert checkpoint.checkpoint_steps(parts / "checkpoints") == [4]
    monkeypatch.undo()
    use_small_model(monkeypatch)
    assert_same_state(trainer.train(config, parts), expected)
    (parts / "samples" / "00000008.png").unlink()
    trainer.train(config, parts)
    for name in ("00000004.png", "00000008.png"):
        assert (parts / "samples" / name).read_bytes() == (whole / "samples" / name).read_bytes()


def tree(folder):
    """Every file with its content, and every folder."""
    return {
        path: path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
        if path.name != ".lock"
    }


@pytest.fixture
def copied(finished, tmp_path):
    """A workdir of a finished run that a test may change, and the state."""
    return Path(shutil.copytree(finished[1], tmp_path / "run")), finished[2]


def spoil_all(workdir):
    for path in workdir.glob("checkpoints/*/manifest.ocdbt"):
        path.unlink()


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


REFUSED = {
    "has another config": ({"seed": 1}, lambda workdir: None),
    r"has learned other classes .*gone: '0', .*; new: 'a', 'b'\)": (
        {"data__name": "folder", "data__split": "", "data__crop": "center"},
        lambda workdir: None,
    ),
    "no intact checkpoint is left": ({}, spoil_all),
    r"facts.json is damaged .*: remove it": ({}, lambda w: (w / "facts.json").write_text("{")),
    r"config.json is damaged .*: repair it or bring it back": (
        {},
        lambda w: [(w / "config.json").write_text("["), shutil.rmtree(w / "checkpoints")],
    ),
    r"has no checkpoint, but the run had one, of step 8: bring it back": (
        {},
        lambda w: shutil.rmtree(w / "checkpoints"),
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_start_that_is_refused_changes_nothing(message, copied, tmp_path, monkeypatch):
    workdir, _ = copied
    settings, spoil = REFUSED[message]
    if settings.get("data__name") == "folder":
        # In all else this is the run.
        monkeypatch.setattr(config_lib, "check_same", lambda there, now, name: None)
        settings |= {"data__dir": str(class_folders(tmp_path / "images", "ab"))}
        settings |= {"evaluation__features": ""}
    spoil(workdir)
    before = tree(workdir)
    with pytest.raises((ConfigError, checkpoint.CheckpointError), match=message):
        trainer.train(tiny(**settings), workdir)
    assert tree(workdir) == before


def test_a_start_that_is_refused_at_the_end_makes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(state_layout, "new_state", refused)
    (tmp_path / "there").mkdir()
    for workdir in (tmp_path / "runs" / "a", tmp_path / "there"):
        with pytest.raises(ConfigError, match="refused"):
            trainer.train(tiny(), workdir)
    assert os.listdir(tmp_path) == ["there"] and os.listdir(tmp_path / "there") == []


def class_folders(root, names, each=2):
    rng = np.random.default_rng(0)
    for name in names:
        for i in range(each):
            path = root / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8)).save(path)
    return root


CHANGED_CLASSES = {
    "abc": r"gone: 'd'\)",
    "abcde": r"new: 'e'\)",
    "abcx": r"gone: 'd'; new: 'x'\)",
    "0abc": r"gone: 'd'; new: '0'\)",
}


@pytest.mark.parametrize("names", CHANGED_CLASSES)
def test_other_classes_are_named_and_refused(names, tmp_path):
    before = data.folder(dir=class_folders(tmp_path / "then", "abcd")).facts()
    now = data.folder(dir=class_folders(tmp_path / "now", names))
    with pytest.raises(ConfigError, match=CHANGED_CLASSES[names]) as error:
        compatibility.check_data(before, now, Path("w"))
    assert "labels would mean something else. Give the folders" in str(error.value)
    # As another version may have sorted them.
    swapped = before | {"classes": ["b", "a", "c", "d"]}
    with pytest.raises(ConfigError, match=r"has \(another order\): labels"):
        compatibility.check_data(swapped, data.folder(dir=tmp_path / "then"), Path("w"))


def test_other_numbers_of_images_are_said(tmp_path, caplog):
    source = data.folder(dir=class_folders(tmp_path, "ab"))
    before = source.facts()
    assert before["classes"] == ["a", "b"] and before["num_images"] == 4
    compatibility.check_data(before, source, Path("w"))
    # Facts of an older version.
    compatibility.check_data({"num_classes": 2, "channels": 3}, source, Path("w"))
    assert not caplog.text
    (tmp_path / "a" / "0.png").unlink()
    compatibility.check_data(before, data.folder(dir=tmp_path), Path("w"))
    assert f"{tmp_path} has 3 images now, and had 4 when the run in w last trained" in caplog.text


def test_other_images_are_said_where_all_counts_are_equal(tmp_path, caplog):
    images = np.zeros((9, 4, 4, 1), np.uint8)
    before = data.ArraySource(images).facts()
    compatibility.check_data(before, data.ArraySource(images.copy()), Path("w"))
    there = data.folder(dir=class_folders(tmp_path / "there", "ab"))
    moved = data.folder(dir=shutil.copytree(there.name, tmp_path / "moved"))
    compatibility.check_data(there.facts(), moved, Path("w"))
    # A user's source may not have a fingerprint.
    without = {name: value for name, value in before.items() if name != "fingerprint"}
    other = types.SimpleNamespace(name="mine", facts=lambda: without)
    compatibility.check_data(before, other, Path("w"))
    assert not caplog.text
    compatibility.check_data(before, data.ArraySource(images + 1), Path("w"))
    (tmp_path / "moved" / "a" / "0.png").write_bytes(b"another")
    compatibility.check_data(there.facts(), moved, Path("w"))
    told = [line.partition(" than those that the run in w has")[0] for line in caplog.messages]
    assert told == ["arrays has other images", f"{tmp_path / 'moved'} has other images"]


def test_a_run_goes_on_from_its_checkpoints_alone(finished, copied, tmp_path, caplog):
    config, whole, expected = finished
    workdir, _ = copied
    shutil.rmtree(workdir / "checkpoints" / str(STEPS))
    for name in ("config.json", "facts.json", "metrics.jsonl"):
        (workdir / name).unlink()
    with pytest.raises(ConfigError, match=r"config.seed: 0 there, 1 now"):
        trainer.train(tiny(seed=1), workdir)
    assert workdir_lib.load_config(workdir) == config
    assert_same_state(trainer.train(config, workdir), expected)
    assert workdir_lib.load_config(workdir) == config
    assert (workdir / "facts.json").read_bytes() == (whole / "facts.json").read_bytes()
    assert lines(workdir) == lines(whole)[6:]
    assert (
        "metrics.jsonl is not as it was written: 0 lines up to step 6 instead of 6" in caplog.text
    )


def test_what_was_altered_beside_the_checkpoints_is_not_trained_on(copied):
    workdir, expected = copied
    shutil.rmtree(workdir / "checkpoints" / str(STEPS))
    edit_json(workdir / "facts.json", boundaries=[0, 30, 50], num_classes=9, classes=["x"])
    assert workdir_lib.load_facts(workdir)["num_classes"] == 10
    assert_same_state(trainer.train(tiny(), workdir), expected)
    # Without --config the one of config.json is meant.
    edit_json(workdir / "config.json", seed=1)
    with pytest.raises(ConfigError, match=r"config.seed: 0 there, 1 now"):
        trainer.train(workdir_lib.load_config(workdir), workdir)
    for mode in (sample.sample, evaluate.evaluate):
        with pytest.raises(ConfigError, match=r"config.seed: 0 there, 1 now"):
            mode(workdir_lib.load_config(workdir), workdir)


def as_of_an_older_version(workdir):
    (workdir / "checkpoints.json").unlink()
    facts = json.loads((workdir / "facts.json").read_text())
    kept = {name: facts[name] for name in ("channels", "num_classes", "boundaries")}
    (workdir / "facts.json").write_text(json.dumps(kept))
    for path in (workdir / "checkpoints").iterdir():
        (path / "run.json").unlink(missing_ok=True)
        sums = json.loads((path / "checksums.json").read_text())
        sums.pop("run.json", None)
        (path / "checksums.json").write_text(json.dumps(sums))


def test_a_run_of_an_older_version_goes_on(finished, copied):
    config, whole, expected = finished
    workdir, _ = copied
    as_of_an_older_version(workdir)
    shutil.rmtree(workdir / "checkpoints" / str(STEPS))
    edit_json(workdir / "facts.json", boundaries=[0, 30])
    with pytest.raises(ConfigError, match=r"boundaries \[0, 30\] of facts.json are not those of"):
        trainer.train(config, workdir)
    boundaries = json.loads((whole / "facts.json").read_text())["boundaries"]
    edit_json(workdir / "facts.json", boundaries=boundaries)
    assert_same_state(trainer.train(config, workdir), expected)
    assert lines(workdir) == lines(whole)
    as_of_an_older_version(workdir)
    (workdir / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config.json is damaged .*: repair it or bring it back"):
        trainer.train(config, workdir)
    (workdir / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"has checkpoints and no config.json: bring it back"):
        trainer.train(config, workdir)


def test_a_run_keeps_to_the_source_it_was_given(finished, tmp_path):
    config, _, expected = finished
    source = data.digits("train")
    config.num_steps = 4
    trainer.train(config, tmp_path, source=source)
    kind = f"{type(source).__module__}.{type(source).__qualname__}"
    assert json.loads((tmp_path / "config.json").read_text())["given"] == {"source": kind}
    assert workdir_lib.load_config(tmp_path) == config
    config.num_steps = STEPS
    named = f"was given source = {kind} in place of .* now nothing is given: call it from Python"
    with pytest.raises(ConfigError, match=f"{named} with source=\\.\\.\\., or choose another"):
        trainer.train(config, tmp_path)
    # Without what is in the checkpoints the same.
    shutil.copytree(tmp_path, tmp_path / "early", ignore=shutil.ignore_patterns("checkpoints*"))
    with pytest.raises(ConfigError, match=named):
        trainer.train(config, tmp_path / "early")
    assert_same_state(trainer.train(config, tmp_path, source=source), expected)
    assert sample.sample(config, tmp_path).exists()


def test_a_run_of_the_config_alone_is_given_nothing(copied):
    workdir, _ = copied
    with pytest.raises(ConfigError, match=r"was given nothing in place of .*: leave that out, or"):
        trainer.train(tiny(), workdir, source=data.digits("train"))
    assert "given" not in json.loads((workdir / "config.json").read_text())


def test_what_is_given_trains_in_place_of_what_the_config_names(tmp_path):
    config = tiny("nash", num_steps=2, evaluation__features="", evaluation__split="test")
    fixed = mtl.Weighting(
        tuple, lambda stats, state: (jnp.array([0.25, 2.0]), state), 2, frozenset()
    )
    process = config_lib.build_process(tiny(process__schedule="linear", process__timesteps=50))
    given = {"model": Model(num_classes=10), "process": process, "weighting": fixed}
    state = trainer.train(config, tmp_path, **given)
    assert set(state.params) == {"Dense_0", "Dense_1"}
    # Clusters by the log-SNR of the process that was given.
    facts = json.loads((tmp_path / "facts.json").read_text())
    theirs = experiment.build_clusters(config, process).boundaries.tolist()
    ours = experiment.build_clusters(config, config_lib.build_process(config)).boundaries.tolist()
    assert facts["boundaries"] == theirs != ours
    rows = lines(tmp_path)
    assert [row["weights"] for row in rows] == [[0.25, 2.0]] * 2
    assert "cosines" not in rows[0]
    config.num_steps = 3
    assert int(trainer.train(config, tmp_path, **given).step) == 3
    assert sample.sample(config, str(tmp_path), **given).exists()
    assert np.isfinite(evaluate.evaluate(config, str(tmp_path), **given)["validation_loss"])
    with pytest.raises(ConfigError, match=r"was given model = .*Model, process = ant_jax"):
        sample.sample(config, tmp_path)
    with pytest.raises(ConfigError, match=r"was given model = .*name it in the config, "):
        export.export(config, tmp_path)
    with pytest.raises(ConfigError, match=r"model= must be a Module, got .*: call it, Model\(\)"):
        trainer.train(tiny(), tmp_path / "class", model=Model)
    with pytest.raises(ConfigError, match=r"source= must be a data.Source.*ArraySource"):
        trainer.train(tiny(), tmp_path / "array", source=np.zeros((4, 8, 8, 1), np.uint8))
    with pytest.raises(ConfigError, match=r"given is for 2 tasks, and config.clusters.k = 4"):
        trainer.train(tiny(clusters__k=4), tmp_path / "four", weighting=fixed)


def test_samples_are_not_compared_with_other_images_than_those_that_were_given(tmp_path):
    config = tiny(num_steps=1)
    trainer.train(config, tmp_path, source=data.digits("train"))
    with pytest.raises(ConfigError, match=r"images that were given from Python, .* set "):
        evaluate.evaluate(config, tmp_path)


WRONG = ["", "{", "[]", "3", "null", '"x"', "NaN", "[" * 9999, b"\xff\xfe"]


@pytest.mark.parametrize("name", ["config.json", "facts.json"])
def test_what_is_damaged_is_one_line(name, copied):
    workdir, _ = copied
    path = workdir / name
    content = path.read_bytes()
    wrong = [each if isinstance(each, bytes) else each.encode() for each in WRONG]
    wrong += [content[:-3], b"\0" * len(content)]
    if name == "facts.json":
        facts = json.loads(content)
        odd = (None, 1.5, [[]], {}, True, [1, "x"], [None])
        wrong += [json.dumps(facts | {key: value}) for key in facts for value in odd]
        wrong = [each if isinstance(each, bytes) else each.encode() for each in wrong]
    read = workdir_lib.load_config if name == "config.json" else workdir_lib.recorded
    for each in wrong:
        path.write_bytes(each)
        with pytest.raises(ConfigError, match=f"{name} is damaged .*: remove it") as error:
            read(workdir)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("replaced", [False, True])
def test_a_workdir_that_is_removed_ends_its_run(replaced, tmp_path, monkeypatch):
    """Whatever lies in its place by then gets nothing of it."""
    workdir = tmp_path / "run"

    def hook(step, batch):
        if step == 4:
            while not (workdir / "checkpoints.json").exists():
                time.sleep(0.01)
            workdir.rename(tmp_path / "removed")
            if replaced:
                workdir.mkdir()
                (workdir / ".lock").write_text("process 1 on another machine")
        return batch

    before_batch(monkeypatch, hook)
    with pytest.raises(checkpoint.CheckpointError, match=f"{workdir} was removed or replaced"):
        trainer.train(tiny(sample__every=4, sample__num=4), workdir)
    assert (os.listdir(workdir) == [".lock"]) if replaced else not workdir.exists()
    assert checkpoint.checkpoint_steps(tmp_path / "removed" / "checkpoints") == [2]


def test_a_run_does_not_go_on_from_a_checkpoint_of_another(copied, tmp_path, caplog):
    workdir, _ = copied
    other = tmp_path / "other"
    trainer.train(tiny(num_steps=4), other)
    theirs = workdir / "checkpoints" / "8"
    theirs.rename(other / "checkpoints" / "8")
    assert trainer.train(tiny(num_steps=4), other).step == 4
    assert f"{other}/checkpoints/8 is of another run than {other}/facts.json" in caplog.text
    # As of a killed run before its first checkpoint.
    for step in (2, 4):
        shutil.rmtree(other / "checkpoints" / str(step))
    with pytest.raises(checkpoint.CheckpointError, match="is of another run"):
        trainer.train(tiny(num_steps=4), other)


def test_a_picture_that_is_not_finite_is_said_and_does_not_end_training(tmp_path, caplog):
    def samples(params):
        raise FloatingPointError("8 of 8 samples have numbers that are not finite")
        yield

    hooks.Pictures(tmp_path, lambda step: True, samples, None, lambda: None).draw(7, {})
    assert "no picture of step 7: 8 of 8 samples have numbers that are not finite" in caplog.text
    assert list(tmp_path.iterdir()) == []
