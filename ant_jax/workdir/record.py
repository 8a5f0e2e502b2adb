"""Reads and writes a workdir: the config and the facts of its run, its lock, its checkpoints."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from ml_collections import ConfigDict

from ant_jax import config as config_lib
from ant_jax import data
from ant_jax.config import ConfigError
from ant_jax.experiment import Setup, abstract_params
from ant_jax.runtime import checkpoint, processes
from ant_jax.runtime.files import write_bytes
from ant_jax.runtime.lock import job_lock
from ant_jax.state_layout import abstract_state, place_params
from ant_jax.train_step import TrainState
from ant_jax.workdir import older_checkpoints

# Of a checkpoint: a step, the one that is best by `hooks.Evaluations`, or None for the newest.
Step = int | Literal["best"] | None


def save_config(
    config: ConfigDict, workdir: str | os.PathLike, given: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Writes ``config.json``.

    Args:
      config: of the run.
      workdir: of the run.
      given: names of the objects that replace those of the config; see `names_of`.
    """
    content = config.to_dict() | ({"given": dict(given)} if given else {})
    write_bytes(Path(workdir) / "config.json", (json.dumps(content, indent=2) + "\n").encode())


def load_config(workdir: str | os.PathLike) -> ConfigDict | None:
    """Reads the config of the run in a workdir; None if there is no run.

    Reads ``config.json``, or, if it is missing, the newest checkpoint.

    Raises:
      ConfigError: if ``config.json`` is damaged.
    """
    if not (Path(workdir) / "config.json").exists():
        record = checkpoint.read_record(Path(workdir) / "checkpoints")
        return None if record is None else config_lib.from_json(record["config"])
    config, _ = _read_config(workdir)
    return config


def _read_config(workdir):
    """The config of ``config.json``, and the names of the objects that replace its own."""
    path = Path(workdir) / "config.json"
    try:
        settings = json.loads(path.read_bytes())
        given = settings.pop("given", {}) if isinstance(settings, dict) else {}
        if not isinstance(given, dict):
            raise TypeError(f"given: {given!r}")
        return config_lib.from_json(settings), given
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged ({error}): {_way_out(workdir)}") from error


def _way_out(workdir: str | os.PathLike) -> str:
    """Tells the user what to do if ``config.json`` or ``facts.json`` is damaged."""
    if checkpoint.read_record(Path(workdir) / "checkpoints") is None:
        return "repair it or bring it back, because no checkpoint holds its content"
    return "remove it, because checkpoints hold its content"


def facts(setup: Setup, source: data.Source) -> dict[str, Any]:
    """The facts of a run, which it finds out when it starts: the data's, and the boundaries."""
    return source.facts() | {"boundaries": setup.clusters.boundaries.tolist()}


def save_facts(setup: Setup, source: data.Source, workdir: Path, run: str = "") -> dict[str, Any]:
    """Writes ``facts.json``, the id and the facts of a run; returns the facts.

    Args:
      setup: of the run.
      source: the data of the run.
      workdir: of the run.
      run: its id; "" for none.
    """
    found = facts(setup, source)
    write_bytes(workdir / "facts.json", json.dumps({"id": run} | found).encode())
    return found


_FACTS = {
    "id": str,
    "channels": int,
    "num_classes": int,
    "num_images": int,
    "encoder": str,
    "fingerprint": str,
    "boundaries": list,
    "classes": list,
}


def _read_facts(workdir):
    """Reads ``facts.json``, with the id; {} if it is missing."""
    path = workdir / "facts.json"
    try:
        facts = json.loads(path.read_bytes())
        for name, kind in _FACTS.items():
            if name in facts and type(facts[name]) is not kind:
                raise ValueError(f"{name}: {facts[name]!r}")
        for name, kinds in (("boundaries", (int, float)), ("classes", (str,))):
            if any(type(value) not in kinds for value in facts.get(name, ())):
                raise ValueError(f"{name}: {facts[name]!r}")
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged ({error}): {_way_out(workdir)}") from error
    return facts


def recorded(workdir: Path) -> dict[str, Any] | None:
    """Reads the record of the run in a workdir, as values of JSON; None if there is no run.

    The newest checkpoint holds the record. ``config.json`` and ``facts.json`` are copies for
    people. They are read if no checkpoint has a record: before the first checkpoint, and in
    workdirs of older versions.

    Returns:
      {"id", "config", "facts", "given"}; see `save_record`. Without a checkpoint "facts" is empty,
      because the run has learned nothing yet.

    Raises:
      ConfigError: if a file is damaged, or if there are checkpoints but no config.
    """
    facts, directory = _read_facts(workdir), workdir / "checkpoints"
    record = checkpoint.read_record(directory, run=facts.get("id", ""))
    if record is not None:
        known = {name: record[name] for name in ("id", "config", "facts")}
        return known | {"given": record.get("given", {})}
    has_checkpoints = bool(checkpoint.checkpoint_steps(directory))
    if not (workdir / "config.json").exists():
        if not has_checkpoints:
            return None
        raise ConfigError(
            f"{workdir} has checkpoints and no config.json: bring it back, or choose another "
            "--workdir"
        )
    config, given = _read_config(workdir)
    return {
        "id": facts.pop("id", ""),
        "config": json.loads(json.dumps(config.to_dict())),
        "facts": facts if has_checkpoints else {},
        "given": given,
    }


def run_id(workdir: Path) -> str:
    """The id of the run in a workdir.

    Raises:
      ConfigError: see `recorded`.
      FileNotFoundError: if there is no run.
    """
    known = recorded(workdir)
    if known is None:
        raise FileNotFoundError(f"there is no run in {workdir}")
    return known["id"]


def save_record(
    run: str,
    config: ConfigDict,
    given: Mapping[str, str],
    setup: Setup,
    source: data.Source,
    workdir: Path,
) -> dict[str, Any]:
    """Writes ``facts.json`` and ``config.json`` in process 0.

    Args:
      run: its id.
      config: of the run.
      given: names of the objects that replace those of the config; see `names_of`.
      setup: what the config describes.
      source: the data of the run.
      workdir: of the run.

    Returns:
      The record of the run, which its checkpoints hold: {"id", "config", "facts", "given"}.
    """
    if processes.is_first():
        save_facts(setup, source, workdir, run)
        save_config(config, workdir, given)
    found = facts(setup, source)
    return {"id": run, "config": config.to_dict(), "facts": found, "given": dict(given)}


def names_of(given: Mapping[str, Any]) -> dict[str, str]:
    """The class names, for the record, of objects that replace those of the config.

    All weightings have one class, so the record does not tell two of them apart.

    Args:
      given: the objects, by their argument's name in `train.train`.
    """
    kinds = {name: type(value) for name, value in given.items()}
    return {name: f"{kind.__module__}.{kind.__qualname__}" for name, kind in kinds.items()}


@contextlib.contextmanager
def exclusive(workdir: Path) -> Iterator[Callable[[], None]]:
    """Locks a workdir for this run, of one or many processes.

    Yields:
      A function that raises a CheckpointError if this run no longer owns the workdir, because the
      workdir or its lock was removed or replaced.

    Raises:
      InUseError: if another run trains in the workdir.
    """
    new = [folder for folder in (workdir, *workdir.parents) if not folder.exists()]
    with job_lock(
        workdir / ".lock",
        f"is training in {workdir}",
        "wait for it, stop it, or choose another --workdir",
    ) as is_held:

        def check():
            if not is_held():
                raise checkpoint.CheckpointError(
                    f"{workdir} was removed or replaced, or its .lock was, while this run trained "
                    "in it: the run ends, and saves nothing more"
                )

        try:
            yield check
        except BaseException:
            # A run that could not start leaves nothing behind.
            with contextlib.suppress(OSError):
                if processes.is_first() and is_held() and os.listdir(workdir) == [".lock"]:
                    (workdir / ".lock").unlink()
                    for folder in new:
                        folder.rmdir()
            raise


def load_facts(workdir: Path) -> dict[str, Any]:
    """Those facts of the run in a workdir that are arguments of `experiment.build`.

    Raises:
      ConfigError: if they are missing.
    """
    facts = facts_of(workdir)
    return {name: facts[name] for name in ("channels", "num_classes", "boundaries")}


def facts_of(workdir: Path) -> dict[str, Any]:
    """All facts of the run in a workdir, from its newest checkpoint or ``facts.json``.

    Raises:
      ConfigError: if they are missing.
    """
    there = _read_facts(workdir)
    record = checkpoint.read_record(workdir / "checkpoints", run=there.get("id", ""))
    facts = there if record is None else record["facts"]
    for name in ("channels", "num_classes", "boundaries"):
        if name not in facts:
            raise ConfigError(
                f"{workdir / 'facts.json'} is missing or without {name!r}: bring it back"
            )
    return facts


def restore(
    config: ConfigDict, setup: Setup, workdir: Path, step: int | None = None
) -> tuple[int, TrainState] | None:
    """Restores the newest intact checkpoint of a run, or that of a step, on this process's devices.

    Returns:
      (step, state), or None if there is no checkpoint.

    Raises:
      ConfigError: if the checkpoint was saved with another config. For the other errors see
        `checkpoint.restore`.
    """
    directory, template = workdir / "checkpoints", abstract_state(config, setup)
    restored = _restore(directory, template, step, _id(workdir))
    if restored is not None:
        _check_config(config, directory, restored[0])
    return restored


def restore_params(
    config: ConfigDict,
    setup: Setup,
    workdir: Path,
    step: Step = None,
    *,
    average: bool = True,
) -> tuple[int, dict] | None:
    """Restores the parameters alone, a quarter of a checkpoint, on this process's devices.

    Args:
      config: of the run.
      setup: what the config describes.
      workdir: of the run.
      step: of the checkpoint, or "best"; the newest by default.
      average: whether to restore their moving average, the only parameters that "best" has.

    Returns:
      (step, parameters), or None if there is no checkpoint.

    Raises:
      FileNotFoundError: if there is no checkpoint of that step, or none that is best. For the other
        errors see `restore`.
    """
    directory, name = _directory(workdir, step), "ema_params" if average else "params"
    template = abstract_params(setup)
    restored = _restore_part(directory, name, template, step, _id(workdir))
    if restored is None:
        return None
    _check_config(config, directory, restored[0])
    return restored[0], place_params(config, setup, restored[1])


def restore_average(workdir: Path, step: Step, run: str) -> tuple[int, dict] | None:
    """Restores the moving average of the parameters as NumPy arrays, without a config.

    Args:
      workdir: of the run.
      step: of the checkpoint, or "best"; None for the newest.
      run: the id of the run.

    Returns:
      (step, parameters), or None if there is no checkpoint.

    Raises:
      As `restore_params` does.
    """
    return _restore_part(_directory(workdir, step), "ema_params", None, step, run)


def _directory(workdir, step):
    return workdir / ("best" if step == "best" else "checkpoints")


def _restore_part(directory, name, template, step, run):
    if step != "best":
        return checkpoint.restore_part(directory, name, template, step, run)
    restored = checkpoint.restore_part(directory, name, template, run=run)
    if restored is None:
        raise FileNotFoundError(
            f"no best checkpoint in {directory.parent}: training keeps one if "
            "config.evaluation.every is above 0; leave the step out for the newest"
        )
    return restored


def _id(workdir):
    """Of the run. Process 0 chooses the checkpoint; others may see an older state of the disk."""
    return _read_facts(workdir).get("id", "") if processes.is_first() else ""


def _check_config(config, directory, step):
    record = processes.broadcast_from_first(lambda: checkpoint.read_record(directory, step))
    if record is not None:
        there = config_lib.from_json(record["config"])
        config_lib.check_same(there, config, directory / str(step))


def _restore(directory, template, step, run):
    try:
        return checkpoint.restore(directory, template, step, run)
    except checkpoint.CorruptCheckpointError:
        raise
    except checkpoint.CheckpointError:
        older = older_checkpoints.older(template)
        try:
            restored = older and checkpoint.restore(directory, older, step, run)
        except checkpoint.CheckpointError:
            restored = None
        if restored is None:
            raise
    return restored[0], older_checkpoints.newer(restored[1], template)
