"""Names of the weights of ADM's and LDM's UNets.

openai/guided-diffusion, `unet.py`, and CompVis/latent-diffusion, `openaimodel.py`, a copy of it.
"""

import functools
import re
from collections.abc import Mapping, Set
from typing import Any

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

# Of a whole checkpoint of latent-diffusion; "model." is gone where the file has nothing else.
_NETWORK = re.compile(r"(?:model\.)?diffusion_model\.")
_AVERAGE = "model_ema.diffusion_model"

ORDERS = ("heads_first", "qkv_first")

# What the repositories of ADM and LDM say of their checkpoints that the files don't: README.md of
# openai/guided-diffusion at 22e0df8, models/ldm of CompVis/latent-diffusion at a506df5. By the
# number of weights without label table.
_PUBLISHED = {
    295_136_454: ("ADM's for 64 x 64", "qkv_first,head_channels=64"),
    420_505_606: ("ADM's for 128 x 128", "heads_first,num_heads=4"),
    552_814_086: ("ADM's for 256 x 256", "heads_first,head_channels=64"),
    557_973_638: ("ADM's for 512 x 512", "heads_first,head_channels=64"),
    274_056_163: ("LDM's for FFHQ, CelebA-HQ and LSUN bedrooms", "heads_first,head_channels=32"),
    294_966_916: ("LDM's for LSUN churches", "heads_first,num_heads=8"),
}


def unet_names(order: str, num_heads: int = 0, head_channels: int = 0) -> Names:
    """The names of `ant_jax.models.unet.UNet`.

    Read are state dicts of the UNet alone and whole checkpoints of latent-diffusion; where such a
    one has a moving average of the UNet's weights, that is what is taken.

    The label tables of the papers' code have no null class. A row of zeros is added for it on
    reading, which is the network without any label; it never was trained so, hence classifier-free
    guidance with such weights needs further training. The row is written with the others: build
    the network there with one class more.

    Args:
      order: how the channels of `qkv` are ordered there, which no file tells: "heads_first", the
        default of the papers' code, or "qkv_first", by query, key and value first, which it has by
        `use_new_attention_order`, as ADM's network for 64 x 64.
      num_heads: attention heads wherever attention is; for "qkv_first", of which one of the two is
        needed.
      head_channels: channels of a head, the other way to say it.
    """
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}, not {order!r}.")
    heads = None
    if order == "qkv_first":
        if bool(num_heads) == bool(head_channels):
            raise ValueError("qkv_first needs either num_heads or head_channels.")
        heads = (num_heads or -1, head_channels or -1)
    return Names("UNet", functools.partial(_place, heads), _select)


def published_unet(params: Mapping[str, Any]) -> tuple[str, str] | None:
    """The published network that has so many weights, and what its authors say of it.

    Args:
      params: a nested dict of anything with a `size`.

    Returns:
      Its name, and the facts as ``config.init_facts`` takes them; None if there is none.
    """
    network = (tree for name, tree in params.items() if name != "label_embedding")
    return _PUBLISHED.get(sum(leaf.size for tree in network for leaf in _sized(tree)))


def _sized(tree: Any) -> list[Any]:
    if not isinstance(tree, Mapping):
        return [tree]
    return [leaf for inner in tree.values() for leaf in _sized(inner)]


def _place(heads: tuple[int, int] | None, module: str) -> Place | None:
    if module in _OUTSIDE:
        return _OUTSIDE[module]
    block = _BLOCK.fullmatch(module)
    if block is None or (block[3] and block[3] not in _INSIDE):
        return None
    name = f"{block[1]}_block{'' if block[1] == 'middle' else 's'}{block[2].replace('_', '.')}"
    if block[3]:
        inside = _INSIDE[block[3]]
        order = heads if block[3] == "qkv" else None
        return inside._replace(module=f"{name}.{inside.module}", heads=order)
    return Place(name if module == "input_0_0" else name + _RESAMPLING[block[1]])


def _select(state: Mapping[str, np.ndarray], wanted: Set[str]) -> dict[str, np.ndarray]:
    averages = {name: value for name, value in state.items() if name.startswith(_AVERAGE)}
    if averages:
        # A moving average is stored by the names without their dots.
        dotted = {_AVERAGE + name.replace(".", ""): name for name in wanted}
        return {dotted.get(name, name): value for name, value in averages.items()}
    network = {
        name[found.end() :]: value
        for name, value in state.items()
        if (found := _NETWORK.match(name))
    }
    return network or dict(state)
