"""Samples of a trained model: drawing, a cache on disk, files and pictures."""

from ant_jax.sampling.draw import rounded_batch_size, sample_batches
from ant_jax.sampling.files import num_samples, read_samples, write_samples
from ant_jax.sampling.grid import GRID, image_grid, save_png

__all__ = [
    "GRID",
    "image_grid",
    "num_samples",
    "read_samples",
    "rounded_batch_size",
    "sample_batches",
    "save_png",
    "write_samples",
]
