"""The 8x8 handwritten digits, included in the package.

They are the test set of E. Alpaydin and C. Kaynak, *Optical Recognition of Handwritten Digits*, UCI
Machine Learning Repository, 1998 (https://archive.ics.uci.edu/dataset/80), in the order in which
scikit-learn's `load_digits` has them, under the licence CC BY 4.0; see `digits_license.txt`.
"""

import functools
from pathlib import Path
from typing import Literal

import numpy as np

from ant_jax.data.arrays import ArraySource


@functools.cache
def digits(split: Literal["train", "test", "all"] = "train") -> ArraySource:
    """The 1797 real 8x8 digits; their 17 grey levels are scaled to 0..255.

    Args:
      split: "train" (1497 images), "test" (300) or "all". All experiments hold out the same test
        images, whatever their seeds: a stratified sample, scikit-learn's
        `train_test_split(range(1797), test_size=300, stratify=labels, random_state=0)`.

    Returns:
      Images of shape (8, 8, 1) in 10 classes.

    Raises:
      ValueError: If there is no such split.
    """
    # (1797, 8, 8) levels 0..16, (1797,) labels, and (1797,) whether held out.
    with np.load(Path(__file__).with_name("digits.npz")) as stored:
        levels, labels, held_out = (stored[name] for name in ("images", "labels", "held_out"))
    chosen = {"train": ~held_out, "test": held_out, "all": np.ones_like(held_out)}
    if split not in chosen:
        raise ValueError(f"digits has no split {split!r}; it has {', '.join(chosen)}")
    images = np.round(levels[chosen[split]] * (255 / 16)).astype(np.uint8)[..., None]
    names = tuple("0123456789")
    source = ArraySource(images, labels[chosen[split]], f"digits[{split}]", len(names), names)
    # The cache returns the same arrays to every caller.
    source.images.flags.writeable = source.labels.flags.writeable = False
    return source
