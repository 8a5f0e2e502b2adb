"""Names of the weights of DiT: facebookresearch/DiT, `models.py`, and diffusers' copy of it."""

import functools
import re
from collections.abc import Mapping, Set
from typing import Any

import jax.numpy as jnp
import numpy as np

from ant_jax.models import dit
from ant_jax.published_weights import Names, Place, Recognised, WeightsError, check_fit

FACTS = ("heads=N", "no_null_row", "no_pos_embed")

# The size whose weights diffusers has taken over from the paper's authors.
_CONVERTED = "XL"

_OUTSIDE = {
    "timestep_hidden": "t_embedder.mlp.0",
    "timestep_embedding": "t_embedder.mlp.2",
    "modulation": "final_layer.adaLN_modulation.1",
    "output": "final_layer.linear",
}
_LABELS = "y_embedder.embedding_table"
_IN_BLOCK = {
    "modulation": "adaLN_modulation.1",
    "qkv": "attn.qkv",
    "attention_output": "attn.proj",
    "mlp_hidden": "mlp.fc1",
    "mlp_output": "mlp.fc2",
}

_POSITIONS = ("pos_embed", "pos_embed.pos_embed")  # the second is diffusers'

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


# The network of these names spaces the frequencies of the timestep encoding otherwise.
_OF_DIFFUSERS = "transformer_blocks."
# Of sines and cosines of some hundred radians in float32.
_ROUNDING = 1e-4
_SMALLER = (jnp.float16, jnp.bfloat16)


def names(model: dit.DiT, positions: np.ndarray | None = None, null_row: bool = True) -> Names:
    """How the paper's code names and lays out the parameters of a DiT.

    Read are the names of the paper's code and those of diffusers, of which each block has a copy of
    the embedding of timestep and label. Diffusers' network (as of 0.42) spaces the frequencies of
    the timestep encoding a little wider than the paper's code does, so that the same weights give
    other outputs there; here they give those of the paper's code.

    The position encoding `pos_embed` is no weight: it must be that of the network here. A label
    table of one row for an unconditional network, as of the paper's code with one class, is added
    to the bias of the timestep embedding, which is the same network.

    Written are the names of the paper's code, less `pos_embed`, which depends on the size of the
    image and which that code makes itself: load by `load_state_dict(state, strict=False)`.

    Args:
      model: the network. With patches of p x p pixels the patch embedding is a convolution of p x p
        there.
      positions: (N, width), what `ant_jax.models.dit.positions` returns for the size of the image,
        to compare `pos_embed` with; None for state dicts that have none.
      null_row: whether the label table there has a row for the null class, as it has where the
        network was trained with labels dropped. Without, a row of zeros is added on reading: the
        network without any label, which it never was trained as.
    """
    return Names(
        f"DiT with patches of {model.patch}x{model.patch}",
        functools.partial(_place, model.patch, null_row),
        functools.partial(_select, positions),
    )


def recognise(
    state: Mapping[str, np.ndarray],
    params: Mapping[str, Any],
    model: dit.DiT,
    image_shape: tuple[int, int, int],
    facts: Mapping[str, str],
) -> Recognised:
    """What a state dict of the paper's code or of diffusers is; see `ant_jax.models`.

    A file tells neither the attention heads, which are those of the published size or said, nor
    whether its table of labels has a row of the null class.

    Raises:
      ValueError: if it doesn't fit the network, or if too little is known of it.
    """
    without_null = _without_null_row(state, model.num_classes, facts)
    rows, columns = (side // model.patch for side in image_shape[:2])
    found = names(model, dit.positions(rows, columns, model.width), not without_null)
    check_fit(state, params, found)
    of_diffusers = any(name.startswith(_OF_DIFFUSERS) for name in state)
    # Diffusers leaves it out of its files.
    has_positions = of_diffusers or any(name in state for name in _POSITIONS)
    if not (has_positions or "no_pos_embed" in facts):
        raise ValueError(
            "it has no pos_embed, which files of the paper's code have: if its network has the "
            "same sines and cosines, say so by no_pos_embed in config.init_facts"
        )
    sizes = {(size["width"], size["depth"]): name for name, size in dit.SIZES.items()}
    size = sizes.get((model.width, model.depth))
    if of_diffusers and size != _CONVERTED:
        raise ValueError(
            "diffusers' own DiT encodes timesteps otherwise than the paper's code and this one do; "
            f"known to be converted from that code is DiT-{_CONVERTED} alone"
        )
    if "heads" in facts:
        heads = int(facts["heads"])
    elif size:
        heads = dit.SIZES[size]["heads"]
    else:
        raise ValueError(
            "a file does not tell the attention heads of a DiT, and this one is of no published "
            "size: say them by config.init_facts = 'heads=N'"
        )
    untrained = "label_embedding/embedding" if without_null else ""
    return Recognised(found, {"heads": heads}, untrained)


def _without_null_row(state, classes, facts):
    tables = [table for name, table in state.items() if name.endswith("embedding_table.weight")]
    shorter = bool(classes) and {table.shape[:1] for table in tables} == {(classes,)}
    if "no_null_row" in facts and not shorter:
        raise ValueError(
            "no_null_row in config.init_facts is of a label table with as many rows as classes"
        )
    if shorter and "no_null_row" not in facts:
        raise ValueError(
            f"its label table has {classes} rows, one less than classes and null class here: if it "
            f"is of these {classes} classes and none were dropped in its training, say so by "
            "no_null_row in config.init_facts"
        )
    return shorter


def _place(patch: int, null_row: bool, module: str) -> Place | None:
    if module == "patch_embedding":
        return Place("x_embedder.proj", spatial=(patch, patch))
    if module == "label_embedding":
        return Place(_LABELS, null_row=not null_row)
    if module in _OUTSIDE:
        return Place(_OUTSIDE[module])
    block = re.fullmatch(r"block_(\d+)\.(\w+)", module)
    if block and block[2] in _IN_BLOCK:
        return Place(f"blocks.{block[1]}.{_IN_BLOCK[block[2]]}")
    return None


def _select(
    positions: np.ndarray | None, state: Mapping[str, np.ndarray], wanted: Set[str]
) -> dict[str, np.ndarray]:
    selected: dict[str, np.ndarray] = {}
    for name, value in state.items():
        for pattern, replacement in _DIFFUSERS:
            name = re.sub(pattern, replacement, name)
        if name in selected and not np.array_equal(selected[name], value):
            raise WeightsError(
                f"{name} is not the same for all blocks in the state dict; a DiT here has one."
            )
        selected[name] = value
    for name in [name for name in _POSITIONS if name in selected]:
        _check_positions(selected.pop(name), positions)
    for name in [name for name in selected if ".attn.q." in name]:
        parts = [name.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        if all(part in selected for part in parts):
            joined = np.concatenate([selected.pop(part) for part in parts])
            selected[name.replace(".attn.q.", ".attn.qkv.")] = joined
    table, bias = f"{_LABELS}.weight", "t_embedder.mlp.2.bias"
    rows = len(selected[table]) if table in selected and selected[table].ndim else 0
    if rows == 1 and table not in wanted and bias in selected:
        selected[bias] = np.float32(selected[bias]) + np.float32(selected.pop(table)[0])
    return selected


def _check_positions(theirs: np.ndarray, ours: np.ndarray | None) -> None:
    if ours is None:
        raise WeightsError("pos_embed can't be compared with that of a network of unknown size.")
    if theirs.shape[-2:] != ours.shape or theirs.size != ours.size:
        raise WeightsError(
            f"pos_embed is of {theirs.shape[-2] if theirs.ndim > 1 else 0} positions, and the "
            f"network here has {len(ours)}: it is of a network for images of another size."
        )
    theirs = np.float32(theirs).reshape(ours.shape)
    difference = np.abs(theirs - ours).max()
    # Whatever type they have now, they may have been rounded to a smaller one before.
    before = [kind for kind in _SMALLER if np.array_equal(theirs.astype(kind), theirs)]
    rounding = max([_ROUNDING, *(float(jnp.finfo(kind).eps) for kind in before)])
    # NaN is no rounding either.
    if not difference < rounding:
        raise WeightsError(
            f"pos_embed differs by up to {difference:.2g} from the fixed sines and cosines that a "
            "DiT here has: it was learned, or is that of another code."
        )
