r"""DiT-XL/2 with uncertainty weighting on SNR clusters, on ImageNet at 256x256 pixels.

  python -m ant_jax.main --config configs/imagenet256_dit_xl2.py:uncertainty,snr --workdir DIR \
      --config.autoencoder.weights=VAE.safetensors --config.autoencoder.latents=LATENTS

The latents are those of ``configs/imagenet256_dit_l2.py``, which describes how to make them.

Hardware: 675 M parameters take 13.5 GB with the EMA, the optimizer and a gradient, and 13.5 GB more
for the five gradients of pcgrad and nash. This config recomputes the blocks in the backward pass
(remat = "blocks"): a third more work, but only a small part of the activations stays in memory.
"dots" costs 1 to 4 % and keeps about half of the activations.

The settings are those of DiT-L/2. The paper has no DiT-XL, so there are no figures to compare with.
To start from the weights of DiT's authors: --config.init_from=DiT-XL-2-256x256.pt
--config.process.schedule=linear, the schedule of these weights.
"""

from ant_jax.models.dit import SIZES
from configs import imagenet256_dit_l2


def get_config(argument: str = "uncertainty,snr"):
    """The config for METHOD or METHOD,CLUSTERS; ``docs/settings.md`` lists all settings."""
    config = imagenet256_dit_l2.get_config(argument)
    config.model.update(SIZES["XL"])
    config.model.remat = "blocks"
    return config
