"""A rehearsal of latent diffusion on a laptop: a small DiT on latents of a small autoencoder.

  python -m experiments.photographs
  python -m ant_jax.main --mode encode --config configs/photographs_dit.py
  python -m ant_jax.main --config configs/photographs_dit.py --workdir runs/photographs_dit

The same steps as for ``configs/imagenet256_dit_s2.py``, with 456 crops of two photographs, at 64x64
pixels. docs/paper_row.md has the times and the results.
"""

from ant_jax.config import update
from configs import imagenet256_dit_s2


def get_config(argument: str = "uncertainty,snr"):
    """The config for METHOD or METHOD,CLUSTERS; ``docs/settings.md`` lists all settings."""
    config = imagenet256_dit_s2.get_config(argument)
    update(config, {"data.name": "folder"})
    config.num_steps = 2000
    config.data.split = ""
    config.data.dir = "photographs/images"
    config.data.image_size = 64
    config.data.batch_size = 40
    config.data.num_workers = 0
    # In few steps and without clipping, the first of them would multiply the errors of a predicted
    # noise by hundreds.
    config.process.prediction = "v"
    config.autoencoder.name = "KL-f4-small"
    config.autoencoder.weights = "photographs/autoencoder.safetensors"
    config.autoencoder.latents = "photographs/latents"
    config.autoencoder.scale = 0.34  # as --mode encode says
    config.model.width = 128
    config.model.depth = 4
    config.model.heads = 4
    config.model.dtype = "float32"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 100
    config.ema_decay = 0.999
    config.log_every = 100
    config.checkpoint.every = 500
    config.checkpoint.keep_period = 0
    config.sample.every = 1000
    config.sampler.num_steps = 50
    config.sampler.guidance = 1.0
    config.sample.batch_size = 50
    config.sample.num = 200
    config.evaluation.weights = "photographs/inception.safetensors"
    return config
