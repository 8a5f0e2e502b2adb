r"""DiT-L/2 with uncertainty weighting on SNR clusters, on ImageNet at 256x256 pixels.

  python -m ant_jax.main --mode encode --config configs/imagenet256_dit_l2.py \
      --config.autoencoder.weights=VAE.safetensors --config.autoencoder.latents=LATENTS
  python -m ant_jax.main --config configs/imagenet256_dit_l2.py:uncertainty,snr --workdir DIR \
      --config.autoencoder.weights=VAE.safetensors --config.autoencoder.latents=LATENTS

VAE is the KL-f8 autoencoder of Stable Diffusion (sd-vae-ft-ema or -mse), with its own parameter
names or those of diffusers. The latents take 42 GB. docs/paper_row.md describes every step, from
the raw images to the metrics.

Hardware: 458 M parameters take 9 GB with the EMA, the optimizer and a gradient, and 9 GB more for
the five gradients of pcgrad and nash. With the activations of 240 examples the total is 84 GB on a
TPU and 100 GB on a GPU, or 63 GB there with config.model.attention = "cudnn", by the compiled
programs in benchmarks/RESULTS.md. On a TPU config.model.remat = "dots" reduces it to 41 GB for 1.5
% more work, "blocks" to 17 GB for a third more. On several devices each holds less, and 240
examples fit any number of devices that divides 240: docs/many_devices.md.

The settings are those of the ANT paper and its code: AdamW 1e-4 without weight decay, batch 240,
400 k steps, EMA 0.9999, cosine schedule, learned variance, 250 steps and guidance 1.5. There are
three differences. The clusters have equal length in that code (:uncertainty,timestep). It updates
Nash's weights at every 25th step (--config.method.update_every=25). Its EMA has no ramp.
docs/differences.md lists the rest. The figures of the paper, from 50 k samples, are below; this
config has not been run to the end yet:

  vanilla                 FID 12.59   IS 134.60   precision 0.73    recall 0.49
  Min-SNR                 FID  9.58   IS 179.98   precision 0.78    recall 0.47
  uncertainty weighting   FID  5.695  IS 186.66   precision 0.811   recall 0.491
"""

from ant_jax.config import update
from ant_jax.models.dit import SIZES
from configs import digits


def get_config(argument: str = "uncertainty,snr"):
    """The config for METHOD or METHOD,CLUSTERS; ``docs/settings.md`` lists all settings."""
    config = digits.get_config(argument)
    update(
        config, {"data.name": "tfds", "sampler.name": "ddpm", "evaluation.features": "inception"}
    )
    config.num_steps = 400_000
    config.data.builder = "imagenet2012"
    config.data.image_size = 256
    config.data.crop = "center"
    config.data.flip = True
    config.data.batch_size = 240
    config.data.num_workers = 8
    config.process.variance = "learned_range"
    config.sampler.clip_x0 = False
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
    config.sampler.num_steps = 250
    config.sampler.guidance = 1.5
    config.sampler.guidance_channels = 3  # of 4, as in the code of DiT and of the ANT paper
    config.sample.batch_size = 100
    config.sample.num = 50_000
    config.evaluation.split = ""
    return config
