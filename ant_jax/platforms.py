"""The kind of device that a program is made for, where the fastest form depends on it."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_platform: contextvars.ContextVar[str | None] = contextvars.ContextVar("platform", default=None)


def platform() -> str:
    """Its name, such as "cpu", "gpu" or "tpu": by default that of this machine's devices."""
    return _platform.get() or jax.default_backend()


@contextlib.contextmanager
def making_for(name: str) -> Iterator[None]:
    """Lets programs have the forms of another platform than that of this machine.

    Only where they are traced, so it encloses the call of ``lower``.
    """
    token = _platform.set(name)
    try:
        yield
    finally:
        _platform.reset(token)
