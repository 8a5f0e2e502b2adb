"""Names of the weights of ADM's and LDM's UNets.

openai/guided-diffusion, `unet.py`, and CompVis/latent-diffusion, `openaimodel.py`, a copy of it.
"""

import functools
import re
from collections.abc import Mapping, Set

import numpy as np

from ant_jax.interop.weights import Names, Place

_OUTSIDE = {
    "timestep_hidden": Place("time_embed.0"),
    "timestep_embedding": Place("time_embed.2"),
    "label_embedding": Place("label_emb", null_row=True),
    "output_norm": Place("out.0"),
    "output": Place("out.2"),
}

_BLOCK = re.compile(r"(input|middle|output)((?:_\d+)+)(?:\.(\w+))?")
# What a block holds. Attention is a convolution over all positions in a row there.
_INSIDE = {
    "norm_1": Place("in_layers.0"),
    "conv_1": Place("in_layers.2"),
    "modulation": Place("emb_layers.1"),
    "norm_2": Place("out_layers.0"),
    "conv_2": Place("out_layers.3"),
    "skip": Place("skip_connection", spatial=(1, 1)),
    "norm": Place("norm"),
    "qkv": Place("qkv", spatial=(1,)),
    "output": Place("proj_out", spatial=(1,)),
}
# Blocks that are a convolution to another resolution.
_RESAMPLING = {"input": ".op", "output": ".conv"}

_NETWORK = "model.diffusion_model."
_AVERAGE = "model_ema.diffusion_model"


def unet_names(new_order_head_channels: int | None = None) -> Names:
    """The names of `ant_jax.models.unet.UNet`.

    Read are state dicts of the UNet alone and whole checkpoints of latent-diffusion; where such a
    one has a moving average of the UNet's weights, that is what is taken.

    The label tables of the papers' code have no null class. A row of zeros is added for it on
    reading, which is the network without any label; it never was trained so, hence classifier-free
    guidance with such weights needs further training. The row is written with the others: build
    the network there with one class more.

    Args:
      new_order_head_channels: channels of an attention head if the weights are for
        `use_new_attention_order`, as ADM's for ImageNet 64 x 64, which order the channels of `qkv`
        by query, key and value first; None otherwise.
    """
    return Names("UNet", functools.partial(_place, new_order_head_channels), _select)


def _place(new_order_head_channels: int | None, module: str) -> Place | None:
    if module in _OUTSIDE:
        return _OUTSIDE[module]
    block = _BLOCK.fullmatch(module)
    if block is None or (block[3] and block[3] not in _INSIDE):
        return None
    name = f"{block[1]}_block{'' if block[1] == 'middle' else 's'}{block[2].replace('_', '.')}"
    if block[3]:
        inside = _INSIDE[block[3]]
        order = new_order_head_channels if block[3] == "qkv" else None
        return inside._replace(module=f"{name}.{inside.module}", head_channels=order)
    return Place(name if module == "input_0_0" else name + _RESAMPLING[block[1]])


def _select(state: Mapping[str, np.ndarray], wanted: Set[str]) -> dict[str, np.ndarray]:
    averages = {name: value for name, value in state.items() if name.startswith(_AVERAGE)}
    if averages:
        # A moving average is stored by the names without their dots.
        dotted = {_AVERAGE + name.replace(".", ""): name for name in wanted}
        return {dotted.get(name, name): value for name, value in averages.items()}
    network = {
        name.removeprefix(_NETWORK): value
        for name, value in state.items()
        if name.startswith(_NETWORK)
    }
    return network or dict(state)


UNET = unet_names()
