"""Batches as a function of (seed, step, global example index).

Example j of the global batch of a step is element n = step * batch_size + j of one infinite stream.
Which image it is, and how it is cropped and flipped, depends only on the seed and n. So a resumed
run, and a run on another number of hosts or workers, sees the same data.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Annotated, Literal, get_args

import numpy as np
from absl import logging

from ant_jax.data import transforms
from ant_jax.data.readers import Batch, ProcessReader, Reader, ThreadReader, pickled
from ant_jax.data.source import Example, ExampleError, Source, UnreadableImageError
from ant_jax.settings import Affects, Integer, PerProcess, check_integer

Crop = Literal["none", "center", "random"]
# More unreadable images in a row mean that the data set itself is broken.
_REPLACEMENTS = 100

# The random numbers that order the images are independent of those that crop and flip them.
_ORDER, _AUGMENT = 0, 1

# In a batch that a reader makes: what is wrong with the images that were replaced.
_UNREADABLE = "unreadable"

# Batches that each worker prepares ahead of time: one is ready while it prepares the next.
_AHEAD = 2
_LOOK_SECONDS = 0.2  # between two checks whether to go on waiting
_WARN_SECONDS = 60  # of waiting before the first warning; the time doubles for each further one
_STOPPED_SECONDS = 600  # of waiting, after which a worker that a signal has stopped is an error
_UNHEARD_SECONDS = 30  # of waiting, after which one of several hosts may fail if asked to stop


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
) -> "Batches":
    """Iterates over this host's part of the global batches.

    Each epoch visits every image once, in a new order. A batch may contain images of two epochs.
    Starting at a later step costs nothing. Of each global batch of B examples, host h of H gets the
    contiguous examples h * B/H <= j < (h + 1) * B/H.

    Args:
      source: Where the images come from.
      batch_size: Global batch size B, over all devices of all hosts.
      seed: Seed of the order and of the augmentation.
      start_step: Step of the first batch.
      image_size: Side of the cropped images in pixels; None without a crop.
      crop: "none" leaves images unchanged, so they must all have one size; "center" and "random"
        are the crops of ADM (see `transforms`).
      flip: Whether to mirror each image with probability 1/2.
      replace_unreadable: Whether to replace an unreadable image by the next readable one. Otherwise
        it is an error. The first one is logged when it comes, and their number at the end.
      num_workers: Number of processes that prepare batches ahead of time; with 0 each batch is
        prepared on request. The processes are spawned, so a script needs
        `if __name__ == "__main__"`. They end when the returned iterator is closed or
        garbage-collected, or when this process ends. They block SIGINT, SIGTERM and SIGHUP.
      process_index: Index of this host.
      process_count: Number of hosts H.
      stopped: Called while waiting for a batch; returns whether to stop waiting.

    Returns:
      An iterator over {"image": uint8 (B/H, height, width, channels), "label": int32 (B/H,)}. From
      a `LatentSource`, "image" is a float32 latent, sampled anew each time. With replace_unreadable
      there is also "replaced": bool (B/H,). The iterator ends only if `stopped` returns True while
      it waits. One of several hosts can't end alone, so there it raises an ExampleError after
      waiting for half a minute.

      The iterator raises an ExampleError for an unreadable image, or for an image or label that is
      not what the source promises. The error names the source and the index, and the iterator then
      goes on with the batch of the next step. It also raises an ExampleError if a
      worker dies, or after waiting 10 minutes for a worker that a signal has stopped. It logs a
      warning for any long wait.

    Raises:
      ValueError: If the source is empty, a number is out of range, B is not divisible by H, or
        crop, image_size and the size of the source's images don't match.
    """
    _check_numbers(batch_size, seed, start_step, num_workers, process_index, process_count)
    check_crop(source, crop, image_size)
    if len(source) == 0:
        raise ValueError(f"{source.name} is empty")
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
    return Batches(load, source.name, start_step, num_workers, stopped, process_count == 1)


class Batches:
    """The iterator of `batches`: requests batches from n readers in turn, and waits for them."""

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
        self._readers: list[Reader] = []
        self._unreadable: set[str] = set()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if not self._readers:
            self._readers = _start(self._load, self._num_workers)
        # Without workers no batch has been requested ahead of time.
        self._ask(self._step + 1)
        reader = self._readers[(self._step - self._start) % len(self._readers)]
        # Counted, because a clock goes on while the whole job is stopped.
        waited, warn_at = 0.0, _WARN_SECONDS
        while (made := reader.receive(_LOOK_SECONDS)) is None:
            waited += _LOOK_SECONDS
            if self._stopped():
                if self._alone:
                    raise StopIteration
                if waited > _UNHEARD_SECONDS:
                    raise ExampleError(f"asked to stop while waiting: {self._waits(waited)}")
            if waited > _STOPPED_SECONDS and reader.is_stopped():
                raise ExampleError(f"a data worker is stopped: {self._waits(waited)}")
            if waited > warn_at:
                warn_at *= 2
                logging.warning("%s", self._waits(waited))
        self._step += 1
        self._ask(self._step + _AHEAD * self._num_workers)
        # After counting the step, so that the next call returns the batch of the next step.
        if isinstance(made, BaseException):
            raise made
        for problem in map(str, made.pop(_UNREADABLE, ())):
            if not self._unreadable:
                logging.warning("unreadable, replaced by the next image: %s", problem)
            self._unreadable.add(problem)
        return made

    def _ask(self, end):
        """Requests the batches of all steps before `end` that have not been requested."""
        for step in range(self._asked, end):
            self._readers[(step - self._start) % len(self._readers)].ask(step)
        self._asked = max(self._asked, end)

    def _waits(self, waited):
        states = "; ".join(reader.state() for reader in self._readers)
        return f"no batch for step {self._step} of {self._name} after {waited:.0f} s; {states}"

    def close(self) -> None:
        """Ends the workers; warns of unreadable images if there were several."""
        if len(self._unreadable) > 1:
            several = len(self._unreadable)
            logging.warning("%d images of %s are unreadable: replaced", several, self._name)
            self._unreadable.clear()
        for reader in self._readers:
            reader.close()


def _start(load, num_workers) -> list[Reader]:
    if num_workers == 0:
        return [ThreadReader(load)]
    # Threads would compete with the training loop for the interpreter lock.
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
    """Makes this host's part of the batch of a step; `part` is (process_index, process_count)."""
    per_host = batch_size // part[1]
    first = step * batch_size + part[0] * per_host
    examples, replaced, unreadable = [], [], []
    for position in range(first, first + per_host):
        epoch, place = divmod(position, len(source))
        index = int(epoch_order(len(source), seed, epoch)[place])
        try:
            example, problems = _read(source, index, _REPLACEMENTS if replace_unreadable else 0)
            _check_example(example, source)
            if crop != "none" or flip or "mean" in example:
                example = _augment(example, crop, image_size, flip, (seed, _AUGMENT, position))
        except Exception as error:
            # The message includes the cause, because a worker can't send the chained error.
            way = (
                ""
                if replace_unreadable or not isinstance(error, UnreadableImageError)
                else ("; config.data.replace_unreadable = True takes the next image instead")
            )
            # Of an unreadable image, the message says enough.
            said = str(error) if isinstance(error, UnreadableImageError) else repr(error)
            raise ExampleError(f"example {index} of {source.name}: {said}{way}") from error
        examples.append(example)
        replaced.append(bool(problems))
        unreadable += problems
    batch = {
        "image": np.stack([example["image"] for example in examples]),
        "label": np.array([example["label"] for example in examples], np.int32),
    }
    if replace_unreadable:
        batch["replaced"] = np.array(replaced)
    # The process that asked says so; those that read would all repeat it.
    return batch | ({_UNREADABLE: np.array(unreadable)} if unreadable else {})


def _read(source: Source, index: int, replacements: int) -> tuple[Example, list[str]]:
    """The image, or the next readable one; and what is wrong with those before it."""
    problems = []
    for shift in range(replacements):
        try:
            return source[(index + shift) % len(source)], problems
        except UnreadableImageError as error:
            problems.append(str(error))
    return source[(index + replacements) % len(source)], problems


def _check_example(example: Example, source: Source) -> None:
    """Raises a ValueError if an example is not what its source promises; latents are checked."""
    if "mean" in example:
        return
    image, label = example["image"], example["label"]
    if image.dtype != np.uint8 or not _fits(image.shape, source.image_shape):
        raise ValueError(
            f"the image is {image.dtype} {image.shape}, but must be uint8 {source.image_shape}, "
            "the image_shape of the source"
        )
    last = max(source.num_classes, 1) - 1
    if np.ndim(label) or not 0 <= label <= last:
        raise ValueError(
            f"the label is {label}, but must be in 0 .. {last}, as num_classes of the source is "
            f"{source.num_classes}"
        )


def _fits(shape, promised):
    return len(shape) == len(promised) and all(
        there in (None, size) for size, there in zip(shape, promised, strict=True)
    )


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
    if crop != "none":
        assert image_size is not None  # see `check_crop`
        if crop == "center":
            image = transforms.center_crop(image, image_size)
        else:
            image = transforms.random_crop(image, image_size, rng)
    if flip:
        image = transforms.flip(image, rng)
    return {**example, "image": image}


def _check_numbers(batch_size, seed, start_step, num_workers, process_index, process_count):
    check_integer("process_count", process_count, 1)
    check_integer("process_index", process_index, 0, process_count - 1)
    check_integer("batch_size", batch_size, 1)
    if batch_size % process_count:
        raise ValueError(
            f"batch_size {batch_size} must be a multiple of process_count {process_count}"
        )
    check_integer("seed", seed, 0)
    check_integer("start_step", start_step, 0)
    check_integer("num_workers", num_workers, 0)


def check_crop(source: Source, crop: str, image_size: int | None) -> None:
    """Checks that the crop gives all images of a source the same size.

    Raises:
      ValueError: If crop is unknown, or if crop, image_size and the source's images don't match.
    """
    if crop not in get_args(Crop):
        raise ValueError(f"unknown crop {crop!r}; use one of {', '.join(get_args(Crop))}")
    if crop != "none":
        check_integer(f"image_size for crop {crop!r}", image_size, 1)
        return
    height, width, _ = source.image_shape
    if height is None or width is None:
        raise ValueError(
            f"the images of {source.name} may vary in size: set config.data.crop = 'center' or "
            "'random', which scales and crops them to config.data.image_size"
        )
    if image_size is not None and (height, width) != (image_size, image_size):
        raise ValueError(
            f"config.data.image_size = {image_size}, but the images of {source.name} are "
            f"{height}x{width}: change it, or set config.data.crop = 'center' or 'random', which "
            "scales and crops them"
        )
