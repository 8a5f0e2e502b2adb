import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ant_jax.runtime import signals

ROOT = Path(__file__).parents[2]
# What each program does until a signal comes, and after it.
PROGRAMS = {
    "waits": "time.sleep(60)",
    "saves": "while not stop.signum: time.sleep(0.01)\ntime.sleep(0.1)",
    "saves long": "signals._ONCE_SECONDS = 0.2\nwhile True: time.sleep(0.01)",
    "imports": """
try:
    time.sleep(60)
except KeyboardInterrupt:
    raise ImportError("while an extension was initialized")
""",
    "loses": """
with signals.losing("this begins again"):
    print("inside", flush=True)
    time.sleep(60)
""",
    # Where Python drops exceptions.
    "collects": """
gc.disable()
gc.callbacks.append(lambda *_: time.sleep(60))
gc.collect()
gc.callbacks.clear()
time.sleep(60)
""",
    # In C code, where Python does not handle signals.
    "computes": """
signals._UNWIND_SECONDS = 0.1
hashlib.pbkdf2_hmac("sha256", b"", b"", 1 << 30)
""",
}


@contextlib.contextmanager
def program(what, *before):
    body = "\n".join("    " + line for line in PROGRAMS[what].splitlines())
    code = f"""
import gc, hashlib, sys, time
from ant_jax.runtime import signals
assert "jax" not in sys.modules
with signals.ending_the_program("start again") as stop:
    stop.saving = {what.startswith("saves")}
    print("ready", flush=True)
{body}
    print("saved", file=sys.stderr)
"""
    process = subprocess.Popen(
        [*before, sys.executable, "-c", code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()


def end_of(process):
    _, text = process.communicate(timeout=60)
    return process.returncode, text.splitlines()


@pytest.mark.parametrize("what", ["waits", "imports", "collects", "computes"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_what_has_nothing_to_save_ends_in_one_line(what, number):
    with program(what) as process:
        process.send_signal(number)
        assert end_of(process) == (128 + number, [f"{number.name}: stopped; start again"])


def test_what_is_lost_is_said():
    with program("loses") as process:
        assert process.stdout.readline() == "inside\n"
        process.send_signal(signal.SIGINT)
        assert end_of(process) == (130, ["SIGINT: stopped; start again; this begins again"])


@pytest.mark.parametrize(
    ("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 0), (signal.SIGHUP, 0)]
)
def test_what_has_something_to_save_saves_it_although_one_wish_came_twice(number, expected):
    with program("saves") as process:
        # Like a terminal and a wrapper that both deliver one Ctrl-C.
        process.send_signal(number)
        time.sleep(0.05)
        process.send_signal(number)
        status, (first, last) = end_of(process)
    assert (status, last) == (expected, "saved")
    assert first.startswith(f"{number.name}: a step is finished and saved first")


@pytest.mark.parametrize("what", ["waits", "computes"])
def test_where_the_terminal_is_gone_it_ends_all_the_same(what):
    with program(what) as process:
        process.stderr.close()
        process.send_signal(signal.SIGHUP)
        assert process.wait(60) == 128 + signal.SIGHUP


def test_a_second_signal_ends_at_once():
    with program("saves long") as process:
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        status, (_, last) = end_of(process)
    assert (status, last) == (130, "SIGINT: stopped; at once, by the second signal")


def test_what_nohup_ignores_stays_ignored():
    with program("saves", "sh", "-c", 'trap "" HUP; exec "$@"', "sh") as process:
        process.send_signal(signal.SIGHUP)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert end_of(process)[0] == 0


def test_a_library_s_second_signal_raises_and_handlers_are_put_back(monkeypatch):
    monkeypatch.setattr(signals, "_ONCE_SECONDS", 0.2)
    before = signal.getsignal(signal.SIGTERM)
    with signals.saving() as stop, pytest.raises(KeyboardInterrupt):
        assert not signals.asked()
        stop.saving = True
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signum == signal.SIGTERM and signals.asked()
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)
    assert signal.getsignal(signal.SIGTERM) is before
    assert not signals.asked() and signals.raised() is None
