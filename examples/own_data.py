"""Data of your own: NumPy arrays of images and labels, here the even digits, inverted.

python examples/own_data.py
"""

import numpy as np

from ant_jax.config import update
from ant_jax.config.file import read
from ant_jax.data import ArraySource, digits
from ant_jax.train import train


def even_digits() -> tuple[np.ndarray, np.ndarray]:
    """uint8 images (n, 8, 8, 1) of 0, 2, 4, 6 and 8 with inverted grey levels; labels 0 .. 4."""
    examples = [example for example in digits("train") if example["label"] % 2 == 0]
    images = np.stack([255 - example["image"] for example in examples])
    return images, np.array([example["label"] // 2 for example in examples])


def main(workdir: str = "runs/own_data", num_steps: int = 200) -> None:
    config = read("configs/digits.py:nash")
    update(config, {"num_steps": num_steps, "evaluation.features": "", "evaluation.split": ""})
    train(config, workdir, source=ArraySource(*even_digits()))


if __name__ == "__main__":
    main()
