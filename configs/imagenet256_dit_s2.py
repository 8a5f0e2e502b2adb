r"""DiT-S/2 with uncertainty weighting on SNR clusters, on ImageNet at 256x256 pixels.

  python -m ant_jax.main --config configs/imagenet256_dit_s2.py:uncertainty,snr --workdir DIR \
      --config.autoencoder.weights=VAE.safetensors --config.autoencoder.latents=LATENTS

``configs/imagenet256_dit_l2.py`` describes how to make the latents. For DiT-S the ANT paper's code
uses another autoencoder with the same network, that of Stable Diffusion XL (sdxl-vae-fp16-fix),
with scale 0.13025. With the autoencoder of DiT-L/2 add --config.autoencoder.scale=0.18215.

Hardware: one GPU; 33 M parameters take 0.7 GB with the EMA, the optimizer and a gradient.

The settings are those of the ANT paper's code: batch 50 and 800 k steps, the others as for DiT-L/2,
whose config lists the differences.
The FID of the paper, from 50 k samples, is below; this config has not been run to the end yet:

  Nash-MTL                FID 44.65
  uncertainty weighting   FID 48.40
"""

from ant_jax.models.dit import SIZES
from configs import imagenet256_dit_l2


def get_config(argument: str = "uncertainty,snr"):
    """The config for METHOD or METHOD,CLUSTERS; ``docs/settings.md`` lists all settings."""
    config = imagenet256_dit_l2.get_config(argument)
    config.model.update(SIZES["S"])
    config.num_steps = 800_000
    config.data.batch_size = 50
    config.autoencoder.scale = 0.13025
    return config
