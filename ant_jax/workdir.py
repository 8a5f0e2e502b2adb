"""What a workdir records of its run: its config, what it found out when it began, its state."""

import json
import os
from pathlib import Path
from typing import Any

from absl import logging
from ml_collections import ConfigDict

from ant_jax import config as config_lib
from ant_jax import data
from ant_jax.config import ConfigError
from ant_jax.experiment import Experiment, abstract_state
from ant_jax.latents import codec as codec_lib
from ant_jax.latents.shards import LatentSource
from ant_jax.runtime import checkpoint, processes
from ant_jax.runtime.files import write_bytes
from ant_jax.train_step import TrainState


def save_config(config: ConfigDict, workdir: str | os.PathLike) -> None:
    """Writes ``config.json``, by which a workdir describes itself."""
    content = json.dumps(config.to_dict(), indent=2) + "\n"
    write_bytes(Path(workdir) / "config.json", content.encode())


def load_config(workdir: str | os.PathLike) -> ConfigDict | None:
    """The config of the run in a workdir; None if there is no run.

    It is that of ``config.json``, or, where there is none, that of the newest checkpoint.

    Raises:
      ConfigError: if ``config.json`` is damaged.
    """
    path = Path(workdir) / "config.json"
    if not path.exists():
        record = checkpoint.read_record(Path(workdir) / "checkpoints")
        return None if record is None else config_lib.from_json(record["config"])
    try:
        return config_lib.from_json(json.loads(path.read_bytes()))
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged ({error}): {_way_out(workdir)}") from error


def _way_out(workdir: str | os.PathLike) -> str:
    """What to do about a damaged file in which a workdir describes itself."""
    if checkpoint.read_record(Path(workdir) / "checkpoints") is None:
        return "mend it or bring it back, for no checkpoint holds what it says"
    return "remove it, for checkpoints hold what it says"


def facts(pieces: Experiment, source: data.Source) -> dict[str, Any]:
    """What a run finds out when it begins."""
    return _facts_of_data(source) | {"boundaries": pieces.method.boundaries.tolist()}


def save_facts(
    pieces: Experiment, source: data.Source, workdir: Path, run: str = ""
) -> dict[str, Any]:
    """Writes ``facts.json``: the run's id and what it found out when it began; returns the facts.

    Args:
      pieces: of the run.
      source: what it learns from.
      workdir: of the run.
      run: its id; "" for one that has none.
    """
    found = facts(pieces, source)
    write_bytes(workdir / "facts.json", json.dumps({"id": run} | found).encode())
    return found


def _facts_of_data(source):
    facts = {
        "channels": source.image_shape[-1],
        "num_classes": source.num_classes,
        "num_images": len(source),
    }
    if isinstance(source, data.FolderSource):
        facts["classes"] = list(source.classes)
    if isinstance(source, LatentSource):
        facts["encoder"] = source.facts.digest
    return facts


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
      {"id", "config", "facts"}. Without a checkpoint nothing has been learned and there are no
      facts yet.

    Raises:
      ConfigError: if a file is damaged, or if nothing says which run the checkpoints are of.
    """
    facts, directory = _read_facts(workdir), workdir / "checkpoints"
    record = checkpoint.read_record(directory, run=facts.get("id", ""))
    if record is not None:
        return {name: record[name] for name in ("id", "config", "facts")}
    has_checkpoints = bool(checkpoint.checkpoint_steps(directory))
    if not (workdir / "config.json").exists():
        if not has_checkpoints:
            return None
        raise ConfigError(
            f"{workdir} has checkpoints and no config.json: bring it back, or choose another "
            "--workdir"
        )
    config = json.loads(json.dumps(load_config(workdir).to_dict()))
    run = facts.pop("id", "")
    return {"id": run, "config": config, "facts": facts if has_checkpoints else {}}


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
    now = _facts_of_data(source)
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
    for name, what in (
        ("num_classes", "number of classes"),
        ("channels", "number of channels"),
        ("encoder", "encoder of the latents"),
    ):
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
    now = codec_lib.load(config).encoder_digest
    if there != now:
        raise ConfigError(
            f"config.autoencoder.weights = {config.autoencoder.weights!r}: the run in {workdir} "
            f"learned latents of another encoder, {there}, not {now}"
        )


def restore(
    config: ConfigDict, experiment: Experiment, workdir: Path, step: int | None = None
) -> tuple[int, TrainState] | None:
    """The newest intact checkpoint of a run, or that of a step, on this process's devices.

    Returns:
      (step, state), or None if there is no checkpoint.

    Raises:
      ConfigError: if the checkpoint was saved with another config. See `checkpoint.restore` for
        what else it raises.
    """
    directory, template = workdir / "checkpoints", abstract_state(config, experiment)
    # Process 0 chooses; what the others see of the disk may be older.
    run = _read_facts(workdir).get("id", "") if processes.is_first() else ""
    restored = checkpoint.restore(directory, template, step, run)
    if restored is not None:
        record = processes.broadcast_from_first(
            lambda: checkpoint.read_record(directory, restored[0])
        )
        if record is not None:
            there = config_lib.from_json(record["config"])
            config_lib.check_same(there, config, directory / str(restored[0]))
    return restored
