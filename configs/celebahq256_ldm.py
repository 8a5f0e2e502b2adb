r"""The LDM UNet on latents of VQ-f4, unconditional, on CelebA-HQ at 256x256.

  python -m ant_jax.main --mode encode --config configs/celebahq256_ldm.py \
      --config.autoencoder.weights=VQ-F4.ckpt --config.autoencoder.latents=LATENTS
  python -m ant_jax.main --config configs/celebahq256_ldm.py:uncertainty,snr --workdir DIR \
      --config.autoencoder.weights=VQ-F4.ckpt --config.autoencoder.latents=LATENTS

``configs/celebahq256_adm.py`` describes how to prepare the images, ``configs/ffhq256_ldm.py`` the
autoencoder and the hardware. The latents take 1.5 GB. The learning rate and the sampler are LDM's
for CelebA-HQ (200 DDIM steps, eta 0, at LDM's own timesteps). The batch size is 50; LDM's is 48,
which is not divisible by five clusters. The ANT paper's figures are in its table 1; this config has
not been run to the end yet.
"""

from ant_jax.config import update
from configs import ffhq256_ldm


def get_config(argument: str = "uncertainty,snr"):
    """The config for METHOD or METHOD,CLUSTERS; ``docs/settings.md`` lists all settings."""
    config = ffhq256_ldm.get_config(argument)
    update(config, {"data.name": "tfds"})
    config.data.builder = "celeb_a_hq/256"
    config.data.split = "train"
    config.data.batch_size = 50
    config.optimizer.learning_rate = 9.6e-5
    config.sampler.eta = 0.0
    return config
