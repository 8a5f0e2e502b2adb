import contextlib
import dataclasses
import itertools
import logging
import multiprocessing
import os
import re
import signal
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from ant_jax import data
from ant_jax.data import pipeline


@dataclasses.dataclass(frozen=True)
class Numbered:
    """Image i is a 2 x 2 picture whose left half is i and whose right half is 255 - i."""

    size: int
    name: str = "Numbered"
    image_shape: tuple = (2, 2, 1)
    num_classes: int = 3
    broken: int | None = None
    deadly: bool = False
    slow: int | None = None

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        if self.deadly:
            os._exit(3)
        if i == self.broken:
            raise OSError("bad bytes")
        if i == self.slow:
            time.sleep(3600)
        row = np.array([i, 255 - i], np.uint8)
        return {"image": np.stack([row, row])[..., None], "label": np.int32(i % 3)}


def _take(count, source, **options):
    return list(itertools.islice(data.batches(source, **options), count))


def _values(batches):
    """The numbers of the images, in the order of the stream."""
    return np.concatenate(
        [np.minimum(b["image"][:, 0, 0, 0], b["image"][:, 0, 1, 0]) for b in batches]
    )


def _assert_equal(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys() == {"image", "label"}
        for key in x:
            assert x[key].dtype == y[key].dtype
            np.testing.assert_array_equal(x[key], y[key])


AUGMENTED = dict(batch_size=8, seed=3, image_size=4, crop="random", flip=True)


def test_a_batch_has_images_with_their_labels():
    (batch,) = _take(1, Numbered(12), batch_size=8, seed=0)
    assert batch["image"].shape == (8, 2, 2, 1) and batch["image"].dtype == np.uint8
    assert batch["label"].shape == (8,) and batch["label"].dtype == np.int32
    np.testing.assert_array_equal(_values([batch]) % 3, batch["label"])


def test_every_epoch_visits_every_example_once_in_its_own_order():
    # 6 does not divide 20: some batches straddle two epochs.
    epochs = _values(_take(10, Numbered(20), batch_size=6, seed=0)).reshape(3, 20)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(20), (3, 1)))
    orders = {tuple(epoch) for epoch in epochs}
    # A seed must not replay the epochs of its neighbour one epoch later.
    orders |= {
        tuple(epoch)
        for epoch in _values(_take(10, Numbered(20), batch_size=6, seed=1)).reshape(3, 20)
    }
    assert len(orders) == 6
    assert tuple(range(20)) not in orders


def test_a_batch_larger_than_the_source():
    values = _values(_take(2, Numbered(3), batch_size=12, seed=0)).reshape(8, 3)
    np.testing.assert_array_equal(np.sort(values), np.tile(np.arange(3), (8, 1)))


def test_the_same_seed_gives_the_same_stream():
    _assert_equal(_take(5, Numbered(12), **AUGMENTED), _take(5, Numbered(12), **AUGMENTED))


def test_the_stream_does_not_depend_on_the_batch_size():
    # Element n of the stream is the same whether it is example n of step 0 or example 0 of step n.
    (whole,) = _take(1, Numbered(12), **AUGMENTED | {"batch_size": 32})
    parts = _take(32, Numbered(12), **AUGMENTED | {"batch_size": 1})
    np.testing.assert_array_equal(whole["image"], np.concatenate([p["image"] for p in parts]))


def test_resuming_at_any_step_continues_the_stream():
    full = _take(7, Numbered(12), **AUGMENTED)
    for step in range(7):
        _assert_equal(_take(7 - step, Numbered(12), start_step=step, **AUGMENTED), full[step:])


def test_starting_late_is_immediate():
    # Step 10^12 could not be reached by skipping.
    (batch,) = _take(1, Numbered(12), batch_size=12, seed=0, start_step=10**12)
    assert set(_values([batch])) == set(range(12))


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_together_hold_the_global_batch(hosts):
    full = _take(4, Numbered(12), **AUGMENTED)
    parts = [
        _take(4, Numbered(12), process_index=h, process_count=hosts, **AUGMENTED)
        for h in range(hosts)
    ]
    joined = [
        {key: np.concatenate([part[step][key] for part in parts]) for key in ("image", "label")}
        for step in range(4)
    ]
    _assert_equal(joined, full)
    assert parts[0][0]["label"].shape == (8 // hosts,)


def test_flips_half_of_the_images_and_not_always_the_same():
    batches = _take(40, Numbered(20), batch_size=20, seed=0, flip=True)
    flipped = np.stack([b["image"][:, 0, 0, 0] > 127 for b in batches])
    assert 0.45 < flipped.mean() < 0.55
    # The coin belongs to the element of the stream, not to the image or the place in the batch.
    per_place = flipped.mean(axis=0)
    assert per_place.min() > 0 and per_place.max() < 1
    values = np.stack([_values([b]) for b in batches])
    per_image = np.array([flipped[values == i].mean() for i in range(20)])
    assert per_image.min() > 0 and per_image.max() < 1
    other = _take(40, Numbered(20), batch_size=20, seed=1, flip=True)
    assert np.any(flipped != np.stack([b["image"][:, 0, 0, 0] > 127 for b in other]))


def test_augmentation_leaves_the_order_alone():
    plain = _take(3, Numbered(20), batch_size=8, seed=0)
    flipped = _take(3, Numbered(20), batch_size=8, seed=0, flip=True)
    np.testing.assert_array_equal(_values(plain), _values(flipped))


def test_center_crop_in_the_pipeline():
    plain = _take(2, data.digits("test"), batch_size=4, seed=0)
    cropped = _take(2, data.digits("test"), batch_size=4, seed=0, crop="center", image_size=4)
    for a, b in zip(plain, cropped, strict=True):
        mean = a["image"].reshape(4, 4, 2, 4, 2, 1).mean(axis=(2, 4))
        # Pillow averages along one axis after the other and rounds each time.
        assert np.abs(mean - b["image"]).max() <= 1


def test_an_unreadable_image_is_named():
    with pytest.raises(RuntimeError, match=r"example 7 of Numbered.*bad bytes"):
        _take(3, Numbered(12, broken=7), batch_size=4, seed=0)


def test_a_damaged_image_names_the_way_out(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG")
    source = data.folder(split="", dir=str(tmp_path))
    words = rf"^example 0 of {tmp_path}: {tmp_path}/a.png: .*; config.data.replace_unreadable = T"
    with pytest.raises(data.ExampleError, match=words):
        _take(1, source, batch_size=1, seed=0, crop="center", image_size=8)


class Damaged(Numbered):
    def __getitem__(self, i):
        if i in (3, 7):
            raise data.UnreadableImageError(f"bad bytes of {i}")
        return super().__getitem__(i)


def test_unreadable_images_are_told_once_and_counted_at_the_end(caplog):
    settings = {"batch_size": 4, "seed": 0, "replace_unreadable": True}
    with (
        caplog.at_level(logging.WARNING, logger="absl"),
        contextlib.closing(data.batches(Damaged(12), **settings)) as stream,
    ):
        batches = list(itertools.islice(stream, 9))
    assert sum(batch["replaced"].sum() for batch in batches) == 6
    assert all(batch.keys() == {"image", "label", "replaced"} for batch in batches)
    first, last = caplog.messages
    assert re.fullmatch("unreadable, replaced by the next image: bad bytes of [37]", first)
    assert last == "2 images of Numbered are unreadable: replaced"


@pytest.mark.parametrize(
    ("promise", "words"),
    [
        (
            {"num_classes": 2},
            r"label is 2, but must be in 0 .. 1, as num_classes of the source is 2",
        ),
        ({"num_classes": 0}, r"must be in 0 .. 0, as num_classes of the source is 0"),
        ({"image_shape": (2, 3, 1)}, r"image is uint8 \(2, 2, 1\), but must be uint8 \(2, 3, 1\)"),
        (
            {"image_shape": (None, 2, 3)},
            r"\(2, 2, 1\), but must be uint8 \(None, 2, 3\), the image_s",
        ),
    ],
)
def test_a_source_that_breaks_its_promise_is_named(promise, words):
    source = dataclasses.replace(Numbered(3), **promise)
    crop = {"crop": "center", "image_size": 2} if None in source.image_shape else {}
    with pytest.raises(data.ExampleError, match=f"example . of Numbered: ValueError.*{words}"):
        _take(1, source, batch_size=3, seed=0, **crop)


def test_images_of_another_type_are_refused():
    class Floats(Numbered):
        def __getitem__(self, i):
            example = super().__getitem__(i)
            return example | {"image": np.float32(example["image"])}

    with pytest.raises(data.ExampleError, match=r"image is float32 \(2, 2, 1\), but must be uint8"):
        _take(1, Floats(3), batch_size=3, seed=0)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_batch_that_cannot_be_made_costs_no_other(num_workers):
    expected = _take(6, Numbered(12), batch_size=4, seed=0)
    broken = data.batches(Numbered(12, broken=7), batch_size=4, seed=0, num_workers=num_workers)
    errors = 0
    for step in range(6):
        try:
            batch = next(broken)
        except data.ExampleError:
            errors += 1
            assert 7 in _values(expected[step : step + 1])
        else:
            _assert_equal([batch], expected[step : step + 1])
    broken.close()
    # One of each epoch.
    assert errors == 2


def test_a_dying_worker_raises():
    with pytest.raises(data.ExampleError, match=r"prepares batches has failed.*exit code 3"):
        _take(1, Numbered(12, deadly=True), batch_size=4, seed=0, num_workers=1)


def _shared(pid):
    """Names of the shared memory of a process."""
    names = re.findall(r"/dev/shm/\S+$", Path(f"/proc/{pid}/maps").read_text(), re.M)
    return {name for name in names if not name.startswith(tempfile.gettempdir())}


def _workers():
    return multiprocessing.active_children()


def test_a_worker_killed_at_its_start_raises_at_once():
    # As much as this does not fit into the pipe by which Python starts a process.
    source = data.digits("all")
    assert source.images.nbytes > 2**16

    def kill():
        while not _workers():
            time.sleep(0.001)
        os.kill(_workers()[0].pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    begin = time.perf_counter()
    with pytest.raises(data.ExampleError, match=r"prepares batches has failed.*exit code -9"):
        _take(1, source, batch_size=4, seed=0, num_workers=1)
    assert time.perf_counter() - begin < 10
    killer.join()


def test_a_wait_ends_where_asked_and_names_the_worker_that_is_stopped(monkeypatch, caplog):
    asked = []
    batches = data.batches(
        Numbered(12), batch_size=4, seed=0, num_workers=2, stopped=lambda: bool(asked)
    )
    expected = _take(20, Numbered(12), batch_size=4, seed=0)
    before = _shared(os.getpid())
    taken = [next(batches) for _ in range(4)]
    _assert_equal(taken, expected[:4])
    # Nothing of a batch has a name that could outlive its processes.
    assert _shared(os.getpid()).union(*(_shared(each.pid) for each in _workers())) <= before
    workers = _workers()
    for worker in workers:
        # The group's processes get the trainer's signals, of which they must not die.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(worker.pid, number)
    first = workers[0]
    os.kill(first.pid, signal.SIGSTOP)
    monkeypatch.setattr(pipeline, "_WARN_SECONDS", 0.3)
    taken = 4
    asked.append(True)
    with caplog.at_level(logging.WARNING, logger="absl"):
        for batch in batches:
            _assert_equal([batch], expected[taken : taken + 1])
            taken += 1
        # Each worker is two batches ahead; the first of a set may be either.
        assert taken <= 9 and not caplog.messages
        # Still asked for, it is a batch late and no other.
        asked.clear()
        monkeypatch.setattr(pipeline, "_LOOK_SECONDS", 0.02)
        monkeypatch.setattr(pipeline, "_WARN_SECONDS", 0.05)
        monkeypatch.setattr(pipeline, "_STOPPED_SECONDS", 0.6)
        words = rf"no batch for step {taken} of Numbered.* after 1 s; .* {first.pid} is stopped"
        with pytest.raises(data.ExampleError, match=words + ".*kill -CONT"):
            next(batches)
    # Each after twice the time of the one before.
    assert f"process {first.pid} is stopped" in caplog.messages[0] and len(caplog.messages) < 6
    os.kill(first.pid, signal.SIGCONT)
    _assert_equal(list(itertools.islice(batches, 20 - taken)), expected[taken:])
    batches.close()
    assert not set(workers) & set(_workers())


def test_a_read_that_hangs_in_this_process_is_reported_and_can_be_left(monkeypatch, caplog):
    monkeypatch.setattr(pipeline, "_LOOK_SECONDS", 0.05)
    monkeypatch.setattr(pipeline, "_WARN_SECONDS", 0.1)
    begin = time.perf_counter()
    stopped = lambda: "no batch for step " in caplog.text or time.perf_counter() > begin + 5
    with caplog.at_level(logging.WARNING, logger="absl"):
        assert len(_take(3, Numbered(12, slow=5), batch_size=4, seed=0, stopped=stopped)) < 3
    assert "no batch for step " in caplog.text and "this process reads" in caplog.text
    # One of several hosts can't end alone.
    monkeypatch.setattr(pipeline, "_UNHEARD_SECONDS", 0.2)
    with pytest.raises(data.ExampleError, match="asked to stop while waiting: no batch for step"):
        _take(3, Numbered(12, slow=5), batch_size=4, seed=0, stopped=stopped, process_count=2)
    assert time.perf_counter() - begin < 20


def test_a_stop_does_not_cost_a_batch_that_is_there(monkeypatch):
    # However late a busy machine lets the thread run.
    monkeypatch.setattr(pipeline, "_LOOK_SECONDS", 60)
    assert len(_take(5, Numbered(12), batch_size=4, seed=0, stopped=lambda: True)) == 5


def test_workers_end_with_an_iterator_that_is_forgotten():
    batches = data.batches(Numbered(12), batch_size=4, seed=0, num_workers=1)
    next(batches)
    (worker,) = _workers()
    del batches
    assert worker.exitcode is not None


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (dict(batch_size=0), "batch_size must be an integer >= 1, got 0"),
        (dict(batch_size=6, process_count=4), "multiple of process_count 4"),
        (dict(process_index=2, process_count=2), "process_index must be .* <= 1, got 2"),
        (dict(process_index=-1), "process_index must be an integer >= 0 and <= 0, got -1"),
        (dict(batch_size=True), "batch_size must be an integer >= 1, got True"),
        (dict(seed=-1), "seed"),
        (dict(start_step=-1), "start_step"),
        (dict(num_workers=-1), "num_workers"),
        (dict(crop="centre"), "'centre'.*none, center, random"),
        (dict(crop="center"), "image_size"),
        (dict(crop="random", image_size=0), "image_size"),
        (dict(image_size=3), r"image_size = 3, but the images of Numbered are 2x2: change it"),
    ],
)
def test_bad_arguments(options, match):
    with pytest.raises(ValueError, match=match):
        data.batches(Numbered(12), **dict(batch_size=4, seed=0) | options)


def test_bad_sources():
    with pytest.raises(ValueError, match="empty"):
        data.batches(Numbered(0), batch_size=4, seed=0)
    with pytest.raises(ValueError, match="vary in size"):
        data.batches(Numbered(12, image_shape=(None, None, 1)), batch_size=4, seed=0)


def test_image_size_may_state_the_size_that_the_images_have():
    assert _take(1, Numbered(12), batch_size=4, seed=0, image_size=2)[0]["image"].shape[1:3] == (
        2,
        2,
    )


def test_the_orders_of_large_sources_are_kept_for_two_epochs():
    pipeline.epoch_order.cache_clear()
    _take(20, Numbered(20), batch_size=6, seed=0)
    assert pipeline.epoch_order.cache_info().misses == 6
