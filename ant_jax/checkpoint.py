"""Checkpoints by orbax: asynchronous, atomic, checksummed.

A checkpoint is written beside its place, gets a checksum of every file, and is then renamed into
place, so that a directory with a step's name is always whole. Orbax notices truncated files but
not flipped bytes; the checksums notice both.
"""

import contextlib
import hashlib
import json
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from absl import logging

from ant_jax import processes

_CHECKSUMS = "checksums.json"
_PARTIAL = "partial-"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read."""


class CorruptCheckpointError(CheckpointError):
    """A checkpoint's files are not those that were written."""


class Checkpointer:
    """Writes and reads the checkpoints of one run.

    Saving copies the state off the device, then writes in the background; an error there is raised
    by the next call of `save`, `check` or `close`.

    Attributes:
      directory: where the checkpoints lie, one subdirectory a step.
    """

    def __init__(self, directory: str | os.PathLike, keep: int = 2, keep_period: int = 0):
        """Opens the directory for writing and removes what an interrupted save left there.

        Args:
          directory: made if missing.
          keep: how many of the newest checkpoints to keep, at least 1.
          keep_period: checkpoints at multiples of this step are kept for good; 0 for none.
        """
        self.directory = Path(directory).absolute()
        self._keep = keep
        self._keep_period = keep_period
        self._orbax = None
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future | None = None
        if processes.is_first():
            self.directory.mkdir(parents=True, exist_ok=True)
            for path in self.directory.glob(f"{_PARTIAL}*"):
                shutil.rmtree(path)

    def save(self, step: int, state: Any) -> None:
        """Starts saving a pytree of arrays as the checkpoint of a step.

        Raises:
          CheckpointError: if the one before could not be saved, or the disk has no room for this.
        """
        self._finish()
        self._check_room(sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
        partial = self.directory / f"{_PARTIAL}{step}"
        if self._orbax is None:
            self._orbax = _open_orbax()
        self._orbax.save(partial, _to_global(state))
        self._pending = self._executor.submit(self._commit, partial, step)

    def check(self) -> None:
        """Raises the error of a save that has failed in the background, if any."""
        if self._pending is not None and self._pending.done():
            self._finish()

    def close(self) -> None:
        """Waits for the last save."""
        try:
            self._finish()
        finally:
            self._executor.shutdown()
            if self._orbax is not None:
                self._orbax.close()

    def _check_room(self, needed):
        free = shutil.disk_usage(self.directory).free
        if free < needed:
            raise CheckpointError(
                f"no room for a checkpoint in {self.directory}: it takes {needed / 1e9:.3g} GB, "
                f"{free / 1e9:.3g} GB are free; newest complete checkpoint: {self._newest()}"
            )

    def _newest(self):
        steps = checkpoint_steps(self.directory)
        return f"step {steps[-1]}" if steps else "none"

    def _finish(self):
        if self._pending is not None:
            pending, self._pending = self._pending, None
            try:
                pending.result()
            except Exception as error:
                raise CheckpointError(
                    f"saving a checkpoint in {self.directory} failed: {error} "
                    f"(disk full? not writable?); newest complete checkpoint: {self._newest()}"
                ) from error

    def _commit(self, partial: Path, step: int):
        self._orbax.wait_until_finished()
        if not processes.is_first():
            return
        (partial / _CHECKSUMS).write_text(json.dumps(_checksums(partial), indent=1))
        for path in (*partial.rglob("*"), partial):
            _sync(path)
        for later in checkpoint_steps(self.directory):
            if later >= step:
                # Passed over by `restore`, or the run would not be at this step again.
                aside = self.directory / f"corrupt-{later}"
                shutil.rmtree(aside, ignore_errors=True)
                (self.directory / str(later)).rename(aside)
        partial.rename(self.directory / str(step))
        _sync(self.directory)
        self._prune()

    def _prune(self):
        for step in checkpoint_steps(self.directory)[: -self._keep]:
            if not self._keep_period or step % self._keep_period:
                # Renamed first: a directory with a step's name is always whole.
                doomed = self.directory / f"{_PARTIAL}old-{step}"
                (self.directory / str(step)).rename(doomed)
                shutil.rmtree(doomed)


def checkpoint_steps(directory: str | os.PathLike) -> list[int]:
    """Steps of the checkpoints in a directory, ascending; empty if there is no such directory."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return sorted(int(name) for name in os.listdir(directory) if name.isdigit())
    return []


def restore(
    directory: str | os.PathLike, template: Any, step: int | None = None
) -> tuple[int, Any] | None:
    """Reads the newest intact checkpoint; a corrupt one is named in the log and passed over.

    Args:
      directory: of a `Checkpointer`.
      template: pytree of arrays or `jax.ShapeDtypeStruct` with shardings, as it was saved; the
        result is placed like it, on whatever devices it names.
      step: read this step's checkpoint and no other.

    Returns:
      (step, state), or None if there is no checkpoint at all.

    Raises:
      CorruptCheckpointError: if there are checkpoints but none of them is intact.
      FileNotFoundError: if the step asked for has no checkpoint.
      CheckpointError: if a checkpoint is intact but not of the template's structure.
    """
    directory = Path(directory).absolute()
    # Process 0 chooses: others may see the disk a little later, and once is enough to read it all.
    chosen = processes.decide(lambda: _newest_intact(directory, step))
    if chosen is None:
        return None
    path = directory / str(chosen)
    if not processes.seen(path):
        raise CheckpointError(f"process 0 sees a checkpoint {path}, and this process does not")
    try:
        with _open_orbax() as orbax:
            return chosen, _to_local(orbax.restore(path, _to_global(template)), template)
    except ValueError as error:
        raise CheckpointError(f"checkpoint {path} does not fit this config: {error}") from error


def _newest_intact(directory: Path, step: int | None) -> int | None:
    steps = checkpoint_steps(directory)
    if step is not None:
        if step not in steps:
            raise FileNotFoundError(f"no checkpoint of step {step} in {directory}, only {steps}")
        steps = [step]
    if not steps:
        return None
    problems = []
    for candidate in reversed(steps):
        try:
            _verify(directory / str(candidate))
        except CorruptCheckpointError as error:
            logging.error("%s; trying the one before it", error)
            problems.append(str(error))
        else:
            return candidate
    raise CorruptCheckpointError("no intact checkpoint is left: " + "; ".join(problems))


def _open_orbax():
    # Imported where something is saved or restored: the first step need not wait for it.
    import orbax.checkpoint as ocp

    return ocp.StandardCheckpointer()


def _to_global(tree: Any) -> Any:
    """What every process holds as one array over all of them: orbax takes no other."""
    if jax.process_count() == 1:
        return tree
    mesh = jax.sharding.Mesh(jax.devices(), ("devices",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def convert(leaf):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        shards = [shard.data for shard in leaf.addressable_shards]
        return jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards)

    return jax.tree.map(convert, tree)


def _to_local(tree: Any, template: Any) -> Any:
    """The inverse of `_to_global`: arrays placed like the template's."""
    if jax.process_count() == 1:
        return tree

    def convert(leaf, like):
        shards = [shard.data for shard in leaf.addressable_shards]
        return jax.make_array_from_single_device_arrays(leaf.shape, like.sharding, shards)

    return jax.tree.map(convert, tree, template)


def _verify(path: Path):
    try:
        expected = dict(json.loads((path / _CHECKSUMS).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise CorruptCheckpointError(f"checkpoint {path} has no readable checksums") from error
    found = _checksums(path)
    wrong = sorted(
        name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
    )
    if wrong:
        raise CorruptCheckpointError(f"checkpoint {path} is corrupt: {', '.join(wrong[:3])}")


def _checksums(path: Path) -> dict[str, str]:
    sums = {}
    for file in sorted(path.rglob("*")):
        if file.is_file() and file != path / _CHECKSUMS:
            with file.open("rb") as stream:
                name = file.relative_to(path).as_posix()
                sums[name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return sums


def _sync(path: Path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
