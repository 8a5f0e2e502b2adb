"""One job at a time, of however many processes it is."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from ant_jax.runtime import processes
from ant_jax.runtime.files import locked


class InUseError(RuntimeError):
    """Another job is at what this one was asked to do."""


@contextlib.contextmanager
def job_lock(lock: Path, doing: str, otherwise: str) -> Iterator[Callable[[], bool]]:
    """Keeps other jobs out while this one is in the context.

    Args:
      lock: a file, which process 0 locks; the folders above it are made.
      doing: what the job does, as "is training in DIR".
      otherwise: what the user of another job can do, as "wait for it".

    Yields:
      In process 0 a function that tells whether the lock is still held, as of `files.locked`; in
      the others one that is always true.

    Raises:
      InUseError: if another job holds the lock.
    """
    with contextlib.ExitStack() as stack:
        is_held = lambda: True
        if processes.is_first():
            try:
                is_held = stack.enter_context(locked(lock))
            except BlockingIOError as error:
                raise InUseError(
                    f"{error} {doing}: {otherwise}. If its machine is gone and the network disk "
                    f"still keeps its lock, remove {lock}"
                ) from None
        yield is_held
