import numpy as np
import pytest

from ant_jax.evaluation import covariance, moments, summarise, summary


def images(num, seed=0):
    return np.uint8(np.random.default_rng(seed).integers(0, 256, (num, 4, 4, 1)))


def batches(array, size=7, labels=None):
    for i in range(0, len(array), size):
        yield array[i : i + size], None if labels is None else labels[i : i + size]


@pytest.mark.parametrize("most", [None, 1, 7, 10, 100])
def test_a_summary_is_of_all_images_and_keeps_some(most, linear, monkeypatch):
    monkeypatch.setattr(summary, "_TOGETHER", 10)
    array, network = images(24), linear.load()
    (whole,) = network.outputs([array])
    moments_of, keep = ["features", "spatial"], ["features", "labels"]
    found = summarise(batches(array, labels=np.arange(24)), network, moments_of, keep, most)
    assert found.count == 24 and list(found.gaussians) == moments_of and list(found.kept) == keep
    for name in moments_of:
        total = moments(whole[name])
        np.testing.assert_allclose(found.gaussians[name].mean, total.mean)
        np.testing.assert_allclose(found.gaussians[name].cov, covariance(total))
    for name in keep:
        np.testing.assert_allclose(found.kept[name], whole[name][:most])
    np.testing.assert_array_equal(found.labels, np.arange(24)[:most])


def test_no_more_is_kept_than_is_asked_for(linear):
    found = summarise(batches(images(9)), linear.load(), [], [])
    assert found.gaussians == found.kept == {} and found.count == 9


def test_a_summary_there_and_back(linear, tmp_path):
    found = summarise(
        batches(images(9)), linear.load(), ["features"], ["pixels", "features", "labels"]
    )
    summary.save(tmp_path / "a.npz", found)
    back = summary.load(tmp_path / "a.npz", found.gaussians, found.kept)
    np.testing.assert_equal(back, found)
    assert back.kept["pixels"].dtype == np.uint8
    with pytest.raises(KeyError):
        summary.load(tmp_path / "a.npz", ["spatial"], [])


def test_errors(linear):
    network = linear.load()
    with pytest.raises(ValueError, match="there are no images to evaluate"):
        summarise([], network, [], [])
    with pytest.raises(ValueError, match="at least 2"):
        summarise(batches(images(1)), network, ["features"], [])
    with pytest.raises(ValueError, match=r"3 images.*\(2,\)"):
        summarise([(images(3), [1, 2])], network, [], [])
