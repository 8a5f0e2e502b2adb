"""What a config's samples are judged by, ready before any is drawn."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from absl import logging
from ml_collections import ConfigDict

from ant_jax import data, evaluation
from ant_jax.config import ConfigError
from ant_jax.latents import dataset
from ant_jax.runtime.files import user_path
from ant_jax.runtime.progress import with_time_left
from ant_jax.sampling.cache import Batch


class Judge(NamedTuple):
    """What measures samples.

    Attributes:
      measure: From batches of samples to figures.
      made_from: What the figures depend on beside the samples and the settings.
    """

    measure: Callable[[Iterator[Batch]], dict[str, Any]]
    made_from: dict[str, Any]


_WEIGHTS = (
    "config.evaluation.features = 'inception' needs config.evaluation.inception = PATH of the "
    "weights: pt_inception-2015-12-05-6726825d.pth of the release fid_weights of "
    "github.com/mseitzer/pytorch-fid, or weights-inception-2015-12-05-6726825d.pth of the release "
    "v0.2.0 of github.com/toshas/torch-fidelity"
)


def check(config: ConfigDict) -> None:
    """Checks what can be checked before a run is restored and samples are drawn.

    Raises:
      ConfigError: If there is nothing to measure, or what it would be measured by is not named, or
        is not there, or can't judge such images.
    """
    settings = config.evaluation
    if not settings.features and (settings.samples or not settings.split):
        split = "" if settings.samples else "; or config.evaluation.split the held-out images"
        raise ConfigError(
            "there is nothing to measure by: config.evaluation.features must be 'inception', or "
            f"'digits' for those{split}"
        )
    files = ["samples"]
    if settings.features == "inception":
        if not settings.inception:
            raise ConfigError(_WEIGHTS)
        files += ["inception", "reference"]
    if settings.features and not settings.samples and config.sample.num < 2:
        raise ConfigError(f"config.sample.num = {config.sample.num}: figures need 2 samples")
    for name in files:
        path = settings[name]
        if path and not user_path(path).is_file():
            raise ConfigError(f"config.evaluation.{name} = {path!r}: there is no such file")
    if settings.features == "digits" and (config.data.image_size != 8 or config.autoencoder.name):
        raise ConfigError(
            "config.evaluation.features = 'digits' judges grey images of 8x8 pixels, and "
            f"config.data.image_size = {config.data.image_size}, config.autoencoder.name = "
            f"{config.autoencoder.name!r}: set it to 'inception' or ''"
        )
    if settings.split and not settings.samples:
        try:
            dataset.open_data(config, settings.split)
        except ConfigError as error:
            raise ConfigError(f"config.evaluation.split = {settings.split!r}: {error}") from error


def build(config: ConfigDict) -> Judge:
    """What ``config.evaluation.features`` measures by.

    With Inception, the reference is read, or computed from the training data, right away.

    Raises:
      ConfigError: If a file that the config names is not what it should be.
    """
    settings = config.evaluation
    if settings.features == "digits":
        model = evaluation.extractor(settings.features)
        floor = {f"real_{name}": value for name, value in evaluation.real_floor(model).items()}
        return Judge(lambda batches: evaluation.sample_metrics(batches, model) | floor, {})
    try:
        network = evaluation.load_inception(user_path(settings.inception))
    except (ValueError, OSError) as error:
        raise ConfigError(f"config.evaluation.inception: {error}") from error
    reference = _reference(config, network)

    def measure(batches):
        figures = evaluation.image_metrics(batches, network, reference)
        return figures | {"reference": reference.name}

    return Judge(measure, {"inception": network.digest[:16]})


def table(result: dict[str, Any]) -> str:
    """The figures of the field as a line under their names."""
    columns = {
        "FID": ("fid", ".3f"),
        "sFID": ("sfid", ".3f"),
        "IS": ("inception_score", ".2f"),
        "precision": ("precision", ".3f"),
        "recall": ("recall", ".3f"),
        "samples": ("num_samples", "d"),
        "reference": ("reference", "s"),
    }
    cells = {
        title: format(result[name], form) if name in result else "-"
        for title, (name, form) in columns.items()
    }
    widths = {title: max(len(title), len(cell)) for title, cell in cells.items()}
    lines = (
        "  ".join(each[title].rjust(width) for title, width in widths.items())
        for each in ({title: title for title in cells}, cells)
    )
    return "\n".join(lines)


def _reference(config, network):
    settings, batch_size = config.evaluation, config.sample.batch_size
    if settings.reference:
        logging.info("reference: %s", settings.reference)
        try:
            return evaluation.read_reference(user_path(settings.reference), network, batch_size)
        except (ValueError, OSError) as error:
            raise ConfigError(f"config.evaluation.reference: {error}") from error
    settings = config.data
    source = dataset.open_images(config, config.data.split)
    num = len(source)
    name = f"{settings.name}[{settings.split}]" if settings.split else settings.name
    # Samples are compared with images as they are: neither mirrored nor cropped at random.
    crop = "none" if settings.crop == "none" else "center"

    def images():
        size = min(batch_size, num)
        batches = data.batches(
            source,
            batch_size=size,
            seed=0,
            image_size=settings.image_size,
            crop=crop,
            replace_unreadable=settings.replace_unreadable,
            num_workers=settings.num_workers,
        )
        # The first epoch has each image once; its last batch goes on into the second.
        parts = ((next(batches)["image"][: num - first],) for first in range(0, num, size))
        for (part,) in with_time_left(parts, num, f"images of {name}"):
            yield part

    key = {
        "name": settings.name,
        "dir": str(user_path(settings.dir).absolute()) if settings.dir else "",
        "split": settings.split,
        "num": num,
        "size": settings.image_size,
        "crop": crop,
        "exif": settings.exif,
    }
    if num < 2:
        raise ConfigError(f"config.data: {source!r} has {num} image, and a reference needs 2")
    return evaluation.data_reference(name, images, network, key)
