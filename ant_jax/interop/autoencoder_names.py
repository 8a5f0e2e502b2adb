"""Weights of the autoencoders of CompVis/latent-diffusion, and of diffusers, as ours."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ant_jax.interop.layout import kernel

# The names of diffusers as those of the paper's code, but for the order of the decoder's levels.
_DIFFUSERS = (
    (r"\.(down|up)_blocks\.(\d+)\.resnets\.(\d+)\.", r".\1.\2.block.\3."),
    (r"\.(down|up)_blocks\.(\d+)\.(down|up)samplers\.0\.", r".\1.\2.\3sample."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.group_norm\.", ".norm."),
    # The second of each pair until 2023.
    (r"\.(?:to_q|query)\.", ".q."),
    (r"\.(?:to_k|key)\.", ".k."),
    (r"\.(?:to_v|value)\.", ".v."),
    (r"\.(?:to_out\.0|proj_attn)\.", ".proj_out."),
)
# The names of the paper's code as ours.
_OURS = (
    (r"^quantize\.embedding\.weight$", "embedding"),
    (r"\.(down|up)\.(\d+)\.block\.(\d+)\.", r".\1_\2_block_\3."),
    (r"\.(down|up)\.(\d+)\.(down|up)sample\.conv\.", r".\1_\2_\3sample."),
    (r"\.mid\.block_", ".mid_block_"),
    (r"\.mid\.attn_1\.", ".mid_attention."),
    (r"\.nin_shortcut\.", ".shortcut."),
    (r"\.proj_out\.", ".output."),
)


def autoencoder_from_torch(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Parameters of `ant_jax.models.autoencoder.Autoencoder` from a state dict.

    Args:
      state: arrays by name, of an autoencoder alone, by the names of latent-diffusion's
        `AutoencoderKL` or `VQModel`, or of diffusers' classes of the same names. Weights of the
        training loss (`loss.`) are left out.

    Returns:
      The parameters, float32, for `Autoencoder.apply({"params": parameters}, ...)`. They fit the
      network if its fields do; nothing is checked here.
    """
    state = {name: value for name, value in state.items() if not name.startswith("loss.")}
    levels = {int(level) for level in re.findall(r"up_blocks\.(\d+)\.", " ".join(state))}
    params: dict[str, Any] = {}
    for name, value in state.items():
        # Diffusers counts the decoder's levels from the smallest, the paper's code from the image.
        name = re.sub(
            r"up_blocks\.(\d+)", lambda found: f"up_blocks.{max(levels) - int(found[1])}", name
        )
        for pattern, replacement in (*_DIFFUSERS, *_OURS):
            name = re.sub(pattern, replacement, name)
        *path, kind = name.split(".")
        value = np.asarray(value, np.float32)
        if kind == "weight":
            kind, value = ("scale", value) if value.ndim == 1 else ("kernel", kernel(value))
        node = params
        for key in path:
            node = node.setdefault(key, {})
        node[kind] = value
    return params
