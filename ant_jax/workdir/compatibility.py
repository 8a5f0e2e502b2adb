"""Checks that a config and the data fit the run in a workdir."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import logging
from ml_collections import ConfigDict

from ant_jax import config as config_lib
from ant_jax import data, dataset
from ant_jax import workdir as workdir_lib
from ant_jax.config import ConfigError


def check_config(
    before: dict[str, Any], config: ConfigDict, given: Mapping[str, str], workdir: Path
) -> None:
    """Checks that a run goes on with the same config and the same objects from Python.

    Args:
      before: the record of the run; see `workdir.recorded`.
      config: the config now.
      given: names of the objects that replace those of the config now; see `workdir.names_of`.
      workdir: of the run.

    Raises:
      ConfigError: if something differs; the message names it.
    """
    there = before["given"]
    if there.keys() != given.keys() or not all(_alike(there[name], given[name]) for name in given):
        named = lambda some: ", ".join(f"{name} = {kind}" for name, kind in sorted(some.items()))
        arguments = ", ".join(f"{name}=..." for name in sorted(there))
        way = f"call it from Python with {arguments}" if there else "leave that out"
        raise ConfigError(
            f"the run in {workdir} was given {named(there) or 'nothing'} in place of what its "
            f"config names, and now {named(given) or 'nothing'} is given: {way}, or choose another "
            "workdir"
        )
    config_lib.check_same(config_lib.from_json(before["config"]), config, workdir)


def _alike(one, other):
    """Whether two names may be of one class: in a script its module is ``__main__``."""
    pairs = ((one, other), (other, one))
    own = lambda name: name.startswith("__main__.")
    return one == other or any(
        own(name) and there.endswith(name.removeprefix("__main__")) for name, there in pairs
    )


def check_data(before: dict[str, Any], source: data.Source, workdir: Path) -> None:
    """Checks that a run goes on with the data that it has learned from.

    If only the images or their number differ, it logs a warning: users add images on purpose, and
    the labels keep their meaning, but the batches change.

    Args:
      before: facts of the run.
      source: the data now.
      workdir: of the run.

    Raises:
      ConfigError: if the classes differ, so that labels would change their meaning, if the data are
        latents of another encoder, or if another fact differs.
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
            f"({what or 'another order'}): labels would mean something else. Give the folders "
            "their old names, or choose another --workdir"
        )
    words = {
        "num_classes": "number of classes",
        "channels": "number of channels",
        "encoder": "encoder of the latents",
    }
    others = before.keys() - words.keys() - {"num_images", "fingerprint", "classes", "boundaries"}
    for name in (*words, *sorted(others)):
        what = words.get(name, name)
        if name in before and before[name] != now.get(name):
            raise ConfigError(
                f"the run in {workdir} has learned from other data than {source.name}: {what} "
                f"{before[name]} there, {now.get(name)} now; use that data, or choose "
                "another --workdir"
            )
    count = before.get("num_images", now["num_images"])
    if count != now["num_images"]:
        logging.warning(
            "%s has %d images now, and had %d when the run in %s last trained: its batches change "
            "from here on, so it will not equal an uninterrupted run. If you did not intend this, "
            "stop it and bring back the images",
            source.name,
            now["num_images"],
            count,
            workdir,
        )
    # A source of a user may have none.
    elif len({each["fingerprint"] for each in (before, now) if each.get("fingerprint")}) == 2:
        logging.warning(
            "%s has other images than those that the run in %s has learned from: if you did not "
            "intend this, stop it, and choose another --workdir or bring back the images",
            source.name,
            workdir,
        )


def check_encoder(config: ConfigDict, workdir: Path) -> None:
    """Raises a ConfigError if a run has learned latents of another encoder than the config's."""
    if not config.autoencoder.name:
        return
    there = workdir_lib.facts_of(workdir).get("encoder")
    now = dataset.open_codec(config).encoder_digest
    if there != now:
        raise ConfigError(
            f"config.autoencoder.weights = {config.autoencoder.weights!r}: the run in {workdir} "
            f"learned latents of another encoder, {there}, not {now}"
        )
