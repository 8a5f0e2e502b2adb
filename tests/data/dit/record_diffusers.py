"""Records what diffusers computes with an exported SiT, for `tests/models/test_dit_diffusers.py`.

Usage: first `python record_diffusers.py export FOLDER` with ant_jax, which writes the network of
sit.npz for diffusers; then `python record_diffusers.py record FOLDER` with torch 2.13.0 and
diffusers as recorded, which writes sit_diffusers.npz beside this file.
"""

import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent


def export(folder):
    from ant_jax import interop

    sys.path.append(str(HERE.parents[1] / "models"))
    import test_dit_diffusers

    found = test_dit_diffusers.exported_sit()
    interop.write_state(
        folder / "diffusion_pytorch_model.safetensors", found.state, {"format": "pt"}
    )
    (folder / "config.json").write_text(json.dumps(found.config))


def record(folder):
    import diffusers
    import torch

    model = diffusers.DiTTransformer2DModel.from_pretrained(folder).eval()
    with np.load(HERE / "sit.npz") as stored:
        x, t, y = (torch.from_numpy(stored[name]) for name in "xty")
    # Time 1 is noise, and the timesteps of a flow are 1000 times as much.
    timesteps = 1000 * (1 - t)
    with torch.no_grad():
        output = model(x, timesteps, y).sample.numpy()
        features = model.transformer_blocks[0].norm1.emb.time_proj(timesteps).numpy()
    print(f"output {output.std():.3f}")
    np.savez_compressed(
        HERE / "sit_diffusers.npz",
        versions=f"torch {torch.__version__}, diffusers {diffusers.__version__}",
        features=features,
        output=output,
    )


if __name__ == "__main__":
    {"export": export, "record": record}[sys.argv[1]](Path(sys.argv[2]))
