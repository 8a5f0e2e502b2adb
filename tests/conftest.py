"""Eight CPU devices for every test, set before jax is imported, and quick compilation."""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Nearly all of the tests' time is compilation; this makes it several times shorter.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
