r"""The LDM UNet on latents of VQ-f4, unconditional, on FFHQ at 256x256.

  python -m ant_jax.main --mode encode --config configs/ffhq256_ldm.py --config.data.dir=FFHQ \
      --config.autoencoder.weights=VQ-F4.ckpt --config.autoencoder.latents=LATENTS
  python -m ant_jax.main --config configs/ffhq256_ldm.py:uncertainty,snr --workdir DIR \
      --config.data.dir=FFHQ \
      --config.autoencoder.weights=VQ-F4.ckpt --config.autoencoder.latents=LATENTS

FFHQ is a folder of the 70 000 images, of 256 pixels or larger, without subfolders for classes.
VQ-F4 is the autoencoder vq-f4 of LDM's authors. The latents take 3.4 GB.

Hardware: 274 M parameters take 5.5 GB with the EMA, the optimizer and a gradient, and 5.5 GB more
for the five gradients of pcgrad and nash. For several devices choose a config.data.batch_size that
is divisible by k = 5 and by the number of devices.

The network, the schedule, the learning rate and the sampler (200 DDIM steps, eta 1, at LDM's own
timesteps) are those of Rombach et al., *High-Resolution Image Synthesis with Latent Diffusion
Models* (CVPR 2022) for FFHQ. The batch size is 40; theirs is 42, which is not divisible by five
clusters. The ANT paper's figures are in its table 1; this config has not been run to the end yet.
To start from LDM's own weights: --config.init_from=FFHQ-LDM.ckpt
--config.init_facts=heads_first,head_channels=32
"""

from ant_jax.config import update
from ant_jax.models.unet import VARIANTS
from configs import ffhq256_adm


def get_config(argument: str = "uncertainty,snr"):
    """The config for METHOD or METHOD,CLUSTERS; ``docs/settings.md`` lists all settings."""
    config = ffhq256_adm.get_config(argument)
    update(config, {"sampler.name": "ddim"})
    config.num_steps = 400_000
    config.data.batch_size = 40
    config.process.schedule = "ldm"
    config.process.variance = "fixed_small"
    config.sampler.clip_x0 = False
    config.autoencoder.name = "VQ-f4"
    config.autoencoder.scale = 1.0
    config.model.update(VARIANTS["LDM-4"])
    config.optimizer.learning_rate = 8.4e-5
    config.sampler.num_steps = 200
    config.sampler.spacing = "ldm"
    config.sampler.eta = 1.0
    return config
