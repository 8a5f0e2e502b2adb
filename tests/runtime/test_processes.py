import json
import socket
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import tiny

from ant_jax import cli, compiled_step, evaluate, evaluation_in_training, hooks
from ant_jax import config as config_lib
from ant_jax.config import ConfigError
from ant_jax.runtime import connection, processes
from ant_jax.runtime import devices as devices_lib
from ant_jax.runtime.lock import InUseError
from configs import digits


class Store:
    """Like JAX's key-value store: a process can wait for a key that another sets."""

    def __init__(self):
        self.values, self.changed, self.most = {}, threading.Condition(), 0

    def key_value_set(self, name, value):
        with self.changed:
            assert name not in self.values
            self.values[name] = value
            self.most = max(self.most, len(self.values))
            self.changed.notify_all()

    def blocking_key_value_get(self, name, milliseconds):
        with self.changed:
            if not self.changed.wait_for(lambda: name in self.values, milliseconds / 1000):
                raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")
            return self.values[name]

    def key_value_delete(self, name):
        with self.changed:
            for each in [each for each in self.values if (each + "/").startswith(name + "/")]:
                del self.values[each]


@pytest.fixture
def together(monkeypatch):
    """Runs a function of the process's number in three threads, as if each were a process."""
    store, local = Store(), threading.local()

    class State:
        client = store
        num_processes = 3
        process_id = property(lambda self: local.number)

    monkeypatch.setattr(processes.distributed, "global_state", State())
    monkeypatch.setattr(processes, "_SLICE_MS", 20)

    class Names:
        def __next__(self):
            local.count = getattr(local, "count", 0) + 1
            return local.count

    monkeypatch.setattr(processes, "_names", Names())

    def run(function, never=()):
        """``never``: processes whose function does not return; they are not waited for."""
        results = [None] * 3

        def call(number):
            local.number = number
            try:
                results[number] = function(number)
            except Exception as error:
                results[number] = error

        threads = [threading.Thread(target=call, args=[i], daemon=True) for i in range(3)]
        for thread in threads:
            thread.start()
        for number, thread in enumerate(threads):
            thread.join(0.1 if number in never else 2)
        return results, store

    return run


def test_all_get_what_each_gives_and_nothing_is_left_to_add_up(together):
    def often(number):
        given = [processes.all_gather([i, number]) for i in range(50)]
        processes.barrier()
        return [*given, processes.broadcast_from_first(lambda: "said")]

    results, store = together(often)
    expected = [[[i, 0], [i, 1], [i, 2]] for i in range(50)]
    assert results == [[*expected, "said"]] * 3
    assert store.most < 12


def test_a_process_that_differs_is_named_in_process_0(together):
    facts = lambda number: processes.assert_equal(lambda: {"config.seed": number // 2, "same": "x"})
    # In a run `exit_all_on_error` ends the others; here they wait on.
    results, _ = together(facts, never=(1, 2))
    assert isinstance(results[0], processes.DisagreementError)
    assert str(results[0]) == (
        "the processes of a run must have the same: config.seed: 0 in processes 0-1, 1 in process 2"
    )
    assert results[1:] == [None, None]


def test_a_device_that_differs_is_named_in_process_0(together):
    sums = {0: [7, 7], 1: [7, 7], 2: [7, 8]}
    check = lambda number: processes.assert_replicas_equal("the state", sums[number])
    results, _ = together(check, never=(1, 2))
    assert isinstance(results[0], processes.DisagreementError)
    assert str(results[0]).startswith(
        "the devices of a run (2 in each process) must have the same: the state: "
        "7 in devices 0-4, 8 in device 5. One of them may be faulty: "
    )
    sums[2] = [7, 7]
    assert together(check)[0] == [None] * 3


@pytest.mark.parametrize("error", [ConfigError, FloatingPointError, InUseError])
def test_an_evaluation_that_fails_in_process_0_ends_in_all(error, together, tmp_path, monkeypatch):
    """The images of the split may be gone since the run has begun; training goes on without."""

    def fail(*_):
        raise error("no such images")

    monkeypatch.setattr(evaluate, "_validation", fail)
    config = tiny(evaluation__features="", evaluation__every=3)
    measure = evaluation_in_training.prepare(config, None, tmp_path, "run", {})
    results, _ = together(lambda number: (measure(3, {}), processes.all_gather(number)))
    assert results == [(({}, {}, None), [0, 1, 2])] * 3

    def alone(number):
        with pytest.raises(error, match="no such images"):
            evaluate.measure_step(config, tmp_path, 3, None, {}, {}, None)
        return number

    assert together(alone)[0] == [0, 1, 2]


@pytest.mark.parametrize("there", [0, 1])
def test_all_draw_a_missing_picture_or_none(there, together, tmp_path):
    """The disks of the hosts show a new file at different times."""
    picture = tmp_path / str(there) / "samples" / "00000006.png"
    picture.parent.mkdir(parents=True)
    picture.touch()

    def is_missing(number):
        workdir, is_due = tmp_path / str(number), lambda step: step % 3 == 0
        pictures = hooks.Pictures(workdir, is_due, None, None, None)
        return [pictures.is_missing(step) for step in (0, 6, 7)]

    assert together(is_missing)[0] == [[False, there == 1, False]] * 3


def test_what_one_lacks_and_many_differences_are_told_briefly():
    one = {f"setting{i}": "1" for i in range(12)}
    other = {f"setting{i}": "2" for i in range(11)}
    found = processes.differences([one, other, one, one, other])
    assert len(found) == 12
    assert found[0] == "setting0: 1 in processes 0, 2-3, 2 in processes 1, 4"
    assert found[-1] == "setting11: 1 in processes 0, 2-3, not set in processes 1, 4"
    assert processes.differences([one, one]) == []


def test_every_setting_is_compared_but_for_places_and_workers():
    config = digits.get_config()
    config_lib.update(config, {"data.name": "folder"})
    said = cli.settings_to_compare(config, None, mode="train", step=None)
    json.dumps({name: repr(value) for name, value in said.items()})
    flat = config_lib.flatten(config)
    left_out = flat.keys() - {name.removeprefix("config.") for name in said}
    assert left_out == config_lib.per_process_settings(config)
    assert {"data.dir", "autoencoder.weights", "init_from", "data.num_workers"} < left_out
    assert not left_out & {"seed", "log_every", "checkpoint.every", "sample.every", "data.split"}
    assert {
        "--mode",
        "--step",
        "--workdir",
        "jax",
        "the code of ant_jax",
        "XLA_FLAGS",
    } < said.keys()


def test_replicas_that_differ_in_a_bit_have_other_checksums():
    devices = jax.devices()[:2]
    state = {
        "a": jnp.arange(12.0).reshape(3, 4),
        "b": jnp.zeros(5, jnp.bfloat16),
        "c": (jnp.array([True, False]), jnp.int32(7)),
    }
    place = lambda tree: devices_lib.replicate(tree, devices)
    same, other = devices_lib.checksums(place(state))
    assert same == other
    found = {same}
    for change in (
        lambda: state | {"a": state["a"].at[2, 1].set(np.nextafter(np.float32(9), np.float32(10)))},
        lambda: state | {"a": state["a"][::-1]},
        lambda: state | {"b": state["b"].at[3].set(-0.0)},
        lambda: state | {"c": (jnp.array([False, True]), jnp.int32(7))},
        lambda: state | {"c": (jnp.array([True, False]), jnp.int32(8))},
    ):
        found.add(devices_lib.checksums(place(change()))[0])
    assert len(found) == 6
    # One device alone has gone wrong.
    parts = [jax.device_put(np.float32(value), device) for value, device in enumerate(devices)]
    wrong = jax.make_array_from_single_device_arrays((), devices_lib.replicated(devices), parts)
    first, second = devices_lib.checksums({"a": wrong})
    assert first != second


def test_a_process_of_a_slice_that_was_started_alone_says_how(tmp_path, monkeypatch):
    processes.check_shared(tmp_path)
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(processes.DisagreementError, match="start each one with --distributed"):
        processes.check_shared(tmp_path)


@pytest.mark.parametrize("make", [compiled_step.training_step, compiled_step.start_compiling])
@pytest.mark.parametrize(("backend", "waits"), [("cpu", 3), ("tpu", 1)])
def test_all_meet_when_each_has_compiled_and_on_cpus_before_every_step(
    backend, waits, make, monkeypatch
):
    done = []

    class Step:
        def lower(self, *_):
            return self

        def compile(self):
            done.append("compiled")

        def __call__(self, *_):
            done.append("stepped")

    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(processes, "barrier", lambda: done.append("met"))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(compiled_step, "_step_and_arguments", lambda *_: (Step(), None))
    run = make(None, None)
    for _ in range(3):
        run(None, None)
    assert done[:3] == ["compiled", "met", "stepped"]
    assert done.count("compiled") == 1 and done.count("met") == waits
    assert done.count("stepped") == 3


def free_port(host="127.0.0.1"):
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as server:
        return server.getsockname()[1]


@pytest.fixture
def names(monkeypatch):
    """The addresses of host names, without asking a name server."""
    known = {}
    real = socket.getaddrinfo

    def lookup(host, port, **options):
        if host in known:
            return [entry for each in known[host] for entry in real(each, port, **options)]
        return real(host, port, **options)

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    return known


def test_process_0_listens_at_the_address_that_is_asked_and_no_other(names):
    port = free_port("127.0.0.1")
    assert connection._bind_address("127.0.0.1", port) == f"127.0.0.1:{port}"
    assert connection._bind_address("127.0.0.2", port) == f"127.0.0.2:{port}"
    names["localhost"] = ["127.0.0.1"]
    assert connection._bind_address("localhost", port) == f"127.0.0.1:{port}"
    if connection._can_listen("::1", free_port()):
        port = free_port("::1")
        assert connection._bind_address("::1", port) == f"[::1]:{port}"


def test_where_the_address_is_not_this_machine_s_alone_all_are_listened_at(names, caplog):
    port = free_port("127.0.0.1")
    # Behind a router that translates addresses; a name that is a loopback; two addresses.
    names |= {"behind": ["192.0.2.1"], "own": ["127.0.1.1"], "two": ["127.0.0.1", "192.0.2.1"]}
    for host in ("192.0.2.1", "behind", "own", "two"):
        caplog.clear()
        assert connection._bind_address(host, port) in (f"[::]:{port}", f"0.0.0.0:{port}")
        (record,) = caplog.records
        assert f"{host} is not one address of this machine; listening on all" in record.message


def test_a_coordinator_that_can_t_be_is_one_line(names):
    for address in (
        "localhost",
        "localhost:",
        ":1",
        "localhost:0",
        "h:65536",
        "h:²",
        "::1:80",
        "[h]:1",
    ):
        with pytest.raises(ValueError, match="must be HOST:PORT of process 0"):
            connection._host_and_port(address)
    assert connection._host_and_port("[::1]:80") == ("::1", 80)
    with pytest.raises(ValueError, match=r"--coordinator: nowhere\.invalid: "):
        connection._bind_address("nowhere.invalid", 80)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"port {port} of this machine: .*in use"):
            connection._bind_address("127.0.0.1", port)
