"""What a workdir records of its run: its config, what it found out when it began, its state."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from ant_jax import config as config_lib
from ant_jax import data, dataset, older_checkpoints
from ant_jax.compiled_step import abstract_state
from ant_jax.config import ConfigError
from ant_jax.experiment import Setup
from ant_jax.runtime import checkpoint, logs, processes
from ant_jax.runtime.files import user_path, write_bytes
from ant_jax.runtime.lock import job_lock
from ant_jax.train_step import TrainState


def save_config(
    config: ConfigDict, workdir: str | os.PathLike, given: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Writes ``config.json``, by which a workdir describes itself.

    Args:
      config: of the run.
      workdir: of the run.
      given: what was given in place of what the config names; see `names_of`.
    """
    content = config.to_dict() | ({"given": dict(given)} if given else {})
    write_bytes(Path(workdir) / "config.json", (json.dumps(content, indent=2) + "\n").encode())


def load_config(workdir: str | os.PathLike) -> ConfigDict | None:
    """The config of the run in a workdir; None if there is no run.

    It is that of ``config.json``, or, where there is none, that of the newest checkpoint.

    Raises:
      ConfigError: if ``config.json`` is damaged.
    """
    if not (Path(workdir) / "config.json").exists():
        record = checkpoint.read_record(Path(workdir) / "checkpoints")
        return None if record is None else config_lib.from_json(record["config"])
    config, _ = _read_config(workdir)
    return config


def _read_config(workdir):
    """The config of ``config.json``, and what was given in place of what it names."""
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
    """What to do about a damaged file in which a workdir describes itself."""
    if checkpoint.read_record(Path(workdir) / "checkpoints") is None:
        return "mend it or bring it back, for no checkpoint holds what it says"
    return "remove it, for checkpoints hold what it says"


def facts(setup: Setup, source: data.Source) -> dict[str, Any]:
    """What a run finds out when it begins."""
    return source.facts() | {"boundaries": setup.clusters.boundaries.tolist()}


def save_facts(setup: Setup, source: data.Source, workdir: Path, run: str = "") -> dict[str, Any]:
    """Writes ``facts.json``: the run's id and what it found out when it began; returns the facts.

    Args:
      setup: of the run.
      source: what it learns from.
      workdir: of the run.
      run: its id; "" for one that has none.
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
    "boundaries": list,
    "classes": list,
}


def _read_facts(workdir):
    """What `save_facts` wrote, with the id; empty if nothing is there."""
    path = workdir / "facts.json"
    try:
        facts = json.loads(path.read_bytes())
        for name, kind in _FACTS.items():
            if name in facts and type(facts[name]) is not kind:
                raise ValueError(f"{name}: {facts[name]!r}")
        for name, kind in (("boundaries", int), ("classes", str)):
            if any(type(value) is not kind for value in facts.get(name, ())):
                raise ValueError(f"{name}: {facts[name]!r}")
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged ({error}): {_way_out(workdir)}") from error
    return facts


def recorded(workdir: Path) -> dict[str, Any] | None:
    """What a run has recorded of itself, as JSON can hold it; None if there is no run.

    The newest checkpoint says it. ``config.json`` and ``facts.json`` are copies for readers, asked
    where no checkpoint says it: before the first one, and in workdirs of older versions.

    Returns:
      {"id", "config", "facts", "given"}; see `save_record`. Without a checkpoint nothing has been
      learned and there are no facts yet.

    Raises:
      ConfigError: if a file is damaged, or if nothing says which run the checkpoints are of.
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
      given: what was given in place of what the config names; see `names_of`.
      setup: what the config describes.
      source: what the run learns from.
      workdir: of the run.

    Returns:
      What checkpoints are to hold of it, {"id", "config", "facts", "given"}.
    """
    if processes.is_first():
        save_facts(setup, source, workdir, run)
        save_config(config, workdir, given)
    found = facts(setup, source)
    return {"id": run, "config": config.to_dict(), "facts": found, "given": dict(given)}


def names_of(given: Mapping[str, Any]) -> dict[str, str]:
    """What a workdir records of objects that were given in place of what the config names.

    Args:
      given: the objects, by the names of the arguments of `train.train`.
    """
    kinds = {name: type(value) for name, value in given.items()}
    return {name: f"{kind.__module__}.{kind.__qualname__}" for name, kind in kinds.items()}


def check_run(
    before: dict[str, Any], config: ConfigDict, given: Mapping[str, str], workdir: Path
) -> None:
    """Checks that a run goes on with its own config and with what it was given.

    Args:
      before: what the workdir has `recorded`.
      config: the config now.
      given: what is given now in place of what the config names; see `names_of`.
      workdir: of the run.

    Raises:
      ConfigError: naming what differs.
    """
    there = before["given"]
    if there != given:
        named = lambda some: ", ".join(f"{name} = {kind}" for name, kind in sorted(some.items()))
        arguments = ", ".join(f"{name}=..." for name in sorted(there))
        way = f"call it from Python with {arguments}" if there else "leave that out"
        raise ConfigError(
            f"the run in {workdir} was given {named(there) or 'nothing'} in place of what its "
            f"config names, and now {named(given) or 'nothing'} is given: {way}, or choose another "
            "workdir"
        )
    config_lib.check_same(config_lib.from_json(before["config"]), config, workdir)


@contextlib.contextmanager
def alone(workdir: Path) -> Iterator[Callable[[], None]]:
    """Keeps other runs out of a workdir while this one, of however many processes, is in it.

    Yields:
      A function that raises a CheckpointError once the workdir is no longer the one that was
      locked.

    Raises:
      InUseError: if another run is in it.
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
                    "in it: it ends here, and nothing more is saved"
                )

        try:
            yield check
        except BaseException:
            # A start that is refused leaves nothing.
            with contextlib.suppress(OSError):
                if processes.is_first() and is_held() and os.listdir(workdir) == [".lock"]:
                    (workdir / ".lock").unlink()
                    for folder in new:
                        folder.rmdir()
            raise


def load_facts(workdir: Path) -> dict[str, Any]:
    """The facts of the run in a workdir, by the arguments of `build`.

    Raises:
      ConfigError: if they are not there.
    """
    facts = _facts(workdir)
    return {name: facts[name] for name in ("channels", "num_classes", "boundaries")}


def _facts(workdir):
    there = _read_facts(workdir)
    record = checkpoint.read_record(workdir / "checkpoints", run=there.get("id", ""))
    facts = there if record is None else record["facts"]
    for name in ("channels", "num_classes", "boundaries"):
        if name not in facts:
            raise ConfigError(
                f"{workdir / 'facts.json'} is not there or without {name!r}: bring it back"
            )
    return facts


def check_data(before: dict[str, Any], source: data.Source, workdir: Path) -> None:
    """Checks that a run goes on with what it has learned from.

    Another number of images in the same classes is a warning: images are added on purpose, and the
    labels mean the same. But the batches are others from then on.

    Args:
      before: facts of the run.
      source: what there is now.
      workdir: of the run.

    Raises:
      ConfigError: if the classes are others, so that labels would mean something else, or if they
        are latents of another encoder.
    """
    now = source.facts()
    classes, others = before.get("classes"), now.get("classes")
    if classes is not None and others is not None and classes != others:
        gone = [name for name in classes if name not in others]
        new = [name for name in others if name not in classes]
        what = "; ".join(
            f"{word}: {', '.join(map(repr, names[:5]))}{', ...' if names[5:] else ''}"
            for word, names in (("gone", gone), ("new", new))
            if names
        )
        raise ConfigError(
            f"the run in {workdir} has learned other classes than {source.name} has "
            f"({what or 'another order'}): labels would mean something else. Give the folders the "
            "names that they had, or choose another --workdir"
        )
    words = {
        "num_classes": "number of classes",
        "channels": "number of channels",
        "encoder": "encoder of the latents",
    }
    others = before.keys() - words.keys() - {"num_images", "classes", "boundaries"}
    for name in (*words, *sorted(others)):
        what = words.get(name, name)
        if name in before and before[name] != now.get(name):
            raise ConfigError(
                f"the run in {workdir} has learned from other data than {source.name}: {what} "
                f"{before[name]} there, {now.get(name)} now; choose another --workdir, or that data"
            )
    count = before.get("num_images", now["num_images"])
    if count != now["num_images"]:
        logging.warning(
            "%s has %d images now, and had %d when the run in %s was last there: its batches are "
            "others from here on, and it is no longer the run that it would have been. If that is "
            "not meant, stop it and bring back the images",
            source.name,
            now["num_images"],
            count,
            workdir,
        )


def check_encoder(config: ConfigDict, workdir: Path) -> None:
    """Raises a ConfigError if a run learned latents of another encoder than the config names."""
    if not config.autoencoder.name:
        return
    there = _facts(workdir).get("encoder")
    now = dataset.open_codec(config).encoder_digest
    if there != now:
        raise ConfigError(
            f"config.autoencoder.weights = {config.autoencoder.weights!r}: the run in {workdir} "
            f"learned latents of another encoder, {there}, not {now}"
        )


def restore(
    config: ConfigDict, setup: Setup, workdir: Path, step: int | None = None
) -> tuple[int, TrainState] | None:
    """The newest intact checkpoint of a run, or that of a step, on this process's devices.

    Returns:
      (step, state), or None if there is no checkpoint.

    Raises:
      ConfigError: if the checkpoint was saved with another config. See `checkpoint.restore` for
        what else it raises.
    """
    directory, template = workdir / "checkpoints", abstract_state(config, setup)
    # Process 0 chooses; what the others see of the disk may be older.
    run = _read_facts(workdir).get("id", "") if processes.is_first() else ""
    restored = _restore(directory, template, step, run)
    if restored is not None:
        record = processes.broadcast_from_first(
            lambda: checkpoint.read_record(directory, restored[0])
        )
        if record is not None:
            there = config_lib.from_json(record["config"])
            config_lib.check_same(there, config, directory / str(restored[0]))
    return restored


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


class Run(NamedTuple):
    """What is left of a run.

    Attributes:
      config: its config.
      step: of its newest checkpoint.
      params: the moving average of the parameters then, NumPy arrays in nested dicts.
      metrics: what ``metrics.jsonl`` holds, an array by name, NaN where nothing was measured; the
        first axis is that of the lines, whose steps are ``metrics["step"]``.
      samples: uint8 images (n, H, W, C) that ``--mode sample`` has drawn from that step, and int32
        labels (n,) or None; None where it has drawn none.
    """

    config: ConfigDict
    step: int
    params: dict[str, Any]
    metrics: dict[str, np.ndarray]
    samples: tuple[np.ndarray, np.ndarray | None] | None


def load_run(workdir: str | os.PathLike) -> Run:
    """What is left of a run, as NumPy arrays; nothing is compiled.

    Raises:
      FileNotFoundError: if there is no run in the workdir, or no checkpoint yet.
      ConfigError: if a file is damaged.
      CheckpointError: if no checkpoint is intact.
    """
    workdir = user_path(workdir)
    known = recorded(workdir)
    if known is None:
        raise FileNotFoundError(f"no run in {workdir}: it has no config.json and no checkpoints")
    restored = checkpoint.restore_part(workdir / "checkpoints", "ema_params", known["id"])
    if restored is None:
        raise FileNotFoundError(f"no checkpoint in {workdir}: its run has saved none yet")
    step, params = restored
    path = workdir / "metrics.jsonl"
    metrics = _columns(logs.read(path)) if path.exists() else {}
    return Run(
        config_lib.from_json(known["config"]), step, params, metrics, _samples(workdir, step)
    )


def _columns(rows):
    """An array for each name, of shape (rows, ...), with NaN where there is nothing."""
    columns = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        shapes = [np.shape(value) for value in values if value is not None]
        nothing = np.full(shapes[0] if shapes else (), np.nan)
        filled = [nothing if value is None else value for value in values]
        columns[name] = np.array(filled, np.int64 if name == "step" else np.float64)
    return columns


def _samples(workdir, step):
    paths = sorted(workdir.glob(f"samples/{step:08d}*.npz"), key=lambda path: path.stat().st_mtime)
    if not paths:
        return None
    with np.load(paths[-1]) as stored:
        return stored["arr_0"], stored.get("arr_1")
