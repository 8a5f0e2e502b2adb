"""Weight names of DiT: facebookresearch/DiT, `models.py`, and diffusers' version of it.

byeongjun-park/DTR has the same names, and in each block a table of the channels of each timestep.
willisma/SiT has the same names too. Its time runs from noise, 0, to data, 1, its network gets this
time as it is, and its velocity points to the data.
"""

import functools
import re
from collections.abc import Mapping, Set
from typing import Any

import jax.numpy as jnp
import numpy as np

from ant_jax.models import dit, routing, timesteps
from ant_jax.published_weights import (
    OWN_NAMES,
    Names,
    Place,
    Recognised,
    WeightsError,
    check_fit,
)

FACTS = ("heads=N", "no_null_row", "no_pos_embed", "sit")

# The size for which diffusers has converted the weights of the paper's authors.
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

_ROUTING = "routing._unit_mapping"

_POSITIONS = ("pos_embed", "pos_embed.pos_embed")  # the second is diffusers'
_LEVELS = "t_embedder.mlp.0.weight"
_FINAL = ("final_layer.linear.weight", "final_layer.linear.bias")

# What a network of the code of SiT is here.
_SIT_FIELDS = {"level_scale": 1.0}
_SIT_PROCESS = {"name": "flow", "prediction": "velocity"}

# From the names of diffusers' `DiTTransformer2DModel` to those of the paper's code.
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


# Diffusers' network, which has these names, uses other frequencies for the timestep encoding.
_OF_DIFFUSERS = "transformer_blocks."
# Rounding error of float32 sines and cosines of some hundred radians.
_ROUNDING = 1e-4
_SMALLER = (jnp.float16, jnp.bfloat16)


def names(
    model: dit.DiT,
    positions: np.ndarray | None = None,
    null_row: bool = True,
    sit: bool = False,
) -> Names:
    """How the paper's code names and lays out the parameters of a DiT.

    Reading accepts the names of the paper's code and of diffusers, where each block has a copy of
    the embedding of timestep and label. Diffusers' network (as of 0.42) spaces the frequencies of
    the timestep encoding slightly wider than the paper's code, so its outputs for the same weights
    differ. The outputs here are those of the paper's code.

    The position encoding `pos_embed` is not a weight: it must equal the encoding of the network
    here. For an unconditional network, a label table of one row, as in the paper's code with one
    class, is added to the bias of the timestep embedding; the network computes the same.

    A DiT with a norm, an MLP or positions that the paper's code does not have keeps its own names.

    Writing uses the names of the paper's code. It adds the tables of denoising task routing, and
    `pos_embed` if the image size is known.

    The code of SiT uses these names for another function. Its time is 1 - t: the cosines and sines
    of 1 - t are linear functions of those of t, so a change of the first layer of the timestep
    embedding reverses the time exactly. Its velocity is the negative one. Of the 2 C outputs that
    its network may have, its code uses the first C; a network here has these alone.

    Args:
      model: the network. In the paper's code the patch embedding is a convolution with kernels of
        the patch size.
      positions: (N, width), the result of `ant_jax.models.dit.positions` for the image size, which
        `pos_embed` must equal; None if the image size is unknown, for state dicts without it.
      null_row: whether the label table of the state dict has a row for the null class, which it has
        if the network was trained with label dropout. Otherwise a row of zeros is added on reading.
        With this row the network gets no label, for which it was never trained.
      sit: whether the published network is one of the code of SiT.
    """
    if unpublished(model):
        return OWN_NAMES
    constants: dict[str, np.ndarray] = {}
    if positions is not None:
        constants["pos_embed"] = positions.astype(np.float32)[None]
    if model.routing < 1:
        windows = _windows(model, model.routing_levels).astype(np.float32)
        constants |= {f"blocks.{i}.{_ROUTING}": windows for i in range(model.depth)}
    return Names(
        f"{'SiT' if sit else 'DiT'} with patches of {model.patch}x{model.patch}",
        functools.partial(_place, model.patch, null_row),
        functools.partial(_select, positions, model, sit),
        _reversed if sit else dict,
        constants,
    )


def exported(
    model: dit.DiT, image_shape: tuple[int, int, int], process: Mapping[str, Any]
) -> Names:
    """How an exported file names and lays out the parameters; see `ant_jax.models`.

    A network that the code of SiT has too, for the velocity of a flow and with `level_scale` 1, is
    written as one of that code, with C outputs (`learn_sigma=False`).
    """
    sit = (
        model.routing == 1
        and all(process.get(name) == value for name, value in _SIT_PROCESS.items())
        and all(getattr(model, name) == value for name, value in _SIT_FIELDS.items())
    )
    return names(model, _positions(model, image_shape), sit=sit)


def recognise(
    state: Mapping[str, np.ndarray],
    params: Mapping[str, Any],
    model: dit.DiT,
    image_shape: tuple[int, int, int],
    facts: Mapping[str, str],
) -> Recognised:
    """How to read a state dict of the paper's code or of diffusers; see `ant_jax.models`.

    A file does not contain the number of attention heads: it follows from a published size, or the
    user states it. A file does not say either whether its label table has a row for the null class,
    or whether it is one of SiT.

    Raises:
      ValueError: if the state dict doesn't match the network, or if a needed fact is missing.
    """
    if differing := unpublished(model):
        raise ValueError(
            f"the paper's code has no DiT with config.model.{' and config.model.'.join(differing)}"
        )
    if model.routing < 1 and not any(name.endswith(_ROUTING) for name in state):
        raise ValueError(
            f"it has no denoising task routing, and config.model.routing = {model.routing}"
        )
    sit = "sit" in facts
    if model.level_scale == 1 and not sit:
        raise ValueError(
            "config.model.level_scale = 1 is for a network of the code of SiT, and no file says "
            "whether it is one: if it is, add sit to config.init_facts"
        )
    of_diffusers = any(name.startswith(_OF_DIFFUSERS) for name in state)
    if sit and model.learned_variance:
        raise ValueError("a SiT has no learned variance: it needs config.process.name = 'flow'")
    if sit and of_diffusers:
        raise ValueError("sit in config.init_facts is for files with the names of the code of SiT")
    without_null = _without_null_row(state, model.num_classes, facts)
    found = names(model, _positions(model, image_shape), not without_null, sit)
    check_fit(state, params, found)
    # Files of diffusers have no pos_embed.
    has_positions = of_diffusers or any(name in state for name in _POSITIONS)
    if not (has_positions or "no_pos_embed" in facts):
        raise ValueError(
            "it has no pos_embed, which files of the paper's code have: if its network has the "
            "same sines and cosines, add no_pos_embed to config.init_facts"
        )
    sizes = {(size["width"], size["depth"]): name for name, size in dit.SIZES.items()}
    size = sizes.get((model.width, model.depth))
    if of_diffusers and size != _CONVERTED:
        raise ValueError(
            "diffusers' DiT encodes timesteps differently from the paper's code and from the DiT "
            f"here; only DiT-{_CONVERTED} is known to be converted from the paper's code"
        )
    if "heads" in facts:
        heads = int(facts["heads"])
    elif size:
        heads = dit.SIZES[size]["heads"]
    else:
        raise ValueError(
            "a file does not contain the number of attention heads of a DiT, and this DiT has no "
            "published size: set config.init_facts = 'heads=N'"
        )
    return Recognised(
        found,
        {"heads": heads} | (_SIT_FIELDS if sit else {}),
        untrained="label_embedding/embedding" if without_null else "",
        process=_SIT_PROCESS if sit else {"name": "gaussian"},
    )


def _positions(model, image_shape):
    rows, columns = (side // model.patch for side in image_shape[:2])
    return dit.positions(rows, columns, model.width)


def unpublished(model: dit.DiT) -> list[str]:
    """The options of the network that the paper's code does not have."""
    published = dit.DiT(channels=model.channels)
    return [
        f"{name} = {getattr(model, name)!r}"
        for name in ("norm", "qk_norm", "mlp", "position")
        if getattr(model, name) != getattr(published, name)
    ]


def _without_null_row(state, classes, facts):
    tables = [table for name, table in state.items() if name.endswith("embedding_table.weight")]
    shorter = bool(classes) and {table.shape[:1] for table in tables} == {(classes,)}
    if "no_null_row" in facts and not shorter:
        raise ValueError(
            "no_null_row in config.init_facts is for a label table with as many rows as classes"
        )
    if shorter and "no_null_row" not in facts:
        raise ValueError(
            f"its label table has {classes} rows, but {classes} classes and the null class need "
            f"{classes + 1}: if the network was trained on these {classes} classes without label "
            "dropout, add no_null_row to config.init_facts"
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
    positions: np.ndarray | None,
    model: dit.DiT,
    sit: bool,
    state: Mapping[str, np.ndarray],
    wanted: Set[str],
) -> dict[str, np.ndarray]:
    selected: dict[str, np.ndarray] = {}
    for name, value in state.items():
        for pattern, replacement in _DIFFUSERS:
            name = re.sub(pattern, replacement, name)
        if name in selected and not np.array_equal(selected[name], value):
            raise WeightsError(
                f"{name} differs between the blocks of the state dict; a DiT here has only one."
            )
        selected[name] = value
    for name in [name for name in _POSITIONS if name in selected]:
        _check_positions(selected.pop(name), positions)
    for name in [name for name in selected if name.endswith(_ROUTING)]:
        _check_routing(selected.pop(name), model)
    for name in [name for name in selected if ".attn.q." in name]:
        parts = [name.replace(".attn.q.", f".attn.{part}.") for part in "qkv"]
        if all(part in selected for part in parts):
            joined = np.concatenate([selected.pop(part) for part in parts])
            selected[name.replace(".attn.q.", ".attn.qkv.")] = joined
    table, bias = f"{_LABELS}.weight", "t_embedder.mlp.2.bias"
    rows = len(selected[table]) if table in selected and selected[table].ndim else 0
    if rows == 1 and table not in wanted and bias in selected:
        of_all = selected.pop(table)[0].astype(np.float32)
        selected[bias] = selected[bias].astype(np.float32) + of_all
    return _reversed(_used(selected, model)) if sit else selected


def _used(state: dict[str, np.ndarray], model: dit.DiT) -> dict[str, np.ndarray]:
    """Without the second half of 2 C outputs, which the code of SiT does not use."""
    pixels = model.patch**2
    for name in _FINAL:
        value = state.get(name)
        if value is not None and value.shape[:1] == (2 * model.channels * pixels,):
            by_pixel = value.reshape(pixels, 2, model.channels, *value.shape[1:])
            state[name] = by_pixel[:, 0].reshape(-1, *value.shape[1:])
    return state


def _reversed(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same network for the time 1 - t and the negative velocity; its own inverse."""
    state = state | {name: -state[name] for name in _FINAL if name in state}
    kernel = state.get(_LEVELS)
    if kernel is not None and kernel.shape[-1] == dit.TIMESTEP_FEATURES:
        of_cos, of_sin = np.split(np.float64(kernel), 2, axis=-1)
        ends = np.float64(timesteps.frequencies(dit.TIMESTEP_FEATURES))
        cos, sin = np.cos(ends), np.sin(ends)
        turned = of_cos * cos + of_sin * sin, of_cos * sin - of_sin * cos
        state[_LEVELS] = np.concatenate(turned, axis=-1).astype(np.float32)
    return state


def _windows(model: dit.DiT, levels: int) -> np.ndarray:
    """(levels, width) bool: the channels that each noise level uses."""
    settings = model.width, model.routing, model.routing_power
    channels = np.arange(model.width) - routing.window_starts(levels, *settings)[:, None]
    return (channels >= 0) & (channels < int(model.width * model.routing))


def _check_routing(theirs: np.ndarray, model: dit.DiT) -> None:
    ours = _windows(model, len(theirs))
    if model.routing == 1 or theirs.shape != ours.shape or (theirs != ours).any():
        raise WeightsError(
            f"its blocks use {np.mean(theirs):.3g} of their channels at a noise level, by "
            "denoising task routing: set config.model.routing, routing_power and routing_levels "
            "as there"
        )


def _check_positions(theirs: np.ndarray, ours: np.ndarray | None) -> None:
    if ours is None:
        raise WeightsError("pos_embed can't be checked, because the image size is unknown.")
    if theirs.shape[-2:] != ours.shape or theirs.size != ours.size:
        raise WeightsError(
            f"pos_embed has {theirs.shape[-2] if theirs.ndim > 1 else 0} positions, and the "
            f"network here has {len(ours)}: it belongs to a network for another image size."
        )
    theirs = theirs.astype(np.float32).reshape(ours.shape)
    difference = np.abs(theirs - ours).max()
    # The values may have been rounded to a smaller type before.
    before = [kind for kind in _SMALLER if np.array_equal(theirs.astype(kind), theirs)]
    rounding = max([_ROUNDING, *(float(jnp.finfo(kind).eps) for kind in before)])
    # Written so that NaN fails too.
    if not difference < rounding:
        raise WeightsError(
            f"pos_embed differs by up to {difference:.2g} from the fixed sines and cosines of a "
            "DiT here: it was learned, or comes from other code."
        )
