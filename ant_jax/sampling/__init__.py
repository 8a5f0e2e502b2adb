"""Samples of a trained model: drawn in batches, kept on disk, laid out as a picture."""

from ant_jax.sampling.draw import batch_size, sample_batches
from ant_jax.sampling.grid import GRID, grid_is_due, image_grid, save_png

__all__ = ["GRID", "batch_size", "grid_is_due", "image_grid", "sample_batches", "save_png"]
