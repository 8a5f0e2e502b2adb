"""A rehearsal of diffusion on pixels on a laptop: the light ADM UNet with a quarter of its width.

  python -m experiments.photographs
  python -m ant_jax.main --config configs/photographs_adm.py --workdir runs/photographs_adm

The same steps as for ``configs/ffhq256_adm.py``, with 456 crops of two photographs, at 64x64
pixels. docs/paper_row.md has the times and the results.
"""

from configs import ffhq256_adm


def get_config(argument: str = "uncertainty,snr"):
    """The config for METHOD or METHOD,CLUSTERS; ``docs/settings.md`` lists all settings."""
    config = ffhq256_adm.get_config(argument)
    config.num_steps = 400
    config.data.dir = "photographs/images"
    config.data.image_size = 64
    config.data.num_workers = 0
    config.model.width = 32
    config.model.dtype = "float32"
    config.optimizer.learning_rate = 5e-4
    config.optimizer.warmup_steps = 50
    config.ema_decay = 0.99
    config.log_every = 20
    config.checkpoint.every = 200
    config.checkpoint.keep_period = 0
    config.sample.every = 400
    config.sampler.num_steps = 25
    config.sample.num = 100
    config.evaluation.weights = "photographs/inception.safetensors"
    return config
