"""A small diffusion transformer on a folder of your own images, at 64x64 pixels.

  python -m ant_jax.main --config configs/folder64.py --config.data.dir=DIR
  python -m ant_jax.main --config configs/folder64.py:uncertainty --config.data.dir=DIR

DIR holds JPEG, PNG or WebP files. If there is a subfolder for each class, add
--config.model.conditional=True. If there is also a folder for each split, as in
DIR/train/CLASS/*.jpg, add --config.data.split=train. As in ADM, the EXIF orientation of photographs
is ignored; --config.data.exif=apply applies it. Transparent pixels get their stored colour, which
is often black: put such images on a background first. Images of more than 134 million pixels are
an error.

Hardware: one GPU; a step takes seconds on CPUs.
The settings are a starting point and not tuned, so there is no expected result.
"""

from ant_jax.config import update
from configs import digits


def get_config(argument: str = "nash,snr"):
    """The config for METHOD or METHOD,CLUSTERS; ``docs/settings.md`` lists all settings."""
    config = digits.get_config(argument)
    update(config, {"data.name": "folder", "evaluation.features": ""})
    config.num_steps = 100_000
    config.data.split = ""
    config.data.image_size = 64
    config.data.crop = "center"
    config.data.flip = True
    config.data.num_workers = 2
    config.model.width = 384
    config.model.depth = 8
    config.model.heads = 6
    config.model.conditional = False
    config.optimizer.learning_rate = 3e-4
    config.optimizer.warmup_steps = 1000
    config.ema_decay = 0.9995
    config.checkpoint.every = 1000
    config.sample.every = 2000
    config.sample.batch_size = 100
    config.sample.num = 100
    config.evaluation.split = ""
    return config
