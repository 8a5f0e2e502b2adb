"""Names of the weights of ADM's and LDM's UNets.

openai/guided-diffusion, `unet.py`, and CompVis/latent-diffusion, `openaimodel.py`, a copy of it.
"""

import functools
import re
from collections.abc import Mapping, Set
from typing import Any

import numpy as np

from ant_jax.models.unet import UNet
from ant_jax.published_weights import Names, Place, Recognised, check_fit

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

_ORDERS = ("heads_first", "qkv_first")

FACTS = (*_ORDERS, "num_heads=N", "head_channels=N", "null_row")

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


def names(model: UNet, order: str = "heads_first") -> Names:
    """How the papers' code names and lays out the parameters of a UNet.

    Read are state dicts of the UNet alone and whole checkpoints of latent-diffusion; where such a
    one has a moving average of the UNet's weights, that is what is taken.

    The label tables of the papers' code have no null class. A row of zeros is added for it on
    reading, which is the network without any label; it never was trained so, hence classifier-free
    guidance with such weights needs further training. The row is written with the others: build
    the network there with one class more.

    Args:
      model: the network.
      order: how the channels of `qkv` are ordered there, which no file tells: "heads_first", the
        default of the papers' code, or "qkv_first", by query, key and value first, which it has by
        `use_new_attention_order`, as ADM's network for 64 x 64.
    """
    heads = None
    if order == "qkv_first":
        heads = (model.num_heads or -1, model.head_channels or -1)
    return Names("UNet", functools.partial(_place, heads), _select)


def recognise(
    state: Mapping[str, np.ndarray],
    params: Mapping[str, Any],
    model: UNet,
    image_shape: tuple[int, int, int],
    facts: Mapping[str, str],
) -> Recognised:
    """What a state dict of the papers' code is; see `ant_jax.models`.

    A file tells neither the order of the channels of ``qkv`` nor the attention heads, so both must
    be said; nor what the last row of a table of labels is, if there is one more than classes.

    Raises:
      ValueError: if it doesn't fit the network, or if too little is known of it.
    """
    # First whether it fits at all, then what it is.
    check_fit(state, params, names(model))
    orders = [name for name in _ORDERS if name in facts]
    heads = {name: int(facts[name]) for name in ("num_heads", "head_channels") if name in facts}
    known = published(params)
    hint = "{}, of this size, is said to be {!r}".format(*known) if known else ""
    if len(orders) != 1 or len(heads) != 1:
        raise ValueError(
            "a file does not tell how the attention of a UNet is laid out: say it by "
            "config.init_facts = 'ORDER,HEADS' with ORDER heads_first or, if it was trained with "
            "use_new_attention_order, qkv_first, and HEADS num_heads=N or head_channels=N"
            + (hint and f"; {hint}")
        )
    said = {name + (value and f"={value}") for name, value in facts.items()}
    contradicted = known and not set(known[1].split(",")) <= said
    # LDM stores it where it scales latents by their own standard deviation.
    scale = state.get("scale_factor")
    has_null_row = _has_null_row(state, model.num_classes, facts)
    return Recognised(
        names(model, orders[0]),
        {"num_heads": 0, "head_channels": 0} | heads,
        "label_embedding/embedding" if model.num_classes and not has_null_row else "",
        scale.item() if scale is not None and scale.size == 1 else None,
        hint if contradicted else "",
    )


def _has_null_row(state, classes, facts):
    """The papers' code of UNets has no null class, but with one class more it can be given one."""
    # The second is the name in LDM's moving average.
    tables = ("label_emb.weight", "label_embweight")
    rows = {table.shape[:1] for name, table in state.items() if name.endswith(tables)}
    longer = bool(classes) and rows == {(classes + 1,)}
    if longer and "null_row" not in facts:
        raise ValueError(
            f"its label table has {classes + 1} rows, one more than classes here: if the last is "
            "that of a null class, say so by null_row in config.init_facts"
        )
    if "null_row" in facts and not longer:
        raise ValueError(
            "null_row in config.init_facts is of a label table with one row more than classes"
        )
    return longer


def published(params: Mapping[str, Any]) -> tuple[str, str] | None:
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
