"""Batches as a function of (seed, step, global example index).

Element n = step * batch_size + j of one endless stream is example j of the global batch of a step.
Which image it is, and how it is cropped and flipped, depends on the seed and n alone. Hence
a resumed run, and a run on another number of hosts or workers, sees the same data.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Annotated, Literal, get_args

import numpy as np
from absl import logging

from ant_jax.data import transforms
from ant_jax.data.readers import Batch, ProcessReader, Reader, ThreadReader, pickled
from ant_jax.data.source import Example, ExampleError, Source, UnreadableImageError
from ant_jax.settings import Affects, Integer, PerProcess

Crop = Literal["none", "center", "random"]
# So many unreadable images in a row are no accident.
_REPLACEMENTS = 100

# Keep the stream that orders the images apart from the one that crops and flips them.
_ORDER, _AUGMENT = 0, 1

# Batches that each process makes ahead of time: one is ready while the next is being made.
_AHEAD = 2
_LOOK_SECONDS = 0.2  # between looks at whether to go on waiting
_WARN_SECONDS = 60  # of waiting until the first warning; each further one comes after twice as many
_STOPPED_SECONDS = 600  # that a process may be stopped while it is waited for
_UNHEARD_SECONDS = 30  # that one of several hosts waits on when it is asked to stop


def batches(
    source: Source,
    *,
    batch_size: Annotated[int, Integer(1)],
    seed: int,
    start_step: int = 0,
    image_size: int | None = None,
    crop: Crop = "none",
    flip: bool = False,
    replace_unreadable: bool = False,
    num_workers: Annotated[int, Integer(0, 1024), Affects.NOTHING, PerProcess()] = 0,
    process_index: int = 0,
    process_count: int = 1,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[Batch]:
    """Iterates over this host's part of the global batches.

    Every epoch visits each image once, in an order of its own; a batch may straddle two epochs.
    Starting at a later step costs nothing. Host h of H gets the contiguous examples
    h * B/H <= j < (h + 1) * B/H of each global batch of B.

    Args:
      source: Where the images come from.
      batch_size: Global batch size B, over all devices of all hosts.
      seed: Seed of the order and of the augmentation.
      start_step: Step of the first batch.
      image_size: Side in pixels that the crop produces; None without a crop.
      crop: "none" leaves images as they are, which must have one size then; "center" and "random"
        are ADM's (see `transforms`).
      flip: Whether to mirror each image with probability 1/2.
      replace_unreadable: Whether the next image that can be read takes the place of one that can't;
        otherwise that is an error.
      num_workers: Processes that prepare batches ahead of time; 0 prepares them when asked. They
        are spawned, so a script needs its `if __name__ == "__main__"`; they end when the returned
        iterator is closed or collected, and with this process, which alone gets signals.
      process_index: Which host this is.
      process_count: Number of hosts H.
      stopped: Asked while a batch is waited for: whether not to wait any longer.

    Returns:
      An iterator over {"image": uint8 (B/H, height, width, channels), "label": int32 (B/H,)}, where
      the image of a `LatentSource` is a latent, float32 and drawn anew each time; with
      replace_unreadable also "replaced": bool (B/H,). It ends only where `stopped` says so. One
      of several hosts can't end alone: there that is an ExampleError after half a minute.
      An image that cannot be read is an ExampleError that names the source and the index; after it
      comes the batch of the next step. A worker that dies is an ExampleError too, and so is one
      that a signal has stopped, after 10 minutes of waiting. Any long wait is a warning.

    Raises:
      ValueError: If the source is empty, a number is out of range, B is not divisible by H, or
        crop, image_size and the size of the source's images don't fit together.
    """
    _check_numbers(batch_size, seed, start_step, num_workers, process_index, process_count)
    check_crop(source, crop, image_size)
    if len(source) == 0:
        raise ValueError(f"{source!r} is empty")
    load = functools.partial(
        _load,
        source=source,
        batch_size=batch_size,
        part=(process_index, process_count),
        seed=seed,
        image_size=image_size,
        crop=crop,
        flip=flip,
        replace_unreadable=replace_unreadable,
    )
    return _Batches(load, repr(source), start_step, num_workers, stopped, process_count == 1)


class _Batches:
    """Asks readers for batches, each for every n-th one, and waits for them."""

    def __init__(
        self,
        load: Callable[[int], Batch],
        name: str,
        start_step: int,
        num_workers: int,
        stopped: Callable[[], bool],
        alone: bool,
    ):
        self._load, self._name, self._num_workers = load, name, num_workers
        self._stopped, self._alone = stopped, alone
        self._start = self._step = self._asked = start_step
        self._readers: list[Reader] | None = None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._readers is None:
            self._readers = _start(self._load, self._num_workers)
        # Where batches are made when asked, none is made ahead.
        self._ask(self._step + 1)
        reader = self._readers[(self._step - self._start) % len(self._readers)]
        # Counted, and not read from a clock, which goes on while all of a job is stopped.
        waited, warn_at = 0.0, _WARN_SECONDS
        while (made := reader.receive(_LOOK_SECONDS)) is None:
            waited += _LOOK_SECONDS
            if self._stopped():
                if self._alone:
                    raise StopIteration
                if waited > _UNHEARD_SECONDS:
                    raise ExampleError(f"asked to stop while waiting: {self._waits(waited)}")
            if waited > _STOPPED_SECONDS and reader.is_stopped():
                raise ExampleError(f"a process is stopped: {self._waits(waited)}")
            if waited > warn_at:
                warn_at *= 2
                logging.warning("%s", self._waits(waited))
        self._step += 1
        self._ask(self._step + _AHEAD * self._num_workers)
        # Or what comes after it would pass for the batch of this step.
        if isinstance(made, BaseException):
            raise made
        return made

    def _ask(self, end):
        """Asks for the batches before a step that have not been asked for."""
        for step in range(self._asked, end):
            self._readers[(step - self._start) % len(self._readers)].ask(step)
        self._asked = max(self._asked, end)

    def _waits(self, waited):
        states = "; ".join(reader.state() for reader in self._readers)
        return f"no batch of step {self._step} of {self._name} for {waited:.0f} s; {states}"

    def close(self) -> None:
        """Ends the workers."""
        for reader in self._readers or ():
            reader.close()


def _start(load, num_workers) -> list[Reader]:
    if num_workers == 0:
        return [ThreadReader(load)]
    # Reading threads fight the training loop for the interpreter lock; processes don't.
    with pickled(load) as file:
        return [ProcessReader(file) for _ in range(num_workers)]


def _load(
    step: int,
    *,
    source: Source,
    batch_size: int,
    part: tuple[int, int],
    seed: int,
    image_size: int | None,
    crop: str,
    flip: bool,
    replace_unreadable: bool,
) -> Batch:
    """Makes the part of a step's batch that is this host's; `part` is which host of how many."""
    per_host = batch_size // part[1]
    first = step * batch_size + part[0] * per_host
    examples, replaced = [], []
    for position in range(first, first + per_host):
        epoch, place = divmod(position, len(source))
        index = int(epoch_order(len(source), seed, epoch)[place])
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
    if crop not in get_args(Crop):
        raise ValueError(f"unknown crop {crop!r}; use one of {', '.join(get_args(Crop))}")
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
