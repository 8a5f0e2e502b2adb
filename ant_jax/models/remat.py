"""Which activations a network keeps for its backward pass."""

from typing import Annotated, Literal

import flax.linen as nn
import jax

from ant_jax.settings import Affects

REMAT = ("none", "blocks", "dots")

Remat = Annotated[Literal[REMAT], Affects.NOTHING]
"""Type of a setting: what is kept for the backward pass, see `rematerialised`."""


def rematerialised(module: type[nn.Module], remat: str) -> type[nn.Module]:
    """A module that keeps less for its backward pass, with the same parameters and values.

    Args:
      module: the class of a block.
      remat: "none" keeps all; "blocks" keeps the block's inputs and computes the rest again; "dots"
        keeps the outputs of products with parameters as well, dense layers and convolutions, and
        computes again norms, nonlinearities and the two products of attention, 1 to 4 % of a
        DiT's work and about half of its memory.

    Returns:
      The class to use in its place.
    """
    if remat == "none":
        return module
    return nn.remat(module, policy=_products if remat == "dots" else None)


def _products(primitive, *args, **params):
    return primitive is jax.lax.conv_general_dilated_p or (
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *args, **params)
    )
