"""A diffusion transformer on handwritten digits: the default. No download, minutes on a laptop.

  python -m ant_jax.main --config configs/digits.py              # Nash-MTL on SNR clusters
  python -m ant_jax.main --config configs/digits.py:vanilla      # the baseline
  python -m ant_jax.main --config configs/digits.py:uncertainty,timestep --config.num_steps=1000

The argument after the colon is METHOD or METHOD,CLUSTERS. Every setting can be changed on the
command line as --config.NAME=VALUE; docs/settings.md lists them all. In paths, ~ is the home
folder; config.json keeps them as they were written.
Expected result: see the README.
"""

import ml_collections

from ant_jax.config import default_config


def get_config(argument: str = "nash,snr") -> ml_collections.ConfigDict:
    """The config for METHOD or METHOD,CLUSTERS."""
    method, _, clusters = argument.partition(",")
    config = default_config(data="digits", model="dit", method=method, clusters=clusters or "snr")
    config.num_steps = 3000
    config.data.image_size = 8
    config.data.batch_size = 120
    config.model.width = 64
    config.model.depth = 4
    config.model.heads = 4
    config.model.patch = 4
    config.optimizer.learning_rate = 3e-3
    config.optimizer.warmup_steps = 100
    config.ema_decay = 0.999
    config.sample.num = 1797
    config.sample.batch_size = 600
    config.evaluation.split = "test"
    return config
