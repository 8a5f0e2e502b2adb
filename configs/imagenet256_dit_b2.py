r"""DiT-B/2 with uncertainty weighting on SNR clusters, on ImageNet at 256x256 pixels.

  python -m ant_jax.main --config configs/imagenet256_dit_b2.py:uncertainty,snr --workdir DIR \
      --config.autoencoder.weights=VAE.safetensors --config.autoencoder.latents=LATENTS

The latents are those of ``configs/imagenet256_dit_l2.py``, which describes how to make them.

Hardware: one GPU; 130 M parameters take 2.6 GB with the EMA, the optimizer and a gradient.

The settings are those of DiT-L/2. The paper has no DiT-B, so there are no figures to compare with.
"""

from ant_jax.models.dit import SIZES
from configs import imagenet256_dit_l2


def get_config(argument: str = "uncertainty,snr"):
    """The config for METHOD or METHOD,CLUSTERS; ``docs/settings.md`` lists all settings."""
    config = imagenet256_dit_l2.get_config(argument)
    config.model.update(SIZES["B"])
    return config
