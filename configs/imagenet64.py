"""DiT-B/4 on ImageNet at 64x64 pixels with uncertainty weighting on SNR clusters.

  python -c "import tensorflow_datasets as tfds; tfds.builder('imagenet_resized/64x64',
      file_format='array_record').download_and_prepare()"
  python -m ant_jax.main --config configs/imagenet64.py --workdir DIR

Hardware: any number of GPUs or TPU cores that divides 240 into multiples of k = 5. The settings are
those of the ANT paper's DiT runs (AdamW 1e-4, batch 240, 400 k steps, EMA 0.9999, cosine schedule,
learned variance), with the differences listed in ``configs/imagenet256_dit_l2.py``, but on pixels
instead of latents. This config has not been run to the end yet, so there is no expected result.
"""

from ant_jax.config import update
from configs import digits


def get_config(argument: str = "uncertainty,snr"):
    """The config for METHOD or METHOD,CLUSTERS; ``docs/settings.md`` lists all settings."""
    config = digits.get_config(argument)
    update(config, {"data.name": "tfds", "sampler.name": "ddpm", "evaluation.features": ""})
    config.num_steps = 400_000
    config.data.builder = "imagenet_resized/64x64"
    config.data.image_size = 64
    config.data.flip = True
    config.data.batch_size = 240
    config.data.num_workers = 8
    config.process.variance = "learned_range"
    config.model.width = 768
    config.model.depth = 12
    config.model.heads = 12
    config.model.patch = 4
    config.model.dtype = "bfloat16"
    config.optimizer.learning_rate = 1e-4
    config.optimizer.warmup_steps = 0
    config.ema_decay = 0.9999
    config.checkpoint.every = 5000
    config.checkpoint.keep_period = 50_000
    config.sample.every = 5000
    config.sampler.num_steps = 250
    config.sampler.guidance = 1.5
    config.sample.batch_size = 100
    config.sample.num = 50_000
    config.evaluation.split = "validation"
    return config
