"""Names of the weights of the Inception network by which FID is measured."""

from collections.abc import Mapping, Set

import numpy as np

from ant_jax.published_weights import Names, Place


def _select(state: Mapping[str, np.ndarray], _: Set[str]) -> dict[str, np.ndarray]:
    return {
        name: value
        for name, value in state.items()
        if not name.startswith("AuxLogits.") and not name.endswith(".num_batches_tracked")
    }


INCEPTION = Names("Inception", Place, _select)
"""The names of a network whose modules are called as in mseitzer/pytorch-fid, `inception.py`.

Modules have the same names here and there. What only training uses is passed over: the auxiliary
classifier and the counts of batches.
"""
