r"""EDM on CIFAR-10, conditional on the class, with uncertainty weighting on SNR clusters.

  python -c "import tensorflow_datasets as tfds; tfds.builder('cifar10',
      file_format='array_record').download_and_prepare()"
  python -m ant_jax.main --config configs/cifar10_edm.py:uncertainty,snr --workdir DIR \
      --config.evaluation.weights=pt_inception-2015-12-05-6726825d.pth

Hardware: 57 M parameters take 1.1 GB with the EMA, the optimizer and a gradient, and 1.8 GB more
for the eight gradients of pcgrad and nash. Any number of GPUs or TPU cores that divides 512.

The settings are those of Karras et al., *Elucidating the Design Space of Diffusion-Based Generative
Models* (NeurIPS 2022), table 7: 200 M images in batches of 512, learning rate 1e-3 after 10 M
images, half-life of the EMA 0.5 M images, no label dropout, and 18 Heun steps (35 calls of the
network). The network differs. Theirs is DDPM++ or NCSN++; here it is the UNet with the widths and
blocks of DDPM++ and its attention at 16x16 pixels, which has attention in all blocks of the decoder
there instead of the last alone, no dropout (theirs is 13 %), and no scaled skip connections. Their
augmentation (12 %) is replaced by mirror images. So expect a higher FID than the published one,
which is the best of three times 50 k samples; this config has not been run to the end yet:

  EDM, VP or VE, conditional                     FID 1.79
  EDM, VP, unconditional (model.conditional)     FID 1.97
"""

from ant_jax.config import update
from configs import digits


def get_config(argument: str = "uncertainty,snr"):
    """The config for METHOD or METHOD,CLUSTERS; ``docs/settings.md`` lists all settings."""
    config = digits.get_config(argument)
    update(
        config,
        {
            "data.name": "tfds",
            "process.name": "edm",
            "model.name": "unet",
            "sampler.name": "heun",
            "evaluation.features": "inception",
        },
    )
    config.num_steps = 200_000_000 // 512
    config.data.builder = "cifar10"
    config.data.image_size = 32
    config.data.flip = True
    config.data.batch_size = 512
    config.data.num_workers = 8
    config.clusters.k = 8
    config.model.width = 128
    config.model.channel_mult = (2, 2, 2)
    config.model.num_res_blocks = 4
    config.model.attention_factors = (2,)
    config.model.head_channels = 256
    config.model.scale_shift_norm = False
    config.label_dropout = 0.0
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 10_000_000 // 512
    config.ema_decay = 0.5 ** (512 / 500_000)
    config.checkpoint.every = 5000
    config.checkpoint.keep_period = 50_000
    config.sample.every = 20_000
    config.sampler.num_steps = 18
    config.sampler.spacing = "karras"
    config.sampler.clip_x0 = False
    config.sample.batch_size = 500
    config.sample.num = 50_000
    config.evaluation.split = ""
    return config
