r"""The light ADM UNet on pixels, unconditional, on FFHQ at 256x256.

  python -m ant_jax.main --config configs/ffhq256_adm.py:uncertainty,snr --workdir DIR \
      --config.data.dir=FFHQ

FFHQ is a folder of the 70 000 images, of 256 pixels or larger, without subfolders for classes.

Hardware: 94 M parameters take 1.9 GB with the EMA, the optimizer and a gradient, and 1.9 GB more
for the five gradients of pcgrad and nash. The activations of pixels are large;
config.model.remat reduces them. For several devices choose a config.data.batch_size that is
divisible by k = 5 and by the number of devices.

The network, the linear schedule, the learned variance, the learning rate and the sampler (250 steps
of DDPM, evenly spaced) are those of Choi et al., *Perception Prioritized Training of Diffusion
Models* (CVPR 2022), without their loss weights (--config.loss_weight.name=p2). The ANT paper
uses the same network. The batch size is 10; theirs is 8, which is not divisible by five clusters.
The ANT paper's figures are in its table 1; this config has not been run to the end yet.
"""

from ant_jax.config import update
from ant_jax.models.unet import VARIANTS
from configs import digits


def get_config(argument: str = "uncertainty,snr"):
    """The config for METHOD or METHOD,CLUSTERS; ``docs/settings.md`` lists all settings."""
    config = digits.get_config(argument)
    update(
        config,
        {
            "data.name": "folder",
            "model.name": "unet",
            "sampler.name": "ddpm",
            "evaluation.features": "inception",
        },
    )
    config.num_steps = 1_000_000
    config.data.split = ""
    config.data.image_size = 256
    config.data.crop = "center"
    config.data.flip = True
    config.data.batch_size = 10
    config.data.num_workers = 4
    config.process.schedule = "linear"
    config.process.variance = "learned_range"
    config.model.update(VARIANTS["ADM-light-256"])
    config.model.conditional = False
    config.model.dtype = "bfloat16"
    config.optimizer.learning_rate = 2e-5
    config.optimizer.warmup_steps = 0
    config.ema_decay = 0.9999
    config.checkpoint.every = 5000
    config.checkpoint.keep_period = 50_000
    config.sample.every = 20_000
    config.sampler.num_steps = 250
    config.sample.batch_size = 50
    config.sample.num = 50_000
    config.evaluation.split = ""
    return config
