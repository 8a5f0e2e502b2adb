"""The formulas give the figures of public programs."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from ant_jax import evaluation

RECORDED = Path(__file__).parents[1] / "data" / "metrics"
_spec = importlib.util.spec_from_file_location("record_metrics", RECORDED / "record.py")
record = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(record)


@pytest.fixture(scope="module")
def recorded():
    return json.loads((RECORDED / "figures.json").read_text())


@pytest.fixture(scope="module")
def sets():
    return record.features()


def test_precision_and_recall_are_those_of_prdc(sets, recorded):
    real, fake, _ = sets
    # Without ties, at which prdc leaves out the border of a ball.
    found = evaluation.precision_and_recall(real, fake, record.NEIGHBOURS)
    assert found == (recorded["precision"], recorded["recall"])
    assert 0.1 < found.recall < found.precision < 0.95


def test_the_frechet_distance_is_that_of_pytorch_fid(sets, recorded):
    moments = [evaluation.moments(x) for x in (sets[1], sets[0])]
    (m1, s1), (m2, s2) = ((m.mean, evaluation.covariance(m)) for m in moments)
    found = evaluation.frechet_distance(m1, s1, m2, s2)
    assert found == pytest.approx(recorded["frechet_distance"], rel=1e-6)


def test_the_inception_score_is_that_of_torch_fidelity(sets, recorded):
    found = evaluation.inception_score_of(sets[2], record.SPLIT_SIZE)
    assert found == pytest.approx(recorded["inception_score"], rel=1e-9)
    assert not np.isclose(evaluation.inception_score_of(sets[2]), found, rtol=0.01)
