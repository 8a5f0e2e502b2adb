"""Images: sources, crops and the deterministic input pipeline."""

from ant_jax.data.pipeline import batches, check_crop
from ant_jax.data.sources import Source, digits, load

__all__ = ["Source", "batches", "check_crop", "digits", "load"]
