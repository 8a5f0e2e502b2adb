"""Weight names of the UNets of ADM and LDM.

They are those of openai/guided-diffusion, `unet.py`, and of its copy in CompVis/latent-diffusion,
`openaimodel.py`.
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
# The modules in a block. In the papers' code attention uses 1-D convolutions over all positions.
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
# Blocks that are only a convolution to another resolution.
_RESAMPLING = {"input": ".op", "output": ".conv"}

# Prefix in a full checkpoint of latent-diffusion, and without "model." in a file of the UNet only.
_NETWORK = re.compile(r"(?:model\.)?diffusion_model\.")
_AVERAGE = "model_ema.diffusion_model"

_ORDERS = ("heads_first", "qkv_first")

FACTS = (*_ORDERS, "num_heads=N", "head_channels=N", "null_row")

# Facts that the files don't contain, from the repositories of ADM and LDM: README.md of
# openai/guided-diffusion at 22e0df8, models/ldm of CompVis/latent-diffusion at a506df5. The key is
# the number of weights without the label table.
_PUBLISHED = {
    295_136_454: ("ADM for 64 x 64", "qkv_first,head_channels=64"),
    420_505_606: ("ADM for 128 x 128", "heads_first,num_heads=4"),
    552_814_086: ("ADM for 256 x 256", "heads_first,head_channels=64"),
    557_973_638: ("ADM for 512 x 512", "heads_first,head_channels=64"),
    274_056_163: ("LDM for FFHQ, CelebA-HQ and LSUN bedrooms", "heads_first,head_channels=32"),
    294_966_916: ("LDM for LSUN churches", "heads_first,num_heads=8"),
}


def names(model: UNet, order: str = "heads_first") -> Names:
    """How the papers' code names and lays out the parameters of a UNet.

    Reading accepts state dicts of the UNet and full checkpoints of latent-diffusion. If a full
    checkpoint has a moving average of the UNet's weights, the average is read.

    The label tables of the papers' code have no row for the null class, so a row of zeros is added
    on reading. With this row the network gets no label, for which it was never trained, so
    classifier-free guidance needs more training. Writing includes this row, so build the papers'
    network with one class more to load the file.

    Args:
      model: the network.
      order: order of the channels of `qkv` in the papers' code, which no file contains:
        "heads_first", its default, or "qkv_first", by query, key and value first, its
        `use_new_attention_order`, as in ADM's network for 64 x 64.
    """
    heads = None
    if order == "qkv_first":
        heads = (model.num_heads or -1, model.head_channels or -1)
    return Names("UNet", functools.partial(_place, heads), _select)


def exported(model: UNet, image_shape: tuple[int, int, int], process: Mapping[str, Any]) -> Names:
    """How an exported file names and lays out the parameters; see `ant_jax.models`."""
    return names(model)


def recognise(
    state: Mapping[str, np.ndarray],
    params: Mapping[str, Any],
    model: UNet,
    image_shape: tuple[int, int, int],
    facts: Mapping[str, str],
) -> Recognised:
    """How to read a state dict of the papers' code; see `ant_jax.models`.

    A file contains neither the order of the channels of ``qkv`` nor the number of attention heads,
    so the user must state both. If a label table has one row more than there are classes, the user
    must also state that this is the row of the null class.

    Raises:
      ValueError: if the state dict doesn't match the network, or if a needed fact is missing.
    """
    # First, because a state dict of another network needs no facts.
    check_fit(state, params, names(model))
    orders = [name for name in _ORDERS if name in facts]
    heads = {name: int(facts[name]) for name in ("num_heads", "head_channels") if name in facts}
    known = published(params)
    hint = "{} has the same size, and its facts are {!r}".format(*known) if known else ""
    if len(orders) != 1 or len(heads) != 1:
        raise ValueError(
            "a file does not contain the layout of a UNet's attention: set config.init_facts = "
            "'ORDER,HEADS', with ORDER heads_first or, if it was trained with "
            "use_new_attention_order, qkv_first, and HEADS num_heads=N or head_channels=N"
            + (hint and f"; {hint}")
        )
    said = {name + (value and f"={value}") for name, value in facts.items()}
    contradicted = known and not set(known[1].split(",")) <= said
    # LDM stores it if it scales the latents by their standard deviation.
    scale = state.get("scale_factor")
    has_null_row = _has_null_row(state, model.num_classes, facts)
    return Recognised(
        names(model, orders[0]),
        {"num_heads": 0, "head_channels": 0} | heads,
        "label_embedding/embedding" if model.num_classes and not has_null_row else "",
        scale.item() if scale is not None and scale.size == 1 else None,
        hint if contradicted else "",
        {"name": "gaussian"},
    )


def _has_null_row(state, classes, facts):
    """Whether the label table has a row for the null class: trained with one class more."""
    # The second name is that of LDM's moving average.
    tables = ("label_emb.weight", "label_embweight")
    rows = {table.shape[:1] for name, table in state.items() if name.endswith(tables)}
    longer = bool(classes) and rows == {(classes + 1,)}
    if longer and "null_row" not in facts:
        raise ValueError(
            f"its label table has {classes + 1} rows, one more than the classes here: if the last "
            "row is that of a null class, add null_row to config.init_facts"
        )
    if "null_row" in facts and not longer:
        raise ValueError(
            "null_row in config.init_facts is for a label table with one row more than classes"
        )
    return longer


def published(params: Mapping[str, Any]) -> tuple[str, str] | None:
    """The published network that has the same number of weights.

    Args:
      params: a nested dict of arrays, or of other objects with a `size`.

    Returns:
      Its name, and its facts in the form of ``config.init_facts``; None if there is no such one.
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
        # LDM removes the dots from the names of its moving average.
        dotted = {_AVERAGE + name.replace(".", ""): name for name in wanted}
        return {dotted.get(name, name): value for name, value in averages.items()}
    network = {
        name[found.end() :]: value
        for name, value in state.items()
        if (found := _NETWORK.match(name))
    }
    return network or dict(state)
