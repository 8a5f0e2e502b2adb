"""Draws samples.png with diffusers, from an exported DiT or SiT of pixels.

python -m ant_jax.main --workdir RUN --mode export --layout diffusers
pip install torch diffusers
python examples/load_in_diffusers.py RUN/weights/STEP-diffusers
"""

import sys
from pathlib import Path

try:
    import diffusers
    import torch
except ImportError as error:
    sys.exit(f"{error.name} is not installed: pip install torch diffusers")


@torch.no_grad()
def main(folder: str, num: int = 40, steps: int = 50) -> None:
    network = diffusers.DiTTransformer2DModel.from_pretrained(folder, subfolder="transformer")
    saved = diffusers.DDIMScheduler.load_config(folder, subfolder="scheduler")
    scheduler = getattr(diffusers, saved["_class_name"]).from_config(saved)
    if "downscale_freq_shift" in Path(folder, "README.md").read_text():  # the model card
        for block in network.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
    channels, side = network.config.in_channels, network.config.sample_size
    x = torch.randn(num, channels, side, side)
    labels = torch.arange(num) % network.config.num_embeds_ada_norm
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        # The other channels are the variance.
        output = network(x, timestep=t.expand(num), class_labels=labels).sample[:, :channels]
        x = scheduler.step(output, t, x).prev_sample
    grid = torch.cat([torch.cat(list(row), 2) for row in x.split(10)], 1)
    image = diffusers.image_processor.VaeImageProcessor(do_resize=False).postprocess(grid[None])[0]
    image.save("samples.png")


if __name__ == "__main__":
    main(sys.argv[1]) if sys.argv[1:] else sys.exit(__doc__)
