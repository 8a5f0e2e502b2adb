"""Flow matching on handwritten digits, with balanced noise levels. No download.

  python -m ant_jax.main --config configs/digits_flow.py              # Nash-MTL on SNR clusters
  python -m ant_jax.main --config configs/digits_flow.py:vanilla      # the baseline

As configs/digits.py, with rectified flow instead of DDPM.
"""

import ml_collections

from ant_jax import config as config_lib
from configs import digits


def get_config(argument: str = "nash,snr") -> ml_collections.ConfigDict:
    """The config for METHOD or METHOD,CLUSTERS."""
    config = digits.get_config(argument)
    config_lib.update(config, {"process.name": "flow", "sampler.name": "ddim"})
    return config
