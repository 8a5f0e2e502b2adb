"""Records latents and images of tiny autoencoders of diffusers for `test_autoencoder.py`.

Usage: python record.py FOLDER, with torch 2.13.0 and diffusers as recorded in the files; FOLDER
receives kl.npz, vq.npz and attention.npz. Weights are not stored: `weight` makes them from their
names.
"""

import sys
import zlib
from pathlib import Path

import numpy as np

SETTINGS = dict(
    block_out_channels=(32, 64, 64),
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    layers_per_block=1,
    norm_num_groups=32,
)
ATTENTION = dict(
    down_block_types=("DownEncoderBlock2D",) * 2 + ("AttnDownEncoderBlock2D",),
    up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 2,
)


def weight(name, shape):
    """A random weight that anybody can make again; NumPy's old generator never changes."""
    values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if "quantize" in name:
        return np.float32(values)
    if len(shape) > 1:
        return np.float32(values / np.sqrt(np.prod(shape[1:])))
    # Scales of norms are near 1.
    return np.float32(values / 8 + (name.endswith("weight")))


def main(folder):
    import diffusers
    import torch

    rng = np.random.RandomState(0)
    images = np.float32(rng.uniform(-1, 1, (2, 3, 16, 24)))
    models = {
        "kl": diffusers.AutoencoderKL(**SETTINGS, latent_channels=4),
        "vq": diffusers.VQModel(
            **SETTINGS, latent_channels=3, num_vq_embeddings=50, mid_block_add_attention=True
        ),
        # Attention at the last level instead of in the middle, and a latent of other channels than
        # the encoder and the decoder have there.
        "attention": diffusers.VQModel(
            **SETTINGS | ATTENTION,
            latent_channels=6,
            vq_embed_dim=3,
            num_vq_embeddings=50,
            mid_block_add_attention=False,
        ),
    }
    for name, model in models.items():
        state = {key: tuple(value.shape) for key, value in model.state_dict().items()}
        model.load_state_dict({k: torch.from_numpy(weight(k, s)) for k, s in state.items()})
        model.eval()
        with torch.no_grad():
            if name == "kl":
                posterior = model.encode(torch.from_numpy(images)).latent_dist
                mean, std = posterior.mean, posterior.std
            else:
                mean = model.encode(torch.from_numpy(images)).latents
                std = torch.zeros_like(mean)
            decoded = model.decode(mean).sample
        np.savez_compressed(
            Path(folder) / f"{name}.npz",
            versions=f"torch {torch.__version__}, diffusers {diffusers.__version__}",
            names=list(state),
            shapes=[" ".join(map(str, shape)) for shape in state.values()],
            images=images,
            mean=mean.numpy(),
            std=std.numpy(),
            decoded=decoded.numpy(),
        )


if __name__ == "__main__":
    main(sys.argv[1])
