r"""SiT-XL/2 with uncertainty weighting on SNR clusters, on ImageNet at 256x256 pixels.

  python -m ant_jax.main --config configs/imagenet256_sit_xl2.py:uncertainty,snr --workdir DIR \
      --config.autoencoder.weights=VAE.safetensors --config.autoencoder.latents=LATENTS

The latents are those of ``configs/imagenet256_dit_l2.py``, which describes how to make them. SiT
uses sd-vae-ft-ema.

Hardware: 675 M parameters take 13.5 GB with the EMA, the optimizer and a gradient, and 21.6 GB more
for the eight gradients of pcgrad and nash. As in ``configs/imagenet256_dit_xl2.py``, blocks are
recomputed in the backward pass.

The settings are those of SiT (Ma et al., ECCV 2024) and its code: the network of DiT-XL/2 with the
time in [0, 1] as its input, velocities, uniform levels, AdamW 1e-4 without weight decay, batch 256,
EMA 0.9999, and 250 Euler-Maruyama steps. There are three differences. The batch has k = 8 tasks,
because 256 is not divisible by 5; SiT has no tasks (:vanilla). Its EMA has no ramp. Its SDE adds
twice the noise and ends with a step of 0.04. The ODE is --config.sampler.name=heun with
--config.sampler.num_steps=125 for 249 calls.

Published FID, from 50 k samples; this config has not been run to the end yet:

  400 k steps, without guidance              17.62   in JAX
  7 M steps (config.num_steps)                8.3
  7 M steps, config.sampler.guidance = 1.5    2.06

To start from the weights of SiT's authors: --config.init_from=SiT-XL-2-256x256.pt
--config.init_facts=sit
"""

from ant_jax.config import update
from configs import imagenet256_dit_xl2


def get_config(argument: str = "uncertainty,snr"):
    """The config for METHOD or METHOD,CLUSTERS; ``docs/settings.md`` lists all settings."""
    config = imagenet256_dit_xl2.get_config(argument)
    update(config, {"process.name": "flow", "sampler.name": "euler_maruyama"})
    config.model.level_scale = 1.0
    config.data.batch_size = 256
    config.clusters.k = 8
    config.sampler.guidance = 1.0
    return config
