"""Eight CPU devices for every test, set before jax is imported, and quick compilation."""

import glob
import importlib.metadata
import os
import shutil
import signal
import sys
import tempfile

import pytest

# Nearly all of the tests' time is compilation; these make it several times shorter. Every core has
# its own tests, so a program need not be compiled in 32 parts side by side, which takes a sixth
# more. XLA stops at a flag that it does not know, as a later release may not.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
_FLAGS = ["--xla_force_host_platform_device_count=8"]
if importlib.metadata.version("jaxlib").startswith("0.10."):
    _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
    _FLAGS.append("--xla_cpu_parallel_codegen_split_count=1")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *_FLAGS])
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# No line numbers in the programs, which nothing here reads.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

# The matrices are small, and every core has its own tests: threads would wait for each other.
os.environ["OPENBLAS_NUM_THREADS"] = "1"


def _memory():
    """A folder in memory that has room for what the tests write, or None."""
    folder, needed = "/dev/shm", 4 << 30
    if not os.access(folder, os.W_OK | os.X_OK) or shutil.disk_usage(folder).free < needed:
        return None
    # What tests have left that were killed.
    for old in glob.glob(f"{folder}/ant_jax_tests_*"):
        if not os.path.exists(f"/proc/{old.split('_')[3]}"):
            shutil.rmtree(old, ignore_errors=True)
    return folder


_OURS = "PYTEST_XDIST_WORKER" not in os.environ
if _OURS:
    # In memory, because writing a checkpoint waits for the disk. Removed at the end; with
    # --basetemp=DIR the tests' own files stay in DIR.
    _FOLDER = tempfile.mkdtemp(prefix=f"ant_jax_tests_{os.getpid()}_", dir=_memory())
    os.environ["TMPDIR"] = tempfile.tempdir = _FOLDER
    # What one test has compiled, and the classifier of the digits, the other tests, in whichever
    # process of pytest-xdist, and the programs they start need not make again.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(_FOLDER, "jax")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["XDG_CACHE_HOME"] = os.path.join(_FOLDER, "cache")


# Tests send these to programs, which leave them ignored where they find them so, as under nohup and
# in the background of a script.
for _signal, _handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
    (signal.SIGTERM, signal.SIG_DFL),
):
    if signal.getsignal(_signal) is signal.SIG_IGN:
        signal.signal(_signal, _handler)


def pytest_collection_finish():
    # The package's modules may be imported only after the settings above.
    from ant_jax.runtime import garbage

    garbage.collect_less()
    # The loss of all held-out images takes most of an evaluation's time without optimizations.
    if measuring := sys.modules.get("ant_jax.measuring"):
        measuring._VALIDATION_IMAGES = 20
    # A multiple of most k, so that one program computes the loss of all levels and of each task.
    if evaluate := sys.modules.get("ant_jax.evaluate"):
        evaluate._LEVELS = 20


def pytest_unconfigure():
    if _OURS:
        shutil.rmtree(_FOLDER, ignore_errors=True)


@pytest.fixture(scope="module")
def small_model():
    with pytest.MonkeyPatch.context() as monkeypatch:
        # After the flags above, which must be set before jax is imported.
        from tiny_runs import use_small_model

        use_small_model(monkeypatch)
        yield
