"""Names of the weights of DiT: facebookresearch/DiT, `models.py`, and diffusers' copy of it."""

import functools
import re
from collections.abc import Mapping, Set

import numpy as np

from ant_jax.interop.weights import Names, Place, WeightsError

_OUTSIDE = {
    "timestep_hidden": "t_embedder.mlp.0",
    "timestep_embedding": "t_embedder.mlp.2",
    "label_embedding": "y_embedder.embedding_table",
    "modulation": "final_layer.adaLN_modulation.1",
    "output": "final_layer.linear",
}
_IN_BLOCK = {
    "modulation": "adaLN_modulation.1",
    "qkv": "attn.qkv",
    "attention_output": "attn.proj",
    "mlp_hidden": "mlp.fc1",
    "mlp_output": "mlp.fc2",
}

# Names of diffusers' `DiTTransformer2DModel` as those of the paper's code.
_DIFFUSERS = (
    (r"^pos_embed\.proj\.", "x_embedder.proj."),
    (r"^transformer_blocks\.\d+\.norm1\.emb\.timestep_embedder\.linear_1\.", "t_embedder.mlp.0."),
    (r"^transformer_blocks\.\d+\.norm1\.emb\.timestep_embedder\.linear_2\.", "t_embedder.mlp.2."),
    (r"^transformer_blocks\.\d+\.norm1\.emb\.class_embedder\.", "y_embedder."),
    (r"^transformer_blocks\.(\d+)\.norm1\.linear\.", r"blocks.\1.adaLN_modulation.1."),
    (r"^transformer_blocks\.(\d+)\.attn1\.to_out\.0\.", r"blocks.\1.attn.proj."),
    (r"^transformer_blocks\.(\d+)\.attn1\.to_(q|k|v)\.", r"blocks.\1.attn.\2."),
    (r"^transformer_blocks\.(\d+)\.ff\.net\.0\.proj\.", r"blocks.\1.mlp.fc1."),
    (r"^transformer_blocks\.(\d+)\.ff\.net\.2\.", r"blocks.\1.mlp.fc2."),
    (r"^proj_out_1\.", "final_layer.adaLN_modulation.1."),
    (r"^proj_out_2\.", "final_layer.linear."),
)


def dit_names(patch: int = 2) -> Names:
    """The names of `ant_jax.models.dit.DiT`.

    Read are the names of the paper's code and those of diffusers, of which each block has a copy of
    the embedding of timestep and label. Diffusers' network (as of 0.42) spaces the frequencies of
    the timestep encoding a little wider than the paper's code does, so that the same weights give
    other outputs there; here they give those of the paper's code.

    Written are the names of the paper's code, less its constant position encoding `pos_embed`,
    which depends on the size of the image and which that code makes itself: load by
    `load_state_dict(state, strict=False)`.

    Args:
      patch: side p of a patch in pixels. The patch embedding is a convolution of p x p there.
    """
    return Names(f"DiT with patches of {patch}x{patch}", functools.partial(_place, patch), _select)


def _place(patch: int, module: str) -> Place | None:
    if module == "patch_embedding":
        return Place("x_embedder.proj", spatial=(patch, patch))
    if module in _OUTSIDE:
        return Place(_OUTSIDE[module])
    block = re.fullmatch(r"block_(\d+)\.(\w+)", module)
    if block and block[2] in _IN_BLOCK:
        return Place(f"blocks.{block[1]}.{_IN_BLOCK[block[2]]}")
    return None


def _select(state: Mapping[str, np.ndarray], _: Set[str]) -> dict[str, np.ndarray]:
    selected: dict[str, np.ndarray] = {}
    for name, value in state.items():
        for pattern, replacement in _DIFFUSERS:
            name = re.sub(pattern, replacement, name)
        if name in selected and not np.array_equal(selected[name], value):
            raise WeightsError(
                f"{name} is not the same for all blocks in the state dict; a DiT here has one."
            )
        selected[name] = value
    selected.pop("pos_embed", None)
    for name in [name for name in selected if ".attn.q." in name]:
        parts = [name.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        if all(part in selected for part in parts):
            joined = np.concatenate([selected.pop(part) for part in parts])
            selected[name.replace(".attn.q.", ".attn.qkv.")] = joined
    return selected


DIT = dit_names()
