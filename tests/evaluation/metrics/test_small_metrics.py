"""Metrics whose whole is little more than their definition."""

import numpy as np
import pytest

from ant_jax.evaluation import Reference, Summary, frechet_distance, gaussian, moments
from ant_jax.evaluation.metrics.group_frechet import group_frechet
from ant_jax.evaluation.metrics.label_accuracy import label_accuracy
from ant_jax.evaluation.metrics.nearest import nearest


def summary(said=None, **kept):
    num = len(next(iter(kept.values())))
    gaussians = {name: gaussian(moments(x)) for name, x in kept.items() if x.ndim == 2}
    return Summary(num, gaussians, kept, np.full(num, -1) if said is None else np.array(said))


def test_groups_are_as_large_as_the_held_out_set_and_a_rest_is_left_out():
    random = np.random.default_rng(0)
    real, held_out, samples = (random.standard_normal((n, 3)) for n in (50, 8, 27))
    against = Reference("", summary(features=real), summary(features=held_out))
    found = group_frechet().measure(summary(features=samples), against)
    distance = lambda x: frechet_distance(*gaussian(moments(x)), *gaussian(moments(real)))
    expected = np.mean([distance(samples[i : i + 8]) for i in (0, 8, 16)])
    assert found == {"group_frechet_distance": pytest.approx(expected)}
    assert group_frechet().measure(summary(features=samples[:7]), against) == {}
    # No more held-out images than features.
    few = against._replace(held_out=summary(features=held_out[:3]))
    for each in (few, against._replace(held_out=None)):
        assert group_frechet().measure(summary(features=samples), each) == {}


def test_accuracy_counts_the_labelled_samples_only():
    seen = np.array([3, 1, 4, 1])
    of = lambda labels: summary(labels, labels=seen)
    held_out = Reference("", of([3, 1, 4, 1]), of([3, 1, 4, 0]))
    measure = label_accuracy().measure
    assert measure(of([3, 2, 4, -1]), held_out) == {
        "label_accuracy": 2 / 3,
        "classifier_test_accuracy": 3 / 4,
    }
    assert measure(of([-1] * 4), held_out) == {"classifier_test_accuracy": 3 / 4}
    assert measure(of([3, 1, 4, 1]), held_out._replace(held_out=None)) == {"label_accuracy": 1}


def test_copies_are_as_near_as_the_nearest_held_out_images():
    random = np.random.default_rng(0)
    images = lambda n: np.uint8(random.integers(0, 256, (n, 4, 4, 1)))
    real, others = images(20), images(100)
    of = lambda *parts: summary(pixels=np.concatenate(parts))
    against = Reference("", of(real), of(others))
    copies = lambda samples, against=against: nearest().measure(samples, against)["copies"]
    assert copies(of(others)) == 0.01
    assert copies(of(real ^ 1, others)) == pytest.approx(21 / 120)
    # Exact copies count where held-out images are copies too.
    assert copies(of(real), against._replace(held_out=of(real[:5], others))) == 1
    assert nearest().measure(of(real), against._replace(held_out=None)) == {
        "nearest_train_distance": 0
    }
