"""Encodes a data set into latents, once before training."""

import contextlib
import itertools
import json
from collections.abc import Generator
from pathlib import Path

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from ant_jax import config as config_lib
from ant_jax import data, dataset
from ant_jax.config import ConfigError
from ant_jax.data.pipeline import epoch_order
from ant_jax.latents import codec as codec_lib
from ant_jax.latents.shards import LatentInfo, as_kept, complete, shard_path, write_shard
from ant_jax.runtime import logs, processes
from ant_jax.runtime.files import write_bytes
from ant_jax.runtime.lock import job_lock
from ant_jax.runtime.progress import with_time_left
from ant_jax.settings import Affects

_FINGERPRINT = "fingerprint of the images"
# Images per shard. A kill loses at most one shard: 33 MB for KL-f8 and images of 256 x 256 pixels.
_SHARD = 1024
# A fixed shuffle: the trainer shuffles the latents again.
_ORDER_SEED = 0


def encode(config: ConfigDict) -> Path:
    """Encodes the images of ``config.data`` and their mirror images.

    If the folder has shards of an earlier call, only the missing shards are made. Several processes
    divide the shards among themselves.

    Returns:
      The folder of the latents: ``config.autoencoder.latents``, then the split.

    Raises:
      ConfigError: if settings don't match each other, or if the folder is damaged or was started
        with other settings.
      InUseError: if another job encodes into the same folder.
      OSError: if a shard cannot be written.
    """
    logs.show_progress()
    config_lib.validate(config)
    settings = config.autoencoder
    if not settings.name:
        raise ConfigError("--mode encode needs config.autoencoder.name")
    if config.data.crop == "random":
        raise ConfigError("config.data.crop = 'random' can't be encoded: use 'center'")
    shape = dataset.latent_shape(config)
    source = dataset.open_images(config, config.data.split)
    codec = dataset.open_codec(config)
    directory = dataset.latents_folder(config, config.data.split)
    processes.assert_equal(
        lambda: {
            "number of images": len(source),
            "number of classes": source.num_classes,
            "encoder of config.autoencoder.weights": codec.encoder_digest,
        }
    )
    processes.check_shared(directory)
    with job_lock(
        directory / ".lock",
        f"is encoding into {directory}",
        "wait for it, stop it, or choose another config.autoencoder.latents",
    ):
        _encode(config, source, codec, directory, shape)
    return directory


def _encode(config, source, codec, directory, shape):
    settings = config.autoencoder
    missing = processes.broadcast_from_first(lambda: _plan(config, directory, codec, source))
    mine = _share(missing)
    if mine:
        logging.info(
            "encoding %d images, %d shards to go, into %s; the encoder compiles first ...",
            len(source),
            len(mine),
            directory,
        )
        _encode_shards(config, source, codec, directory, mine)
    processes.barrier()
    if processes.is_first():
        for shard in missing:
            path = shard_path(directory, shard)
            if not processes.wait_for_file(path):
                raise OSError(f"another process made {path}, but it does not appear on this disk")
        info = LatentInfo(
            autoencoder=settings.name,
            digest=codec.encoder_digest,
            image_size=config.data.image_size,
            shape=shape,
            parts=1 if codec.model.codebook else 2,
            num_images=len(source),
            num_classes=source.num_classes,
            std=0.0,
            data=dataset.source_name(config),
            crop=config.data.crop,
            exif=config.data.get("exif", "ignore"),
            origin=repr(source),
        )
        try:
            std = complete(directory, info).std
        except ValueError as error:
            raise ConfigError(f"config.autoencoder.latents: {error}") from error
        logging.info(
            "%d latents of %s with a standard deviation of %.3f: %s; config.autoencoder.scale = "
            "%.5g makes it %.2f, about 1 is right",
            len(source),
            "x".join(map(str, shape)),
            std,
            directory,
            settings.scale,
            std * settings.scale,
        )


def _share(shards):
    """The contiguous part of the missing shards that this process makes."""
    process, count = jax.process_index(), jax.process_count()
    return shards[len(shards) * process // count : len(shards) * (process + 1) // count]


def _plan(config, directory, codec, source):
    """The missing shards of a folder; checks that it was started with the same settings."""
    others = {"data.name", "data.builder", "data.flip", "data.batch_size"}
    fingerprint = source.facts().get("fingerprint")
    # Where the images are: the paths.
    places = {
        name: value
        for name, value in config_lib.flatten(config).items()
        if name.startswith("data.")
        and name in config_lib.per_process_settings(config)
        and isinstance(value, str)
    }
    plan = {
        "autoencoder.name": config.autoencoder.name,
        "digest of the encoder": codec.encoder_digest,
        "number of images": len(source),
        "data.name": dataset.source_name(config),
        # As for a run, the folder of the images may change, and whether to replace damaged ones.
        **{
            name: value
            for name, value in config_lib.affecting(config, Affects.PARAMETERS).items()
            if name.startswith("data.") and name not in others
        },
        **places,
        **({_FINGERPRINT: fingerprint} if fingerprint else {}),
    }
    path = directory / "plan.json"
    if path.is_file():
        try:
            # A plan of an older version does not have this setting.
            before = {"data.exif": "ignore"} | json.loads(path.read_text())
        # Deeply nested JSON raises a RecursionError.
        except (ValueError, TypeError, RecursionError) as error:
            raise ConfigError(
                f"{path} is damaged, so the settings of its latents are unknown: {error}. "
                "Choose another config.autoencoder.latents"
            ) from error
        # Without a fingerprint, as older versions had none, the place stands for the images.
        known = _FINGERPRINT in before and _FINGERPRINT in plan
        ignored = places if known else {_FINGERPRINT}
        differing = [
            f"{name}: {before.get(name)!r} there, {value!r} now"
            for name, value in plan.items()
            if name not in ignored and before.get(name) != value
        ]
        if differing:
            raise ConfigError(
                f"the latents in {directory} were started with other settings: "
                f"{'; '.join(differing)}. Choose another config.autoencoder.latents"
            )
    else:
        write_bytes(path, (json.dumps(plan, indent=1) + "\n").encode())
    shards = range(-(-len(source) // _SHARD))
    return [shard for shard in shards if not shard_path(directory, shard).exists()]


def _encode_shards(config, source, codec, directory, shards):
    # Each run of consecutive shards is read as one stream.
    for _, run in itertools.groupby(enumerate(shards), lambda pair: pair[1] - pair[0]):
        run = [shard for _, shard in run]
        total = sum(_images_in(shard, source) for shard in run)
        with contextlib.closing(_encoded(config, source, codec, run[0], total)) as batches:
            rows = _rows(with_time_left(batches, total, "images encoded"), source, run[0] * _SHARD)
            for shard in run:
                some = itertools.islice(rows, _images_in(shard, source))
                write_shard(shard_path(directory, shard), some)


def _images_in(shard, source):
    return min(_SHARD, len(source) - shard * _SHARD)


def _rows(batches, source, first):
    """The array and the label of each image, from position `first` in the encoding order."""
    position = first
    for means, stds, labels in batches:
        for i, label in enumerate(labels):
            try:
                numbers = as_kept(means[i], None if stds is None else stds[i])
            except FloatingPointError as error:
                index = epoch_order(len(source), _ORDER_SEED, 0)[position]
                raise FloatingPointError(
                    f"example {index} of {source!r}: {error}. Are config.autoencoder.weights those "
                    "of a trained autoencoder?"
                ) from error
            yield numbers, label
            position += 1


def _encoded(config, source, codec, first_shard, total) -> Generator[tuple, None, None]:
    """Batches of means, standard deviations or None, (B, 2, h, w, c), and labels (B,)."""
    batch_size = config.autoencoder.batch_size
    batches = data.batches(
        source,
        batch_size=batch_size,
        seed=_ORDER_SEED,
        start_step=first_shard * _SHARD // batch_size,
        image_size=config.data.image_size,
        crop=config.data.crop,
        replace_unreadable=config.data.replace_unreadable,
        num_workers=config.data.num_workers,
    )
    pending, replaced = None, 0
    with contextlib.closing(batches):
        for first in range(0, total, batch_size):
            batch = next(batches)
            keep = min(batch_size, total - first)
            replaced += int(batch.get("replaced", np.zeros(0))[:keep].sum())
            # Fetches a batch while the device encodes the next.
            before, pending = pending, (_start(codec, batch["image"]), batch["label"][:keep])
            if before is not None:
                yield _fetch(codec, *before)
    if pending is not None:
        yield _fetch(codec, *pending)
    if replaced:
        logging.warning("%d unreadable images were replaced by the next readable image", replaced)


def _start(codec, images):
    both = np.stack([images, images[:, :, ::-1]], axis=1).reshape(-1, *images.shape[1:])
    padding = -len(both) % jax.local_device_count()
    return codec_lib.encode(codec, np.pad(both, ((0, padding), (0, 0), (0, 0), (0, 0))))


def _fetch(codec, latent, labels):
    views = lambda part: np.asarray(part)[: 2 * len(labels)].reshape(-1, 2, *part.shape[1:])
    return views(latent.mean), None if codec.model.codebook else views(latent.std), labels
