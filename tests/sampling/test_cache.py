"""Samples are drawn once, whatever stops a run in between."""

import logging
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from ant_jax import evaluate, measuring, results, sampling
from ant_jax import workdir as workdir_lib
from ant_jax.runtime import processes
from ant_jax.runtime.lock import InUseError
from ant_jax.sampling import cache
from configs import digits

NUM, BATCH = 10, 4


def images_of(first, count):
    return np.arange(first, first + count, dtype=np.uint8)[:, None, None, None] * np.ones(
        (1, 2, 2, 1), np.uint8
    )


def drawing(log, labelled=True, stop_after=None):
    def draw(start, stop):
        if len(log) == stop_after:
            raise KeyboardInterrupt
        log.append((start, stop))
        count = stop - start
        yield images_of(start, count), np.arange(start, stop) if labelled else None

    return draw


@pytest.mark.parametrize("labelled", [True, False])
def test_what_was_drawn_before_a_kill_is_not_drawn_again(tmp_path, labelled):
    parts = []
    place = tmp_path / "place"
    with pytest.raises(KeyboardInterrupt):
        cache.draw_missing(place, NUM, BATCH, drawing(parts, labelled, stop_after=2))
    draw = drawing(parts, labelled)
    cache.draw_missing(place, NUM, BATCH, draw)
    check(cache.read(place, NUM), labelled)
    # A piece that was cut short is drawn again, whatever the size of the batches now.
    piece = place / "00000004.npz"
    piece.write_bytes(piece.read_bytes()[:-30])
    cache.draw_missing(place, NUM, 3, draw)
    cache.draw_missing(place, NUM, BATCH, draw)
    check(cache.read(place, NUM), labelled)
    assert parts == [(0, 4), (4, 8), (8, 10), (4, 7), (7, 8)]


def test_several_processes_share_what_is_missing(tmp_path, monkeypatch):
    place = tmp_path / "place"
    there = place / "00000004.npz"
    sampling.write_samples(there, [(images_of(4, 2), np.arange(4, 6))], 2)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    # Process 0 says what is missing before either has drawn anything.
    missing = cache._missing(place, NUM, 3)
    monkeypatch.setattr(processes, "broadcast_from_first", lambda function: missing)
    monkeypatch.setattr(processes, "barrier", lambda: None)
    shares = ([], [])
    for index, parts in enumerate(shares):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        cache.draw_missing(place, NUM, 3, drawing(parts))
    assert shares == ([(0, 3), (6, 9)], [(3, 4), (9, 10)])
    check(cache.read(place, NUM), True)


MADE_FROM = {"step": 3, "settings": {"sampler.guidance": 1.0}}
OTHER = MADE_FROM | {"settings": {"sampler.guidance": 1.5}}


def test_one_job_draws_the_same_samples_and_others_draw_others(tmp_path):
    with cache.folder(tmp_path, MADE_FROM) as place:
        refused = r"^process \d+ on .* is drawing the same samples, of step 3 in .*: wait for it"
        with pytest.raises(InUseError, match=refused), cache.folder(tmp_path, MADE_FROM):
            pass
        with cache.folder(tmp_path, OTHER) as other:
            assert other != place
            cache.draw_missing(other, NUM, BATCH, drawing([]))
        cache.draw_missing(place, NUM, BATCH, drawing([]))
        check(cache.read(place, NUM), True)
        check(cache.read(other, NUM), True)


def test_the_lock_of_samples_that_are_used_is_removed(tmp_path):
    with cache.folder(tmp_path, MADE_FROM) as place:
        cache.draw_missing(place, NUM, BATCH, drawing([]))
        shutil.rmtree(place)
    with pytest.raises(KeyboardInterrupt), cache.folder(tmp_path, MADE_FROM):
        raise KeyboardInterrupt
    assert list((tmp_path / "drawn").iterdir()) == []
    # One that stopped while drawing leaves both, and keeps nobody out.
    with pytest.raises(KeyboardInterrupt), cache.folder(tmp_path, MADE_FROM):
        cache.draw_missing(place, NUM, BATCH, drawing([], stop_after=1))
    with cache.folder(tmp_path, MADE_FROM):
        cache.draw_missing(place, NUM, BATCH, drawing([]))
        check(cache.read(place, NUM), True)


def test_files_of_others_beside_the_samples_do_not_matter(tmp_path, caplog):
    place = tmp_path / "drawn" / f"00000003-{cache.key(MADE_FROM)}"
    place.mkdir(parents=True)
    for name in (".DS_Store", "._00000000.npz", ".nfs0001", "Thumbs.db", "²²²²²²²².npz", "1.npz"):
        (place.parent / name).write_bytes(b"")
        (place / name).write_bytes(b"")
    (place / "00000004.npz").mkdir()
    with caplog.at_level(logging.INFO, "absl"), cache.folder(tmp_path, MADE_FROM):
        assert cache._missing(place, NUM, BATCH) == [(0, 4), (4, 8), (8, 10)]
    assert "other samples" not in caplog.text
    with caplog.at_level(logging.INFO, "absl"), cache.folder(tmp_path, OTHER):
        pass
    assert f"{place}: other samples, of jobs that are running" in caplog.text


def check(batches, labelled):
    images, labels = zip(*batches, strict=True)
    np.testing.assert_array_equal(np.concatenate(images), images_of(0, NUM))
    if labelled:
        np.testing.assert_array_equal(np.concatenate(labels), np.arange(NUM))
    else:
        assert set(labels) == {None}


def test_an_evaluation_without_samples_leaves_those_that_are_being_drawn(tmp_path, monkeypatch):
    config = digits.get_config("vanilla")
    config.evaluation.features = ""
    clusters = SimpleNamespace(order=np.arange(5))
    setup = SimpleNamespace(process=SimpleNamespace(span=5), model=None, clusters=clusters)
    monkeypatch.setattr(evaluate.results, "restore_run", lambda *_: (3, setup, {}))
    monkeypatch.setattr(evaluate.experiment, "denoiser", lambda *_: None)
    monkeypatch.setattr(measuring, "validation_losses", lambda *_, timesteps_each: np.ones(1))
    workdir_lib.save_config(config, tmp_path)
    with cache.folder(tmp_path, results.origin(config, 3, {})) as place:
        cache.draw_missing(place, NUM, BATCH, drawing([]))
        # Nor do they keep it from being done.
        assert evaluate.evaluate(config, tmp_path) == {"step": 3, "validation_loss": 1.0}
        assert len(list(place.iterdir())) == 3
