"""Records the output of a tiny DiT of diffusers for `tests/models/test_dit_weights.py`.

Usage: python record.py FOLDER, with torch 2.13.0 and diffusers as recorded in the file; FOLDER
receives dit.npz. Weights are not stored: `weight` makes them from their names.

Three things of diffusers are set to what the paper's code (facebookresearch/DiT, models.py) has:
the spacing of the frequencies of the timestep encoding, the epsilon of the second norm of a block,
and, by `weight`, one embedding of timestep and label for all blocks.
"""

import re
import sys
import zlib
from pathlib import Path

import numpy as np

SETTINGS = dict(
    num_attention_heads=2,
    attention_head_dim=8,
    in_channels=3,
    out_channels=6,
    num_layers=2,
    sample_size=8,
    patch_size=2,
    num_embeds_ada_norm=5,
    norm_eps=1e-6,
)


def weight(name, shape):
    """A random weight that anybody can make again; NumPy's old generator never changes."""
    name = re.sub(r"blocks\.\d+\.norm1\.emb", "blocks.0.norm1.emb", name)
    values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if "embedding_table" in name:
        return np.float32(values)
    return np.float32(values / (np.sqrt(np.prod(shape[1:])) if len(shape) > 1 else 4))


def main(folder):
    import diffusers
    import torch

    model = diffusers.DiTTransformer2DModel(**SETTINGS)
    state = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    model.load_state_dict({k: torch.from_numpy(weight(k, s)) for k, s in state.items()})
    model.eval()
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    x = np.float32(np.random.RandomState(0).standard_normal((3, 3, 8, 8)))
    t, y = np.array([0, 7, 620]), np.array([0, 4, 5])
    with torch.no_grad():
        output = model(*map(torch.from_numpy, (x, t, y))).sample.numpy()
    print(f"output {output.std():.3f}")
    np.savez_compressed(
        Path(folder) / "dit.npz",
        versions=f"torch {torch.__version__}, diffusers {diffusers.__version__}",
        names=list(state),
        shapes=[" ".join(map(str, shape)) for shape in state.values()],
        x=x,
        t=t,
        y=y,
        output=output,
    )


if __name__ == "__main__":
    main(sys.argv[1])
