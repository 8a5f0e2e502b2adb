import numpy as np
import pytest

from ant_jax import evaluation
from ant_jax.evaluation import (
    Gaussian,
    Statistics,
    covariance,
    frechet_distance,
    image_reference,
    moments,
    summary,
)
from ant_jax.models.inception import Features

POOL, SPATIAL = 5, 4
_random = np.random.RandomState(0)
WEIGHTS = _random.standard_normal((12, POOL + SPATIAL + 6)) / 99


def features(images):
    """Of 2 x 2 pixels of three colours."""
    every = np.float32(images.reshape(len(images), -1) @ WEIGHTS)
    return Features(*np.split(every, [POOL, POOL + SPATIAL], axis=1))


NETWORK = evaluation.Network(lambda batches: map(features, batches), POOL, SPATIAL, "digest")


def images(num, seed=0, high=256):
    return np.uint8(np.random.RandomState(seed).randint(0, high, (num, 2, 2, 3)))


def batches(array, size=7):
    return ((array[i : i + size], None) for i in range(0, len(array), size))


def gaussian(x):
    return Gaussian(x.mean(0, dtype=np.float64), np.cov(np.float64(x), rowvar=False))


def reference(array):
    real = features(array)
    return evaluation.Reference(
        "real", Statistics(gaussian(real.pool), gaussian(real.spatial)), real.pool
    )


def test_each_figure_is_that_of_its_features(monkeypatch):
    monkeypatch.setattr(summary, "_TOGETHER", 20)
    real, fake = images(60), images(50, seed=1, high=220)
    found = evaluation.image_metrics(batches(fake), NETWORK, reference(real))
    theirs, ours = features(real), features(fake)
    expected = {
        "fid": frechet_distance(*gaussian(ours.pool), *gaussian(theirs.pool)),
        "sfid": frechet_distance(*gaussian(ours.spatial), *gaussian(theirs.spatial)),
        "inception_score": evaluation.inception_score(ours.logits),
        **evaluation.precision_recall(theirs.pool, ours.pool)._asdict(),
        "num_samples": 50,
    }
    assert found == pytest.approx(expected, rel=1e-9)
    assert expected["precision"] != expected["recall"] and expected["fid"] > 0.1


def test_what_the_reference_lacks_is_absent():
    whole = reference(images(20))
    bare = whole._replace(statistics=whole.statistics._replace(spatial=None), pool=None)
    found = evaluation.image_metrics(batches(images(9)), NETWORK, bare)
    assert list(found) == ["fid", "inception_score", "num_samples"]
    # Three neighbours need four points in either set.
    for real, num in ((whole, 3), (whole._replace(pool=whole.pool[:3]), 9)):
        found = evaluation.image_metrics(batches(images(num)), NETWORK, real)
        assert list(found) == ["fid", "sfid", "inception_score", "num_samples"]
    assert "recall" in evaluation.image_metrics(batches(images(4)), NETWORK, whole)
    with pytest.raises(ValueError, match="no images"):
        evaluation.image_metrics([], NETWORK, whole)


@pytest.mark.parametrize("keep", [None, 1, 7, 10, 100])
def test_a_summary_is_of_all_images_and_keeps_some(keep, monkeypatch):
    monkeypatch.setattr(summary, "_TOGETHER", 10)
    array = images(24)
    parts = [features(part) for part, _ in batches(array)]
    whole = features(array)
    found = summary.summarise(parts, keep)
    assert found.count == 24
    for name in ("pool", "spatial"):
        total = moments(getattr(whole, name))
        np.testing.assert_allclose(getattr(found.statistics, name).mean, total.mean)
        np.testing.assert_allclose(getattr(found.statistics, name).cov, covariance(total))
    np.testing.assert_array_equal(found.pool, whole.pool[:keep])
    np.testing.assert_array_equal(found.logits, whole.logits[:keep])


def save(path, **arrays):
    np.savez(path, **arrays)
    return path


def arrays_of(statistics):
    named = dict(zip(("mu", "sigma"), statistics.pool, strict=True))
    if statistics.spatial is not None:
        named |= dict(zip(("mu_s", "sigma_s"), statistics.spatial, strict=True))
    return named


def test_a_reference_of_statistics_alone(tmp_path):
    statistics = reference(images(9)).statistics._replace(spatial=None)
    path = save(tmp_path / "a.npz", **arrays_of(statistics))
    found = evaluation.read_reference(path, NETWORK, 4)
    assert (found.name, found.pool, found.statistics.spatial) == (str(path), None, None)
    np.testing.assert_array_equal(found.statistics.pool.cov, statistics.pool.cov)


def test_a_reference_of_images_alone(tmp_path):
    expected = reference(images(9))
    found = evaluation.read_reference(save(tmp_path / "a.npz", arr_0=images(9)), NETWORK, 4)
    np.testing.assert_array_equal(found.pool, expected.pool)
    for ours, theirs in zip(found.statistics, expected.statistics, strict=True):
        np.testing.assert_allclose(ours.mean, theirs.mean)
        np.testing.assert_allclose(ours.cov, theirs.cov)


def test_statistics_of_a_reference_are_not_those_of_its_few_images(tmp_path):
    statistics = reference(images(40)).statistics
    path = save(tmp_path / "a.npz", arr_0=images(9, seed=1), **arrays_of(statistics))
    found = evaluation.read_reference(path, NETWORK, 4)
    np.testing.assert_array_equal(found.pool, features(images(9, seed=1)).pool)
    np.testing.assert_array_equal(found.statistics.pool.mean, statistics.pool.mean)
    np.testing.assert_array_equal(found.statistics.spatial.cov, statistics.spatial.cov)


@pytest.mark.parametrize("name", ["mu", "mu_s"])
def test_statistics_of_another_network_are_refused(name, tmp_path):
    other = {"mu": POOL, "mu_s": SPATIAL}
    other[name] += 1
    arrays = {mean: np.zeros(d) for mean, d in other.items()}
    arrays |= {mean.replace("mu", "sigma"): np.eye(d) for mean, d in other.items()}
    path = save(tmp_path / "other.npz", **arrays)
    with pytest.raises(
        ValueError, match=rf"other.npz cannot be used: '{name}' is of {other[name]}"
    ):
        evaluation.read_reference(path, NETWORK, 4)


def data_reference(cache_dir, array=None, key="key", network=NETWORK):
    def parts():
        assert array is not None, "the cache was to be used"
        return (part for part, _ in batches(array))

    return evaluation.data_reference("data", parts, network, {"name": key}, cache_dir)


def test_statistics_of_data_are_computed_once(tmp_path, monkeypatch):
    monkeypatch.setattr(image_reference, "_IMAGES", 10)
    cache_dir = tmp_path / "new"
    expected = reference(images(30))
    first = data_reference(cache_dir, images(30))
    np.testing.assert_array_equal(first.pool, expected.pool[:10])
    np.testing.assert_allclose(first.statistics.spatial.cov, expected.statistics.spatial.cov)
    (path,) = cache_dir.iterdir()
    again = data_reference(cache_dir)
    assert again.name == "data"
    np.testing.assert_array_equal(again.pool, first.pool)
    for ours, theirs in zip(again.statistics, first.statistics, strict=True):
        np.testing.assert_array_equal(ours.mean, theirs.mean)
        np.testing.assert_array_equal(ours.cov, theirs.cov)
    # Neither for other images nor for other weights.
    others = ({"key": "other"}, {"network": NETWORK._replace(digest="other")})
    for num, other in enumerate(others, start=2):
        with pytest.raises(AssertionError, match="the cache"):
            data_reference(cache_dir, **other)
        data_reference(cache_dir, images(30), **other)
        assert len(list(cache_dir.iterdir())) == num
    # A damaged file is replaced.
    path.write_bytes(path.read_bytes()[:-40])
    np.testing.assert_array_equal(data_reference(cache_dir, images(30)).pool, first.pool)
    data_reference(cache_dir)


def test_statistics_that_are_not_finished_are_not_kept(tmp_path):
    def failing():
        yield images(5)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluation.data_reference("data", failing, NETWORK, {}, tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="at least 2"):
        data_reference(tmp_path, images(1))
    assert not list(tmp_path.iterdir())
