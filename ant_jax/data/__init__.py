"""Images: sources, crops and the deterministic input pipeline."""

from ant_jax.data.pipeline import batches
from ant_jax.data.sources import Source, digits, load

__all__ = ["Source", "batches", "digits", "load"]
