import numpy as np
import pytest

from ant_jax.evaluation import inception_score_of


def _logits(n=50, classes=7, seed=0):
    return 2 * np.random.default_rng(seed).standard_normal((n, classes))


def _by_entropies(logits):
    p = np.exp(logits)
    p /= p.sum(axis=1)[:, None]
    entropy = lambda q: -(q * np.log(q)).sum(axis=-1)
    return np.exp(entropy(p.mean(axis=0)) - entropy(p).mean())


def test_entropy_of_the_mean_less_the_mean_entropy():
    assert inception_score_of(_logits()) == pytest.approx(_by_entropies(_logits()), rel=1e-12)


def test_splits_are_in_order_and_the_rest_counts_as_much():
    logits = _logits()
    expected = np.mean([_by_entropies(logits[i:j]) for i, j in ((0, 20), (20, 40), (40, 50))])
    assert inception_score_of(logits, split_size=20) == pytest.approx(expected, rel=1e-12)
    # As is usual for 50 000 samples.
    logits = np.repeat(_logits(3), [5000, 5000, 1], axis=0)
    assert inception_score_of(logits) == pytest.approx(1, rel=1e-9)
    assert inception_score_of(logits[::-1]) > 1 + 1e-6


def test_bounds():
    # One class each, so surely that the other probabilities are no float64.
    assert inception_score_of(2000 * np.eye(5)) == pytest.approx(5, rel=1e-12)
    assert inception_score_of(np.zeros((4, 5))) == pytest.approx(1, rel=1e-12)


def test_a_constant_in_all_logits_of_a_sample_says_nothing():
    logits = _logits()
    shifted = logits + 1e4 * np.arange(50)[:, None]
    assert inception_score_of(shifted) == pytest.approx(inception_score_of(logits), rel=1e-8)


def test_float32_is_summed_in_float64():
    logits = _logits(2000, 40).astype(np.float32)
    expected = _by_entropies(logits.astype(np.float64))
    assert inception_score_of(logits) == pytest.approx(expected, rel=1e-12)


def test_errors():
    with pytest.raises(ValueError, match=r"\(3,\)"):
        inception_score_of(np.zeros(3))
    with pytest.raises(ValueError, match="non-empty"):
        inception_score_of(np.zeros((0, 3)))
    with pytest.raises(ValueError, match="not finite"):
        inception_score_of(np.array([[0.0, np.nan]]))
    with pytest.raises(ValueError, match="split_size"):
        inception_score_of(_logits(), split_size=0)
