r"""SiT-L/2 with uncertainty weighting on SNR clusters, on ImageNet at 256x256 pixels.

  python -m ant_jax.main --config configs/imagenet256_sit_l2.py:uncertainty,snr --workdir DIR \
      --config.autoencoder.weights=VAE.safetensors --config.autoencoder.latents=LATENTS

The latents are those of ``configs/imagenet256_dit_l2.py``, which describes how to make them.

Hardware: 458 M parameters take 9 GB with the EMA, the optimizer and a gradient, and 15 GB more for
the eight gradients of pcgrad and nash. config.model.remat reduces the activations, as
``configs/imagenet256_dit_l2.py`` says.

The settings are those of SiT-XL/2, whose config lists the differences from SiT.
Published FID, from 50 k samples, after 400 k steps without guidance: 18.8 (Yu et al., REPA, arXiv
2410.06940, table 3). This config has not been run to the end yet.
"""

from ant_jax.models.dit import SIZES
from configs import imagenet256_sit_xl2


def get_config(argument: str = "uncertainty,snr"):
    """The config for METHOD or METHOD,CLUSTERS; ``docs/settings.md`` lists all settings."""
    config = imagenet256_sit_xl2.get_config(argument)
    config.model.update(SIZES["L"])
    config.model.remat = "none"
    return config
