from types import SimpleNamespace

import forked
import pytest

from ant_jax.runtime import compilation_cache, devices

# Programs are forked from a process that has started before: they set their variables themselves.
PROGRAM = """
import os, sys, jax
os.environ["XDG_CACHE_HOME"], known = sys.argv[1:]
jax.config.update("jax_compilation_cache_dir", known)
from ant_jax.runtime import compilation_cache
compilation_cache.enable()
jax.jit(lambda x: x * 2)(3.0)
"""


@pytest.mark.parametrize("known", [False, True])
def test_compiled_programs_are_kept_where_jax_knows_no_other_place(known, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)

    def run():
        arguments = [program, tmp_path / "cache", tmp_path / "known" if known else ""]
        ((status, said),) = forked.run([arguments], devices=1)
        assert status == 0, said
        return said

    run()
    kept = lambda folder: any(path.is_file() for path in (tmp_path / folder).rglob("*"))
    assert (kept("cache/ant_jax/programs"), kept("known")) == (not known, known)
    if not known:
        # XLA can read it back: it prints nothing.
        assert run() == ""
        # A kill or a bad disk has damaged the file: it is compiled again, with one warning.
        (path,) = [path for path in (tmp_path / "cache").rglob("*-sealed")]
        whole = path.read_bytes()
        path.write_bytes(whole[:-9])
        assert "damaged and will be compiled again" in run()
        assert "damaged" not in run()


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


# Without the flags of the tests, which turn optimizations off, and without a cache.
SAME = """
import os
os.environ["XLA_FLAGS"] = ""
import jax
jax.config.update("jax_disable_most_optimizations", False)
jax.config.update("jax_compilation_cache_dir", None)
from ant_jax.runtime import devices
def draw(key):
    return jax.random.normal(key, (7, 33)), 0.3 * jax.random.uniform(key, (7, 33), minval=-1)
ours = devices.compiler_options(jax.devices())
assert ours
first, second = (jax.jit(draw, compiler_options=o)(jax.random.key(0)) for o in (None, ours))
for each, other in zip(first, second):
    assert (each == other).all()
"""


def test_parameters_are_drawn_the_same_to_the_bit_however_the_program_is_compiled(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(SAME)
    ((status, said),) = forked.run([[program]], devices=1)
    assert status == 0, said


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ("", {"xla_gpu_enable_triton_gemm": False}),
        ("--xla_gpu_autotune_level=2", {"xla_gpu_enable_triton_gemm": False}),
        ("--xla_gpu_enable_triton_gemm=true", None),
    ],
)
def test_what_the_user_says_about_triton_counts(flags, options, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", flags)
    assert devices.compiler_options([SimpleNamespace(platform="gpu")]) == options
