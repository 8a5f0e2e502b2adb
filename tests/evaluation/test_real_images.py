import numpy as np
import pytest

from ant_jax import data, evaluation
from ant_jax.evaluation import real_images


def images(num, seed=0):
    return np.uint8(np.random.default_rng(seed).integers(0, 256, (num, 4, 4, 1)))


@pytest.fixture
def evaluator(linear, every_metric):
    return evaluation.build_evaluator(linear, list(every_metric.values()))


@pytest.fixture
def outputs(evaluator):
    return lambda array: next(evaluator.network.outputs([array]))


def gaussian(x):
    return evaluation.Gaussian(x.mean(0, dtype=np.float64), np.cov(np.float64(x), rowvar=False))


def save(path, **arrays):
    np.savez(path, **arrays)
    return path


def arrays_of(pool, spatial=None):
    named = dict(zip(("mu", "sigma"), pool, strict=True))
    return named | ({} if spatial is None else dict(zip(("mu_s", "sigma_s"), spatial, strict=True)))


def test_a_reference_of_statistics_alone(evaluator, outputs, tmp_path):
    pool = gaussian(outputs(images(9))["features"])
    path = save(tmp_path / "a.npz", **arrays_of(pool))
    found = evaluation.read_reference(path, evaluator)
    assert (found.name, found.held_out, found.summary.kept) == (str(path), None, {})
    np.testing.assert_equal(found.summary.gaussians, {"features": pool})


def test_a_reference_of_images_alone(evaluator, outputs, tmp_path):
    found = evaluation.read_reference(
        save(tmp_path / "a.npz", arr_0=images(9)), evaluator, 4
    ).summary
    expected = outputs(images(9))
    assert found.count == 9 and found.kept.keys() == evaluator.real == {"features", "pixels"}
    np.testing.assert_allclose(found.kept["features"], expected["features"])
    for name in ("features", "spatial"):
        for ours, theirs in zip(found.gaussians[name], gaussian(expected[name]), strict=True):
            np.testing.assert_allclose(ours, theirs)


def test_statistics_of_a_reference_are_not_those_of_its_few_images(evaluator, outputs, tmp_path):
    whole, few = outputs(images(40)), outputs(images(9, seed=1))
    statistics = {name: gaussian(whole[name]) for name in ("features", "spatial")}
    path = save(tmp_path / "a.npz", arr_0=images(9, seed=1), **arrays_of(*statistics.values()))
    found = evaluation.read_reference(path, evaluator).summary
    np.testing.assert_allclose(found.kept["features"], few["features"])
    np.testing.assert_equal(found.gaussians, statistics)


@pytest.mark.parametrize("name", ["mu", "mu_s"])
def test_statistics_of_another_network_are_refused(name, evaluator, tmp_path):
    other = {"mu": 5, "mu_s": 4}
    other[name] += 1
    arrays = {mean: np.zeros(d) for mean, d in other.items()}
    arrays |= {mean.replace("mu", "sigma"): np.eye(d) for mean, d in other.items()}
    path = save(tmp_path / "other.npz", **arrays)
    told = rf"other.npz cannot be used: '{name}' has {other[name]} features, but samples are"
    with pytest.raises(ValueError, match=told):
        evaluation.read_reference(path, evaluator)


def data_of(array, key="key"):
    source = data.ArraySource(array, np.arange(len(array)), "data")
    return evaluation.Images("data", source, key=key and {"name": key})


def test_data_are_worked_off_once(evaluator, outputs, tmp_path, monkeypatch):
    monkeypatch.setattr(real_images, "_KEPT", 10)
    worked_off = []
    summarise = real_images.summarise
    monkeypatch.setattr(
        real_images, "summarise", lambda *args: worked_off.append(1) or summarise(*args)
    )

    def reference(key="key", evaluator=evaluator):
        return evaluation.data_reference(
            evaluator, data_of(images(30), key), None, 7, tmp_path / "new"
        )

    first = reference()
    expected = outputs(images(30))["features"]
    assert first.name == "data" and first.summary.count == 30
    np.testing.assert_allclose(first.summary.gaussians["features"].cov, gaussian(expected).cov)
    # In an order of its own, in which the labels go along.
    assert len(first.summary.kept["features"]) == len(first.summary.labels) == 10
    np.testing.assert_allclose(first.summary.kept["features"], expected[first.summary.labels])
    assert len(worked_off) == 1
    (path,) = (tmp_path / "new").iterdir()
    np.testing.assert_equal(reference(), first)
    assert len(worked_off) == 1
    # Neither for other images, nor for other weights, nor where other outputs are needed.
    other_weights = evaluator._replace(network=evaluator.network._replace(digest="other"))
    fewer = evaluator._replace(metrics=evaluator.metrics[:1])
    for num, other in enumerate(
        ({"key": "other"}, {"evaluator": other_weights}, {"evaluator": fewer}), start=2
    ):
        reference(**other)
        assert len(worked_off) == len(list((tmp_path / "new").iterdir())) == num
    # A damaged file is replaced.
    path.write_bytes(path.read_bytes()[:-40])
    np.testing.assert_equal(reference(), first)
    assert len(worked_off) == 5
    reference()
    assert len(worked_off) == 5


def test_held_out_images_have_all_that_samples_have(evaluator, tmp_path):
    found = evaluation.data_reference(
        evaluator, data_of(images(30), None), data_of(images(9), "other"), 7, tmp_path
    )
    assert found.held_out.count == 9
    assert found.held_out.kept.keys() == evaluator.samples | evaluator.real
    # Without a key there is no cache.
    assert len(list(tmp_path.iterdir())) == 1


def test_what_is_not_finished_is_not_kept(evaluator, tmp_path):
    def failing(batches):
        yield from evaluator.network.outputs(batches)
        raise KeyboardInterrupt

    stopped = evaluator._replace(network=evaluator.network._replace(outputs=failing))
    with pytest.raises(KeyboardInterrupt):
        evaluation.data_reference(stopped, data_of(images(30)), cache_dir=tmp_path)
    with pytest.raises(ValueError, match=r"a reference needs at least 2 images, but .* has 1$"):
        evaluation.data_reference(evaluator, data_of(images(1)), cache_dir=tmp_path)
    assert not list(tmp_path.iterdir())
