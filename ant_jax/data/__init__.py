"""Images: sources, crops and the deterministic input pipeline."""

from ant_jax.data.catalogue import load
from ant_jax.data.folder import FolderSource, folder
from ant_jax.data.pipeline import batches, check_crop
from ant_jax.data.sources import ExampleError, Source, UnreadableImageError, digits

__all__ = [
    "ExampleError",
    "FolderSource",
    "Source",
    "UnreadableImageError",
    "batches",
    "check_crop",
    "digits",
    "folder",
    "load",
]
