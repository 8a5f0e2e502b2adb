"""Weight names of the autoencoders of CompVis/latent-diffusion, and of diffusers' copies."""

import re
from collections.abc import Mapping, Set

import numpy as np

from ant_jax.published_weights import Names, Place

# From the names of modules here to those of the paper's code.
_OFFICIAL = (
    (r"^$", "quantize.embedding"),
    (r"\.(down|up)_(\d+)_block_(\d+)\.", r".\1.\2.block.\3."),
    (r"\.(down|up)_(\d+)_attention_(\d+)\.", r".\1.\2.attn.\3."),
    (r"\.(down|up)_(\d+)_(down|up)sample$", r".\1.\2.\3sample.conv"),
    (r"\.mid_block_(\d+)\.", r".mid.block_\1."),
    (r"\.mid_attention\.", ".mid.attn_1."),
    (r"\.shortcut$", ".nin_shortcut"),
    (r"\.output$", ".proj_out"),
)
# From the names of diffusers to those of the paper's code, except the order of decoder levels.
_DIFFUSERS = (
    (r"\.(down|up)_blocks\.(\d+)\.resnets\.(\d+)\.", r".\1.\2.block.\3."),
    (r"\.(down|up)_blocks\.(\d+)\.attentions\.(\d+)\.", r".\1.\2.attn.\3."),
    (r"\.(down|up)_blocks\.(\d+)\.(down|up)samplers\.0\.", r".\1.\2.\3sample."),
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.group_norm\.", ".norm."),
    # Until 2023, diffusers used the second name of each pair.
    (r"\.(?:to_q|query)\.", ".q."),
    (r"\.(?:to_k|key)\.", ".k."),
    (r"\.(?:to_v|value)\.", ".v."),
    (r"\.(?:to_out\.0|proj_attn)\.", ".proj_out."),
)
_FIRST_STAGE = "first_stage_model."
# The training loss with its discriminator, and the buffers of a moving average.
_OTHERS = ("loss.", "model_ema.")


def _place(module: str) -> Place | None:
    for pattern, replacement in _OFFICIAL:
        module = re.sub(pattern, replacement, module)
    known = module.startswith(("encoder.", "decoder."))
    known |= module in ("quant_conv", "post_quant_conv", "quantize.embedding")
    # In the paper's code all linear layers are 1 x 1 convolutions.
    return Place(module, spatial=(1, 1)) if known else None


def _select(state: Mapping[str, np.ndarray], _: Set[str]) -> dict[str, np.ndarray]:
    first_stage = {
        name.removeprefix(_FIRST_STAGE): value
        for name, value in state.items()
        if name.startswith(_FIRST_STAGE)
    }
    state = first_stage or state
    levels = [int(level) for level in re.findall(r"up_blocks\.(\d+)\.", " ".join(state))]
    selected = {}
    for name, value in state.items():
        if name.startswith(_OTHERS):
            continue
        # Diffusers counts the decoder's levels from the latent, the paper's code from the image.
        name = re.sub(
            r"up_blocks\.(\d+)", lambda found: f"up_blocks.{max(levels) - int(found[1])}", name
        )
        for pattern, replacement in _DIFFUSERS:
            name = re.sub(pattern, replacement, name)
        selected[name] = value
    return selected


AUTOENCODER = Names("autoencoder", _place, _select)
"""Weight names of `ant_jax.latents.autoencoder.Autoencoder`, KL-regularised or vector-quantised.

Reading accepts the names of latent-diffusion's `AutoencoderKL` and `VQModel`, alone or as the first
stage in a full checkpoint of latent-diffusion or Stable Diffusion, and the names of diffusers'
classes `AutoencoderKL` and `VQModel`. Writing uses the names of latent-diffusion.
"""
