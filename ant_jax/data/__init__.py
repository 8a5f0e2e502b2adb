"""Images: sources, crops and the deterministic input pipeline.

A source is a file of this folder, ``NAME.py``, with a function ``NAME(split, **settings)`` that
returns a `Source`. Its typed arguments are the settings (see `ant_jax.settings`). A source of your
own is named ``package.module:attribute``, or you pass the object from Python::

  class Squares(data.Source):
      name, image_shape, num_classes = "squares", (8, 8, 1), 2

      def __len__(self):
          return 100

      def __getitem__(self, index):
          label = np.int32(index % 2)
          return {"image": np.full((8, 8, 1), 255 * label, np.uint8), "label": label}

For images that are NumPy arrays, use ``data.ArraySource(images, labels)``.
"""

from ant_jax.runtime import extras

if _error := extras.missing("training"):
    raise _error

from ant_jax.data.arrays import ArraySource, arrays
from ant_jax.data.digits import digits
from ant_jax.data.folder import FolderSource, folder
from ant_jax.data.idx import idx
from ant_jax.data.pipeline import batches, check_crop
from ant_jax.data.source import ExampleError, Source, UnreadableImageError
from ant_jax.data.tfds import TfdsSource, tfds

__all__ = [
    "ArraySource",
    "ExampleError",
    "FolderSource",
    "Source",
    "TfdsSource",
    "UnreadableImageError",
    "arrays",
    "batches",
    "check_crop",
    "digits",
    "folder",
    "idx",
    "tfds",
]
