"""Eight CPU devices for every test, set before jax is imported, and quick compilation."""

import os
import shutil
import tempfile

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Nearly all of the tests' time is compilation; this makes it several times shorter.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# What one test has compiled the others, and the programs they start, need not compile again.
_CACHE = tempfile.mkdtemp(prefix="ant_jax_tests_")
os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"


def pytest_unconfigure():
    shutil.rmtree(_CACHE, ignore_errors=True)
