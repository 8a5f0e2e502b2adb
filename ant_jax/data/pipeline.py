"""Batches as a function of (seed, step, global example index).

Element n = step * batch_size + j of one endless stream is example j of the global batch of a step.
Which image it is, and how it is cropped and flipped, depends on the seed and n alone. Hence
a resumed run, and a run on another number of hosts or workers, sees the same data.
"""

import functools
import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator

import numpy as np
from absl import flags, logging

from ant_jax.data import transforms
from ant_jax.data.sources import Example, ExampleError, Source, UnreadableImageError

CROPS = ("none", "center", "random")
# So many unreadable images in a row are no accident.
_REPLACEMENTS = 100

# Keep the stream that orders the images apart from the one that crops and flips them.
_ORDER, _AUGMENT = 0, 1


def batches(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    image_size: int | None = None,
    crop: str = "none",
    flip: bool = False,
    replace_unreadable: bool = False,
    num_workers: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """Iterates for ever over this host's part of the global batches.

    Every epoch visits each image once, in an order of its own; a batch may straddle two epochs.
    Starting at a later step costs nothing. Host h of H gets the contiguous examples
    h * B/H <= j < (h + 1) * B/H of each global batch of B.

    Args:
      source: Where the images come from.
      batch_size: Global batch size B.
      seed: Seed of the order and of the augmentation.
      start_step: Step of the first batch.
      image_size: Side in pixels that the crop produces; None without a crop.
      crop: "none", "center" or "random" (see `transforms`).
      flip: Whether to mirror each image with probability 1/2.
      replace_unreadable: Whether the next image that can be read takes the place of one that can't;
        otherwise that is an error.
      num_workers: Processes that prepare batches ahead of time; 0 prepares them when asked. They
        are spawned, so a script needs its `if __name__ == "__main__"`; they end when the returned
        iterator is closed or collected.
      process_index: Which host this is.
      process_count: Number of hosts H.

    Returns:
      An iterator over {"image": uint8 (B/H, height, width, channels), "label": int32 (B/H,)}, where
      the image of a `LatentSource` is a latent, float32 and drawn anew each time; with
      replace_unreadable also "replaced": bool (B/H,). It raises ExampleError, naming the source
      and the index, where an image cannot be read, and where a worker dies.

    Raises:
      ValueError: If the source is empty, a number is out of range, B is not divisible by H, or
        crop, image_size and the size of the source's images don't fit together.
    """
    # Imported here, so that a program can be compiled meanwhile.
    import grain

    _check_numbers(batch_size, seed, start_step, num_workers, process_index, process_count)
    check_crop(source, crop, image_size)
    size = len(source)
    if size == 0:
        raise ValueError(f"{source!r} is empty")
    per_host = batch_size // process_count

    def load(step: int) -> dict[str, np.ndarray]:
        first = step * batch_size + process_index * per_host
        examples, replaced = [], []
        for position in range(first, first + per_host):
            epoch, place = divmod(position, size)
            index = int(epoch_order(size, seed, epoch)[place])
            try:
                example, other = _read(source, index, _REPLACEMENTS if replace_unreadable else 0)
                if crop != "none" or flip or "mean" in example:
                    example = _augment(example, crop, image_size, flip, (seed, _AUGMENT, position))
            except Exception as error:
                # The message repeats the cause, which is lost on the way out of a worker.
                raise ExampleError(f"example {index} of {source!r}: {error!r}") from error
            examples.append(example)
            replaced.append(other)
        batch = {
            "image": np.stack([example["image"] for example in examples]),
            "label": np.array([example["label"] for example in examples], np.int32),
        }
        return batch | ({"replaced": np.array(replaced)} if replace_unreadable else {})

    # One element of the dataset is a whole batch: grain's bookkeeping is paid once a batch, where
    # it costs 80 us an element otherwise, more than reading a small image.
    steps = grain.MapDataset.range(start_step, sys.maxsize).map(load)
    # Reading threads fight the training loop for the interpreter lock; processes don't.
    dataset = steps.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    if num_workers:
        if not flags.FLAGS.is_parsed():
            # Grain's workers read flags; outside absl's app.run (a notebook) nobody parsed them.
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(num_workers=num_workers)
        dataset = dataset.mp_prefetch(options, _end_with_trainer)
    return _Batches(iter(dataset))


def _end_with_trainer(*_) -> None:
    """Lets a worker end with the trainer that started it, which may be killed without a word."""

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


class _Batches:
    """Passes batches on, and says what it means when a worker has ended."""

    def __init__(self, batches: Iterator[dict[str, np.ndarray]]):
        self._batches = batches

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        try:
            return next(self._batches)
        except ExampleError:
            raise
        except RuntimeError as error:
            raise ExampleError(
                f"a process that prepares batches has failed (killed? out of memory?): {error}"
            ) from error

    def close(self) -> None:
        """Ends the workers."""
        self._batches.close()


def _read(source: Source, index: int, replacements: int) -> tuple[Example, bool]:
    """The image, or the first of the next ones that can be read; and whether it is another."""
    for shift in range(replacements):
        try:
            return source[(index + shift) % len(source)], shift > 0
        except UnreadableImageError as error:
            logging.warning("replaced by the next image: %s", error)
    return source[(index + replacements) % len(source)], replacements > 0


@functools.lru_cache(maxsize=2)
def epoch_order(size: int, seed: int, epoch: int) -> np.ndarray:
    """(size,) indices of the images in the order in which an epoch visits them."""
    return np.random.default_rng((seed, _ORDER, epoch)).permutation(size)


def _augment(
    example: Example, crop: str, image_size: int | None, flip: bool, entropy: tuple[int, ...]
) -> Example:
    rng = np.random.default_rng(entropy)
    if "mean" in example:
        return transforms.draw_latent(example, flip, rng)
    image = example["image"]
    if crop == "center":
        image = transforms.center_crop(image, image_size)
    elif crop == "random":
        image = transforms.random_crop(image, image_size, rng)
    if flip:
        image = transforms.flip(image, rng)
    return {**example, "image": image}


def _check_numbers(
    batch_size: int,
    seed: int,
    start_step: int,
    num_workers: int,
    process_index: int,
    process_count: int,
) -> None:
    if batch_size < 1 or process_count < 1 or batch_size % process_count:
        raise ValueError(
            f"batch_size {batch_size} must be a positive multiple of process_count {process_count}"
        )
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index} is not in [0, {process_count})")
    for name, value in {"seed": seed, "start_step": start_step, "num_workers": num_workers}.items():
        if value < 0:
            raise ValueError(f"{name} must not be negative, got {value}")


def check_crop(source: Source, crop: str, image_size: int | None) -> None:
    """Checks that the pipeline can make images of one size out of a source's.

    Raises:
      ValueError: If crop is unknown, or crop, image_size and the source's images don't fit.
    """
    if crop not in CROPS:
        raise ValueError(f"unknown crop {crop!r}; use one of {', '.join(CROPS)}")
    if crop != "none":
        if image_size is None or image_size < 1:
            raise ValueError(f"crop {crop!r} needs a positive image_size, got {image_size}")
        return
    height, width, _ = source.image_shape
    if height is None or width is None:
        raise ValueError(f"the images of {source!r} vary in size: choose a crop and an image_size")
    if image_size is not None and (height, width) != (image_size, image_size):
        raise ValueError(
            f"the images of {source!r} are {height}x{width}: "
            f"choose a crop for image_size {image_size}"
        )
