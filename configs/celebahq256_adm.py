"""The light ADM UNet on pixels, unconditional, on CelebA-HQ at 256x256.

  python -c "import tensorflow_datasets as tfds; tfds.builder('celeb_a_hq/256',
      file_format='array_record').download_and_prepare()"
  python -m ant_jax.main --config configs/celebahq256_adm.py:uncertainty,snr --workdir DIR

Before the first command, put the 30 000 images where tensorflow-datasets asks for them. A folder of
the images also works: --config.data.name=folder --config.data.split= --config.data.dir=DIR

Hardware and settings are those of ``configs/ffhq256_adm.py``. The ANT paper's figures are in its
table 1; this config has not been run to the end yet.
"""

from ant_jax.config import update
from configs import ffhq256_adm


def get_config(argument: str = "uncertainty,snr"):
    """The config for METHOD or METHOD,CLUSTERS; ``docs/settings.md`` lists all settings."""
    config = ffhq256_adm.get_config(argument)
    update(config, {"data.name": "tfds"})
    config.data.builder = "celeb_a_hq/256"
    config.data.split = "train"
    return config
