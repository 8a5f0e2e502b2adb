r"""DiT-L/2 with uncertainty weighting on SNR clusters, on ImageNet at 256x256 pixels.

  python -m ant_jax.main --mode encode --config configs/imagenet256_dit_l2.py \
      --config.autoencoder.weights=VAE.safetensors --config.autoencoder.latents=LATENTS
  python -m ant_jax.main --config configs/imagenet256_dit_l2.py:uncertainty,snr --workdir DIR \
      --config.autoencoder.weights=VAE.safetensors --config.autoencoder.latents=LATENTS

VAE is the KL-f8 autoencoder of Stable Diffusion (sd-vae-ft-ema or -mse), by its own names or by
those of diffusers. The latents take 42 GB. docs/paper_row.md goes through all of it, from the raw
images to the metrics.

Hardware: 458 M parameters take 9 GB with the EMA, the optimizer and a gradient, 9 GB more for the
five gradients of pcgrad and nash. The activations of 240 examples make it 81 GB by the programs
compiled in benchmarks/RESULTS.md: 41 GB with config.model.remat = "dots", which costs 1.5 % more
work, 15 GB with "blocks" and a third more. Each device's share of the batch must be a multiple of
k = 5: 240 examples fit 1, 2, 3, 4, 6, 8, 12, 16, 24 or 48.

The settings are those of the ANT paper and its code (AdamW 1e-4 without decay, batch 240, 400 k
steps, EMA 0.9999, cosine schedule, learned variance, 250 steps and guidance 1.5) but for the
clusters, which are of equal length in that code (:uncertainty,timestep), the renewal of Nash's
weights, at every 25th step there (--config.method.nash_update_every=25), and the ramp of the EMA,
which it does not have; docs/differences.md lists the rest. The paper's figures there, from 50 k
samples; ours are not known yet:

  vanilla                 FID 12.59   IS 134.60   precision 0.73    recall 0.49
  Min-SNR                 FID  9.58   IS 179.98   precision 0.78    recall 0.47
  uncertainty weighting   FID  5.695  IS 186.66   precision 0.811   recall 0.491
"""

from ant_jax.models.dit import SIZES
from configs import digits


def get_config(argument: str = "uncertainty,snr"):
    """The config for METHOD or METHOD,CLUSTERS; options as documented in ``configs/digits.py``."""
    config = digits.get_config(argument)
    config.num_steps = 400_000
    config.data.name = "tfds:imagenet2012"
    config.data.image_size = 256
    config.data.crop = "center"
    config.data.flip = True
    config.data.batch_size = 240
    config.data.num_workers = 8
    config.diffusion.variance = "learned_range"
    config.diffusion.clip_x0 = False
    config.autoencoder.name = "KL-f8"
    config.autoencoder.scale = 0.18215
    config.model.update(SIZES["L"])
    config.model.patch = 2
    config.model.dtype = "bfloat16"
    config.optimizer.learning_rate = 1e-4
    config.optimizer.warmup_steps = 0
    config.ema_decay = 0.9999
    config.checkpoint.every = 5000
    config.checkpoint.keep_period = 50_000
    config.sample.every = 20_000
    config.sample.sampler = "ddpm"
    config.sample.num_steps = 250
    config.sample.guidance = 1.5
    config.sample.guidance_channels = 3  # of 4, as in the code of DiT and of the ANT paper
    config.sample.batch_size = 100
    config.sample.num = 50_000
    config.evaluation.features = "inception"
    config.evaluation.split = ""
    return config
