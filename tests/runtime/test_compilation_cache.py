import os
import subprocess
import sys
from pathlib import Path

import pytest

from ant_jax.runtime import compilation_cache

ROOT = Path(__file__).parents[2]
PROGRAM = (
    "import jax; from ant_jax.runtime import compilation_cache;"
    "compilation_cache.enable(); jax.jit(lambda x: x * 2)(3.0)"
)


@pytest.mark.parametrize("known", [False, True])
def test_compiled_programs_are_kept_where_jax_knows_no_other_place(known, tmp_path):
    environment = os.environ | {
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "known") if known else "",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }
    command = [sys.executable, "-c", PROGRAM]
    run = lambda: subprocess.run(
        command, cwd=ROOT, env=environment, check=True, timeout=100, capture_output=True, text=True
    )
    run()
    kept = lambda folder: any(path.is_file() for path in (tmp_path / folder).rglob("*"))
    assert (kept("cache/ant_jax/programs"), kept("known")) == (not known, known)
    if not known:
        # XLA can read it back: it prints nothing.
        assert run().stderr == ""
        # A kill or a bad disk has damaged the file: it is compiled again, with one warning.
        (path,) = [path for path in (tmp_path / "cache").rglob("*-sealed")]
        whole = path.read_bytes()
        path.write_bytes(whole[:-9])
        assert "damaged and will be compiled again" in run().stderr
        assert "damaged" not in run().stderr


def test_a_damaged_program_is_not_run_and_is_replaced(tmp_path, caplog):
    cache = compilation_cache._Sealed(tmp_path)
    assert cache.get("key") is None
    content = bytes(range(200))
    for damage in (
        lambda whole: whole[:-7],
        lambda whole: whole[:20],
        lambda whole: b"",
        lambda whole: whole[:90] + bytes([whole[90] ^ 4]) + whole[91:],
    ):
        cache.put("key", content)
        assert cache.get("key") == content
        (path,) = tmp_path.iterdir()
        path.write_bytes(damage(path.read_bytes()))
        assert cache.get("key") is None and str(path) in caplog.records[-1].message
        assert list(tmp_path.iterdir()) == []


def test_each_machine_has_a_folder():
    one, same, other = (compilation_cache._folder(cpu) for cpu in ("a", "a", "a b"))
    assert one == same != other


SAME = """
import jax
from ant_jax.runtime import devices
def draw(key):
    return jax.random.normal(key, (7, 33)), 0.3 * jax.random.uniform(key, (7, 33), minval=-1)
ours = devices.compiler_options(jax.devices())
assert ours
first, second = (jax.jit(draw, compiler_options=o)(jax.random.key(0)) for o in (None, ours))
for each, other in zip(first, second):
    assert (each == other).all()
"""


def test_parameters_are_drawn_the_same_to_the_bit_however_the_program_is_compiled():
    # Without the flags of the tests, which turn optimizations off.
    environment = {name: os.environ[name] for name in ("PATH", "JAX_PLATFORMS")}
    command = [sys.executable, "-c", SAME]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=100)
