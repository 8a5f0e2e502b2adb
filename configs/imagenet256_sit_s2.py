r"""SiT-S/2 with uncertainty weighting on SNR clusters, on ImageNet at 256x256 pixels.

  python -m ant_jax.main --config configs/imagenet256_sit_s2.py:uncertainty,snr --workdir DIR \
      --config.autoencoder.weights=VAE.safetensors --config.autoencoder.latents=LATENTS

The latents are those of ``configs/imagenet256_dit_l2.py``, which describes how to make them.

Hardware: one GPU; 33 M parameters take 0.7 GB with the EMA, the optimizer and a gradient.

The settings are those of SiT-XL/2, whose config lists the differences from SiT.
Published FID, from 50 k samples, after 400 k steps: 57.3, of a baseline by others with SiT's recipe
(Linear Differential Vision Transformer, NeurIPS 2025, arXiv 2511.00833; read in a summary of its
table). This config has not been run to the end yet.
"""

from ant_jax.models.dit import SIZES
from configs import imagenet256_sit_xl2


def get_config(argument: str = "uncertainty,snr"):
    """The config for METHOD or METHOD,CLUSTERS; ``docs/settings.md`` lists all settings."""
    config = imagenet256_sit_xl2.get_config(argument)
    config.model.update(SIZES["S"])
    config.model.remat = "none"
    return config
