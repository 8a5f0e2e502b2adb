"""Which activations a network keeps for its backward pass."""

from typing import Annotated, Literal, get_args

import flax.linen as nn
import jax

from ant_jax.settings import Affects

_Remat = Literal["none", "blocks", "dots"]
REMAT = get_args(_Remat)

Remat = Annotated[_Remat, Affects.NOTHING]
"""Type of a setting: which activations are kept for the backward pass; see `rematerialised`."""


def rematerialised(module: type[nn.Module], remat: str) -> type[nn.Module]:
    """A block with the same parameters and values that keeps fewer activations for its gradient.

    Args:
      module: the class of the block.
      remat: "none" keeps all activations. "blocks" keeps only the inputs of the block and computes
        the rest again. "dots" also keeps the outputs of dense layers and convolutions, and computes
        norms, nonlinearities and the two products of attention again, which is 1 to 4 % of the
        work of a DiT and saves about half of its memory.

    Returns:
      The class to use instead.
    """
    if remat == "none":
        return module
    return nn.remat(module, policy=_products if remat == "dots" else None)


def _products(primitive, *args, **params):
    return primitive is jax.lax.conv_general_dilated_p or (
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *args, **params)
    )
