"""Checkpoints by orbax: asynchronous and atomic.

A checkpoint is written into a temporary directory, read back (see `checkpoint_arrays`), gets its
checksums (see `checkpoint_files`) and is then renamed. So a directory whose name is a step is
always complete.
"""

import collections
import contextlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
from absl import logging

from ant_jax.runtime import checkpoint_arrays, checkpoint_files, processes
from ant_jax.runtime.checkpoint_files import CheckpointError, CorruptCheckpointError
from ant_jax.runtime.files import make_folder, sync, write_bytes

_PARTIAL = "partial-"
_LAST_STEP = 2**31 - 1  # the largest step that a state can count


class Checkpointer:
    """Writes and reads the checkpoints of one run.

    `save` copies the state to the host and writes it in the background. If that fails, the next
    call of `save`, `wait`, `check` or `close` raises the error.

    Attributes:
      directory: holds the checkpoints, one subdirectory for each step. The file DIRECTORY.json
        beside it records the newest step, so that a missing directory is noticed.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        keep: int = 2,
        keep_period: int = 0,
        guard: Callable[[], None] = lambda: None,
    ):
        """Opens the directory for writing and removes the leftovers of an interrupted save.

        Args:
          directory: created if it does not exist.
          keep: how many of the newest checkpoints to keep, at least 1.
          keep_period: checkpoints at multiples of this step are never deleted; 0 for none.
          guard: process 0 calls it before it writes a checkpoint and before it renames it. It
            raises a CheckpointError if this run no longer owns the directory.
        """
        self.directory = Path(directory).absolute()
        self._keep = keep
        self._keep_period = keep_period
        self._guard = guard
        self._open = contextlib.ExitStack()
        # Where orbax finds the directory, and its checkpointer.
        self._orbax: tuple[Path, Any] | None = None
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future | None = None
        if processes.is_first():
            make_folder(self.directory)
            for path in self.directory.glob(f"{_PARTIAL}*"):
                _remove(path)

    def save(self, step: int, state: Any, record: dict[str, Any] | None = None) -> None:
        """Starts saving a pytree of arrays as the checkpoint of a step.

        Args:
          step: its number.
          state: the pytree.
          record: what else the checkpoint holds, values of JSON; "id" is the id of the run.

        Raises:
          CheckpointError: if the last save failed, or the disk has too little space for this one.
        """
        self._finish()
        if processes.is_first():
            self._guard()
        self._check_room(sum(leaf.nbytes for leaf in jax.tree.leaves(state)))
        if self._orbax is None:
            place = self._open.enter_context(checkpoint_arrays.plain_path(self.directory))
            self._orbax = place, self._open.enter_context(checkpoint_arrays.open_orbax())
        place, orbax = self._orbax
        arrays = collections.Counter(map(checkpoint_arrays.shape_and_dtype, jax.tree.leaves(state)))
        # Process 0 may still be busy with the last checkpoint.
        processes.barrier()
        partial = self.directory / f"{_PARTIAL}{step}"
        orbax.save(place / partial.name, checkpoint_arrays.to_save(state))

        def check_arrays():
            orbax.wait_until_finished()
            if processes.is_first():
                checkpoint_arrays.check(place / partial.name, arrays)

        self._pending = self._executor.submit(self._commit, partial, step, check_arrays, record)

    def prune(self, step: int) -> None:
        """Deletes the old checkpoints that `keep` and `keep_period` do not keep.

        Args:
          step: of the newest intact checkpoint. Later ones are corrupt: `restore` has skipped them.
            They stay until the run saves their steps again.
        """
        if not processes.is_first():
            return
        steps = [each for each in checkpoint_steps(self.directory) if each <= step]
        for old in steps[: -self._keep]:
            if not self._keep_period or old % self._keep_period:
                # Renamed first, because a directory whose name is a step must be complete. Files
                # that a reader or a network disk keeps open are deleted at the next start.
                self._rename(old, f"{_PARTIAL}old-{old}", _remove)

    def wait(self) -> None:
        """Waits for the last save, in all processes; raises its error."""
        self._finish()
        processes.barrier()

    def check(self) -> None:
        """Raises the error of the save in the background, if it has failed."""
        if self._pending is not None and self._pending.done():
            self._finish()

    def close(self) -> None:
        """Waits for the last save."""
        try:
            self._finish()
        finally:
            self._executor.shutdown()
            self._open.close()

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
            except CheckpointError:
                raise
            except Exception as error:
                if processes.is_first():
                    self._guard()
                raise CheckpointError(
                    f"saving a checkpoint in {self.directory} failed: {error} "
                    f"(disk full? not writable?); newest complete checkpoint: {self._newest()}"
                ) from error

    def _commit(self, partial: Path, step: int, check_arrays: Callable[[], None], record: Any):
        check_arrays()
        if not processes.is_first():
            return
        checkpoint_files.seal(partial, record)
        self._guard()
        for later in checkpoint_steps(self.directory):
            if later >= step:
                # It is corrupt: otherwise `restore` would have started the run from it.
                self._rename(later, f"corrupt-{later}")
        if os.path.lexists(self.directory / str(step)):
            self._rename(step, f"corrupt-{step}")
        partial.rename(self.directory / str(step))
        sync(self.directory)
        write_bytes(_note(self.directory), json.dumps({"newest": step}).encode())
        self.prune(step)

    def _rename(self, step: int, name: str, then: Callable[[Path], None] = lambda path: None):
        """Renames the directory of a step and replaces whatever has the new name.

        If that can't be removed, the directory gets the name with a number appended.
        """
        path, numbers = self.directory / name, itertools.count(1)
        _remove(path)
        while os.path.lexists(path):
            path = self.directory / f"{name}.{next(numbers)}"
            _remove(path)
        (self.directory / str(step)).rename(path)
        then(path)


def checkpoint_steps(directory: str | os.PathLike) -> list[int]:
    """Steps of the checkpoints in a directory, ascending; empty if there is no such directory."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(directory) as there:
        names = [entry.name for entry in there if entry.is_dir()]
        # Only names as we write them: not 007, nor anything else that `int` accepts.
        steps = [int(name) for name in names if re.fullmatch("[1-9][0-9]{0,9}", name)]
        return sorted(step for step in steps if step <= _LAST_STEP)
    return []


def restore(
    directory: str | os.PathLike, template: Any, step: int | None = None, run: str = ""
) -> tuple[int, Any] | None:
    """Reads the newest intact checkpoint. It logs the corrupt ones and skips them.

    If a running training deletes the checkpoint in the meantime, it reads the newest one again.

    Args:
      directory: of a `Checkpointer`.
      template: pytree of arrays or `jax.ShapeDtypeStruct` with shardings, of the structure that was
        saved. The result has the same shardings.
      step: read only the checkpoint of this step.
      run: skip checkpoints whose record has another "id"; "" to skip none.

    Returns:
      (step, state), or None if there is no checkpoint at all.

    Raises:
      CorruptCheckpointError: if there are checkpoints but none of them is intact.
      FileNotFoundError: if there is no checkpoint of the given step.
      CheckpointError: if a checkpoint is intact but has another structure than the template, or if
        there were checkpoints and they are gone.
    """
    return _read_newest(directory, step, run, lambda path: checkpoint_arrays.read(path, template))


def restore_part(
    directory: str | os.PathLike,
    name: str,
    template: Any = None,
    step: int | None = None,
    run: str = "",
) -> tuple[int, Any] | None:
    """Reads one part of the newest intact checkpoint, as NumPy arrays.

    Args:
      directory: of a `Checkpointer`.
      name: of the part: a key at the root of the saved pytree.
      template: pytree of arrays or `jax.ShapeDtypeStruct` that the part must be like; None for any.
      step: read only the checkpoint of this step.
      run: skip checkpoints whose record has another "id"; "" to skip none.

    Returns:
      (step, part), the part as nested dicts; None if there is no checkpoint at all.

    Raises:
      CheckpointError: if no checkpoint is intact, if they are gone, or if the part has another
        structure than the template; see `restore` for other errors.
    """
    read = lambda path: checkpoint_arrays.read_part(path, name, template)
    return _read_newest(directory, step, run, read)


def _read_newest(directory, step, run, read):
    """(step, result of ``read``) of the newest intact checkpoint, or of the given step."""
    directory = Path(directory).absolute()
    while True:
        # Process 0 chooses: the others may see the disk a little later, and it is enough that one
        # process verifies all files.
        chosen = processes.broadcast_from_first(lambda: _newest_intact(directory, step, run))
        if chosen is None:
            return None
        path = directory / str(chosen)
        try:
            if not processes.wait_for_file(path):
                raise CheckpointError(
                    f"checkpoint {path}, which process 0 reads, is not here: the workdir must be "
                    "on a disk that all processes share"
                )
            processes.barrier()
            with checkpoint_arrays.plain_path(directory) as place:
                return chosen, read(place / path.name)
        # A checkpoint that is deleted while it is read can cause almost any type of error.
        except Exception as error:
            if chosen not in checkpoint_steps(directory):
                if jax.process_count() > 1:
                    # Some processes may have read all of it.
                    raise CheckpointError(
                        f"checkpoint {path} was removed while it was read: start again"
                    ) from error
                logging.info("checkpoint %s was removed while it was read: looking again", path)
            elif isinstance(error, ValueError):
                raise CheckpointError(
                    f"checkpoint {path} does not fit this config, or the objects given from "
                    f"Python: {error}"
                ) from error
            else:
                raise


def read_record(
    directory: str | os.PathLike, step: int | None = None, run: str = ""
) -> dict[str, Any] | None:
    """Reads what a checkpoint holds beside the arrays: the newest one with a record, or a step's.

    Args:
      directory: of a `Checkpointer`.
      step: read only the checkpoint of this step.
      run: skip records with another "id"; "" to skip none.

    Returns:
      The record given to `Checkpointer.save`, or None if none can be read.
    """
    directory = Path(directory).absolute()
    while True:
        steps = checkpoint_steps(directory)
        for candidate in reversed(steps):
            if step in (None, candidate):
                with contextlib.suppress(CorruptCheckpointError):
                    record = checkpoint_files.record_of(directory / str(candidate))
                    if record is not None and not _is_of_another(record, run):
                        return record
        # Otherwise the run has saved and deleted checkpoints in the meantime.
        if checkpoint_steps(directory) == steps:
            return None


def _newest_intact(directory: Path, step: int | None, run: str) -> int | None:
    while True:
        steps = checkpoint_steps(directory)
        if step is None or not steps:
            _check_none_gone(directory, steps)
        if step is not None and step not in steps:
            raise FileNotFoundError(f"no checkpoint of step {step} in {directory}, only {steps}")
        if not steps:
            return None
        problems = []
        for candidate in [step] if step is not None else reversed(steps):
            path = directory / str(candidate)
            try:
                checkpoint_files.verify(path)
                if _is_of_another(checkpoint_files.record_of(path) or {}, run):
                    raise CorruptCheckpointError(
                        f"checkpoint {path} is of another run than {directory.parent}/facts.json"
                    )
            except CorruptCheckpointError as error:
                if candidate not in checkpoint_steps(directory):
                    # The run has deleted it in the meantime, because there is a newer one.
                    break
                is_last = step is not None or candidate == steps[0]
                hint = "" if is_last else "; trying the one before it"
                logging.error("%s%s", error, hint)
                problems.append(str(error))
            else:
                return candidate
        else:
            raise CorruptCheckpointError("no intact checkpoint is left: " + "; ".join(problems))


def _check_none_gone(directory: Path, steps: list[int]):
    note = _note(directory)
    try:
        newest = json.loads(note.read_text())["newest"]
    except FileNotFoundError:
        return
    except (ValueError, TypeError, KeyError, RecursionError):
        newest = "unknown"
    if not steps:
        raise CheckpointError(
            f"{directory} has no checkpoint, but the run had one, of step {newest}: bring it back "
            f"(a disk that is not mounted?), or remove {note} to begin anew"
        )
    if isinstance(newest, int) and steps[-1] < newest:
        logging.warning(
            "%s had a checkpoint of step %d, which is gone; the newest is of step %d",
            directory,
            newest,
            steps[-1],
        )


def _note(directory: Path) -> Path:
    return directory.with_name(directory.name + ".json")


def _is_of_another(record: dict[str, Any], run: str) -> bool:
    return bool(run) and record.get("id", run) != run


def _remove(path: Path):
    """Removes a file or a folder; files that are in use on a network disk stay."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
