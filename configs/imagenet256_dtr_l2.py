r"""DiT-L/2 with denoising task routing and uncertainty weighting, on ImageNet at 256x256 pixels.

  python -m ant_jax.main --config configs/imagenet256_dtr_l2.py:uncertainty,snr --workdir DIR \
      --config.autoencoder.weights=VAE.safetensors --config.autoencoder.latents=LATENTS

The latents are those of ``configs/imagenet256_dit_l2.py``, which describes how to make them.

Hardware: 458 M parameters take 9 GB with the EMA, the optimizer and a gradient, and 15 GB more for
the eight gradients of pcgrad and nash. config.model.remat reduces the activations, as
``configs/imagenet256_dit_l2.py`` says. Routing has no parameters.

The settings are those of Park et al., *Denoising Task Routing for Diffusion Models* (ICLR 2024,
arXiv 2310.07138) and its code: windows of 0.8 of the channels, power 4, batch 256 with k = 8 tasks,
the others as for DiT-L/2, whose config lists the differences. The published figures, from 50 k
samples with guidance 1.5, are below; this config has not been run to the end yet:

  DTR, :vanilla                        FID 8.90   IS 156.48   precision 0.77   recall 0.51
  DTR and Min-SNR                      FID 8.24   IS 186.02   precision 0.79   recall 0.50
  DTR and uncertainty weighting        FID 4.61   IS 208.76   precision 0.84   recall 0.48
  uncertainty weighting without DTR    FID 5.85   IS 206.68   precision 0.84   recall 0.46
"""

from configs import imagenet256_dit_l2


def get_config(argument: str = "uncertainty,snr"):
    """The config for METHOD or METHOD,CLUSTERS; ``docs/settings.md`` lists all settings."""
    config = imagenet256_dit_l2.get_config(argument)
    config.model.routing = 0.8
    config.data.batch_size = 256
    config.clusters.k = 8
    return config
