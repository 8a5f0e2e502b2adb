"""Records the outputs of tiny UNets of openai/guided-diffusion for `tests/models/test_unet.py`.

Usage: python record.py CLONE FOLDER

CLONE is a clone of https://github.com/openai/guided-diffusion (MIT licence). FOLDER receives
adm.npz, ldm.npz and new.npz: the state dict by its own names, x (B, C, H, W), t, y and the output.

The files here were recorded with torch 2.13.0, not from a clone but from the text of
`guided_diffusion/unet.py` at commit 18ff408c2d27cd385fa2735c655daa0e3c1e48ef and `nn.py` at
aca3097, copied by hand without the parts that these networks don't use.

LDM's file `ldm/modules/diffusionmodules/openaimodel.py` is a copy of that one, with changes that
concern cross-attention, codebooks and a first multiplier other than 1 only, so its setting is
recorded from the same class.
"""

import sys
from pathlib import Path

import numpy as np
import torch

COMMON = dict(
    image_size=8,
    in_channels=3,
    num_res_blocks=1,
)
SETTINGS = {
    "adm": dict(
        COMMON,
        attention_resolutions=(2,),
        num_head_channels=16,
        model_channels=16,
        out_channels=6,
        channel_mult=(2, 2),
        num_classes=4,
        use_scale_shift_norm=True,
        resblock_updown=True,
    ),
    "ldm": dict(
        COMMON,
        attention_resolutions=(2,),
        num_head_channels=16,
        model_channels=32,
        out_channels=3,
        channel_mult=(1, 2),
    ),
    # The other order of attention channels, and a number of heads that is the same at each level.
    "new": dict(
        COMMON,
        attention_resolutions=(1,),
        num_heads=4,
        use_new_attention_order=True,
        model_channels=32,
        out_channels=3,
        channel_mult=(1, 2),
    ),
}


def random_weight(shape, rng):
    """Few different values, exact in float16, so that the file is small."""
    integers = rng.integers(-2, 3, shape)
    if len(shape) == 1:
        return integers / 8
    return integers * 2.0 ** -round(np.log2(1.4 * np.sqrt(np.prod(shape[1:]))))


def record(unet_model, settings, rng):
    model = unet_model(**settings).eval()
    state = {}
    for name, tensor in model.state_dict().items():
        state[name] = random_weight(tensor.shape, rng)
        # Not the biases of norms, which have a neighbour of the same shape.
        if name.endswith("weight") and tensor.ndim == 1:
            state[name] += 1
    state = {name: weight.astype(np.float16) for name, weight in state.items()}
    model.load_state_dict({name: torch.from_numpy(w).float() for name, w in state.items()})

    x = rng.normal(size=(2, 3, 8, 12)).astype(np.float16)
    t = np.array([7, 620.5], np.float32)
    inputs = {"x": x, "t": t}
    if "num_classes" in settings:
        inputs["y"] = np.array([0, 3])
    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
    with torch.no_grad():
        output = model(tensors["x"].float(), tensors["t"], y=tensors.get("y")).numpy()
    print(f"{sum(w.size for w in state.values()):,} parameters, output {output.std():.3f}")
    return {**state, **inputs, "output": output}


def main(clone, folder):
    sys.path.insert(0, clone)
    from guided_diffusion.unet import UNetModel

    for name, settings in SETTINGS.items():
        arrays = record(UNetModel, settings, np.random.default_rng(0))
        np.savez_compressed(Path(folder) / f"{name}.npz", **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
