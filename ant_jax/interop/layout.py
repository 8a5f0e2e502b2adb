"""How PyTorch lays out weights, and Flax."""

import numpy as np


def kernel(weight: np.ndarray) -> np.ndarray:
    """(out, in, *spatial) to (*spatial, in, out), or (in, out) where it sees one position only."""
    moved = np.moveaxis(weight, (1, 0), (-2, -1))
    return moved.reshape(moved.shape[-2:]) if moved[..., 0, 0].size == 1 else moved
