"""Samples are drawn once, whatever stops a run in between."""

from types import SimpleNamespace

import numpy as np
import pytest

from ant_jax import drawn, evaluate
from configs import digits

NUM, BATCH = 10, 4


def images_of(first, count):
    return np.arange(first, first + count, dtype=np.uint8)[:, None, None, None] * np.ones(
        (1, 2, 2, 1), np.uint8
    )


def drawing(log, labelled=True):
    def draw(start):
        log.append(start)
        for first in range(start, NUM, BATCH):
            count = min(BATCH, NUM - first)
            yield images_of(first, count), np.arange(first, first + count) if labelled else None

    return draw


@pytest.mark.parametrize("labelled", [True, False])
def test_what_was_drawn_before_a_kill_is_not_drawn_again(tmp_path, labelled):
    starts = []
    draw = drawing(starts, labelled)
    batches = drawn.resume(tmp_path / "place", NUM, draw)
    next(batches), next(batches)
    batches.close()
    place = tmp_path / "place"
    check(drawn.resume(place, NUM, draw), labelled)
    # A piece that was cut short is drawn again, and what comes after it.
    piece = place / "00000004.npz"
    piece.write_bytes(piece.read_bytes()[:-30])
    check(drawn.resume(place, NUM, draw), labelled)
    check(drawn.resume(place, NUM, draw), labelled)
    assert starts == [0, 8, 4]


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
    state = SimpleNamespace(ema_params={})
    pieces = SimpleNamespace(process=SimpleNamespace(num_timesteps=5), model=None)
    monkeypatch.setattr(evaluate, "restore_run", lambda *_: (3, pieces, state))
    monkeypatch.setattr(evaluate.experiment, "denoiser", lambda *_: None)
    monkeypatch.setattr(evaluate, "validation_losses", lambda *_, timesteps_each: np.ones(1))
    place = drawn.folder(tmp_path, config, 3, state.ema_params)
    list(drawn.resume(place, NUM, drawing([])))
    assert evaluate.evaluate(config, tmp_path) == {"step": 3, "validation_loss": 1.0}
    assert len(list(place.iterdir())) == 3
