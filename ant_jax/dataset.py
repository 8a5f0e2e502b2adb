"""Opens the data of a config: images or their latents."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from absl import logging
from ml_collections import ConfigDict

from ant_jax import config as config_lib
from ant_jax import data, pixels
from ant_jax.config import ConfigError
from ant_jax.latents import codec as codec_lib
from ant_jax.latents.codec import Codec
from ant_jax.latents.shards import LatentSource, latents
from ant_jax.runtime.files import user_path, words_of


def open_data(config: ConfigDict, split: str | None = None) -> data.Source:
    """The data that the network is trained on, images or latents; of the training split by default.

    Raises:
      ConfigError: naming the setting, if the data can't be opened, or if the latents were made with
        other settings.
    """
    wanted = config.data.split if split is None else split
    return open_latents(config, wanted) if config.autoencoder.name else open_images(config, wanted)


def latents_folder(config: ConfigDict, split: str) -> Path:
    """The folder of the latents of a split."""
    return user_path(config.autoencoder.latents) / (quote(split, safe="") or "_")


def open_latents(config: ConfigDict, split: str) -> LatentSource:
    """The latents of a split; see `open_data`."""
    settings = config.autoencoder
    directory = latents_folder(config, split)
    try:
        source = latents(directory, settings.scale)
    except (ValueError, FileNotFoundError) as error:
        # --mode encode makes the latents of one split.
        hint = "" if split == config.data.split else f" with config.data.split = {split!r}"
        raise ConfigError(
            f"config.autoencoder.latents = {settings.latents!r}: {error}{hint}"
        ) from error
    info = source.info
    for name, there, now in (
        ("autoencoder.name", info.autoencoder, settings.name),
        ("data.name", info.data, source_name(config)),
        ("data.crop", info.crop, config.data.crop),
        ("data.exif", info.exif, config.data.get("exif", "ignore")),
        ("data.image_size", info.image_size, config.data.image_size),
        ("autoencoder.name, shape of latents", info.shape, latent_shape(config)),
        ("autoencoder.weights, encoder", info.digest, open_codec(config).encoder_digest),
    ):
        if there != now:
            raise ConfigError(
                f"the latents in {directory} were made with config.{name} {there!r}, not {now!r}"
            )
    std = info.std * settings.scale
    if not 0.5 < std < 2:
        logging.warning(
            "config.autoencoder.scale = %g gives the latents a standard deviation of %.2g; "
            "%.3g would make it 1, which noise schedules assume",
            settings.scale,
            std,
            1 / info.std,
        )
    return source


def pipeline_settings(config: ConfigDict) -> dict[str, Any]:
    """The arguments of `data.batches` for a source of `open_data`."""
    settings = config.data
    if config.autoencoder.name:
        return {"replace_unreadable": settings.replace_unreadable}
    return {
        "image_size": settings.image_size,
        "crop": settings.crop,
        "replace_unreadable": settings.replace_unreadable,
    }


def open_images(config: ConfigDict, split: str) -> data.Source:
    """The images of a split, even if the network is trained on latents.

    Raises:
      ConfigError: naming the setting, if the images can't be opened.
    """
    settings = config.data
    try:
        source = config_lib.build(config, "data", split=split)
    except ConfigError as error:
        said = str(error).removeprefix("config.data: ")
        where = f", config.data.split = {split!r}" if split == settings.split else ""
        for place in ("dir", "file"):
            if settings.get(place):
                where += f", config.data.{place} = {settings[place]!r}"
        raise ConfigError(f"config.data.name = {settings.name!r}{where}: {said}") from error
    try:
        data.check_crop(source, settings.crop, settings.image_size)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return source


def source_name(config: ConfigDict) -> str:
    """The name of a config's source, followed by its builder if it has one."""
    settings = config.data
    return f"{settings.name}:{settings.builder}" if "builder" in settings else settings.name


def open_codec(config: ConfigDict) -> Codec:
    """The autoencoder of a config; cached.

    Raises:
      ConfigError: if its weights can't be read or are those of another network.
    """
    settings = config.autoencoder
    try:
        return codec_lib.load(settings.name, settings.weights)
    except (ValueError, OSError) as error:
        path = str(user_path(settings.weights))
        raise ConfigError(f"config.autoencoder.weights = {path!r}: {words_of(error)}") from error


def decoder(config: ConfigDict) -> Callable[[np.ndarray], np.ndarray] | None:
    """The function that decodes samples to uint8 images; None for diffusion in pixels.

    Raises:
      ConfigError: if the autoencoder's weights can't be used.
    """
    settings = config.autoencoder
    if not settings.name:
        return None
    codec = open_codec(config)
    return lambda latents: codec_lib.decode(
        codec, latents / np.float32(settings.scale), settings.batch_size
    )


def latent_shape(config: ConfigDict) -> tuple[int, int, int]:
    """The shape (h, w, c) of the latent of an image of ``config.data.image_size``.

    Raises:
      ConfigError: if the autoencoder can't encode images of this size.
    """
    try:
        return codec_lib.latent_shape(config.autoencoder.name, config.data.image_size)
    except ValueError as error:
        raise ConfigError(f"config.data.image_size = {error}") from error


def images(config: ConfigDict, split: str, num: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `num` images or latents of a fixed shuffle of a split, or all if there are fewer.

    Returns:
      float32 (num, H, W, C), in [-1, 1] for pixels, and int32 labels (num,).

    Raises:
      ConfigError: naming the setting, if the data can't be opened.
    """
    source = open_data(config, split)
    batches = data.batches(
        source, batch_size=min(num, len(source)), seed=0, **pipeline_settings(config)
    )
    batch = next(batches)
    return pixels.normalize(batch["image"]), batch["label"]
