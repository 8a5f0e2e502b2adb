"""Weights of the UNets of openai/guided-diffusion and CompVis/latent-diffusion as ours."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ant_jax.interop.layout import kernel

_PLACE = re.compile(r"(input|middle|output)_blocks?(?:\.(\d+))?\.(\d+)(?:\.|$)")

# What a place of the network holds; what is the place itself has no name of its own here.
_INSIDE = {
    "": (),
    "op": (),
    "conv": (),
    "in_layers.0": ("norm_1",),
    "in_layers.2": ("conv_1",),
    "emb_layers.1": ("modulation",),
    "out_layers.0": ("norm_2",),
    "out_layers.3": ("conv_2",),
    "skip_connection": ("skip",),
    "norm": ("norm",),
    "qkv": ("qkv",),
    "proj_out": ("output",),
}

_OUTSIDE = {
    "time_embed.0": "timestep_hidden",
    "time_embed.2": "timestep_embedding",
    "label_emb": "label_embedding",
    "out.0": "output_norm",
    "out.2": "output",
}


def unet_from_torch(
    state: Mapping[str, np.ndarray], new_order_head_channels: int | None = None
) -> dict[str, Any]:
    """Parameters of `ant_jax.models.unet.UNet` from a state dict of the papers' code.

    The papers' label tables have no null class: a row of zeros is added for it, which is the
    network without any label. It never was trained so, hence classifier-free guidance with such
    weights needs further training.

    Args:
      state: arrays by name, of the UNet alone: `{name: tensor.numpy()}` of guided-diffusion's
        `UNetModel`, or of latent-diffusion's once the prefix `model.diffusion_model.` (or that of
        its moving average) is cut off.
      new_order_head_channels: channels of an attention head if the weights were trained with
        `use_new_attention_order`, as ADM's for ImageNet 64 x 64, which order the channels of `qkv`
        by query, key and value first; None otherwise.

    Returns:
      The parameters, float32, for `UNet.apply({"params": parameters}, ...)`.

    Raises:
      ValueError: If a name is none of such a UNet.
    """
    params: dict[str, Any] = {}
    for name, value in state.items():
        layer, _, kind = name.rpartition(".")
        path = _path(layer)
        if path is None or kind not in ("weight", "bias"):
            raise ValueError(f"{name!r} is no weight of a UNet of guided-diffusion's kind.")
        value = np.asarray(value, np.float32)
        if path[-1] == "qkv" and new_order_head_channels:
            split = value.reshape(3, -1, new_order_head_channels, *value.shape[1:])
            value = split.swapaxes(0, 1).reshape(value.shape)
        if path == ("label_embedding",):
            kind, value = "embedding", np.pad(value, ((0, 1), (0, 0)))
        elif kind == "weight":
            kind, value = ("scale", value) if value.ndim == 1 else ("kernel", kernel(value))
        node = params
        for key in path:
            node = node.setdefault(key, {})
        node[kind] = value
    return params


def _path(layer: str) -> tuple[str, ...] | None:
    """The modules that lead to a layer: "input_blocks.3.0.op" is ("input_3_0",)."""
    place = _PLACE.match(layer)
    if place is None:
        return (_OUTSIDE[layer],) if layer in _OUTSIDE else None
    inside = _INSIDE.get(layer[place.end() :])
    return None if inside is None else ("_".join(filter(None, place.groups())), *inside)
