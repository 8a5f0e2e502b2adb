"""A lock by which one job, of one or many processes, keeps other jobs out."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from ant_jax.runtime import processes
from ant_jax.runtime.files import locked


class InUseError(RuntimeError):
    """Another job is doing the same work."""


@contextlib.contextmanager
def job_lock(lock: Path, doing: str, otherwise: str) -> Iterator[Callable[[], bool]]:
    """Keeps other jobs out while this job is in the context.

    Args:
      lock: a file, which process 0 locks; the folders above it are created.
      doing: what the job does, such as "is training in DIR", for the message of the other job.
      otherwise: what the user of the other job can do, such as "wait for it".

    Yields:
      In process 0 a function that tells whether the lock is still held, see `files.locked`; in the
      other processes a function that always returns True.

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
