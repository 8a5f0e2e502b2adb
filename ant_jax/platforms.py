"""The kind of device that a program is made for, where the fastest form depends on it."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_platform: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)


def platform() -> str:
    """The platform's name, such as "cpu", "gpu" or "tpu": by default that of JAX's device."""
    device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    of_jax = device if device is None or isinstance(device, str) else device.platform
    return _platform.get() or of_jax or jax.default_backend()


@contextlib.contextmanager
def making_for(name: str) -> Iterator[None]:
    """Traces programs in the forms for another platform than that of this machine.

    It encloses the call of ``lower``. A function that `jax.jit` has traced before keeps its form.
    """
    token = _platform.set(name)
    try:
        yield
    finally:
        _platform.reset(token)
