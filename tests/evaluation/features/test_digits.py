import numpy as np
import pytest

from ant_jax import data
from ant_jax.evaluation.features import digits


@pytest.fixture
def no_training(monkeypatch):
    def fail():
        raise AssertionError("trained again")

    monkeypatch.setattr(digits, "_train", fail)


@pytest.fixture
def fake_training(monkeypatch):
    """Replaces training by something instant and recognisable."""
    shapes = [(64, 256), (256, 64), (64, 10)]
    classifier = digits.DigitsClassifier(
        tuple(np.full(shape, 2.0) for shape in shapes),
        tuple(np.zeros(shape[1]) for shape in shapes),
    )
    monkeypatch.setattr(digits, "_train", lambda: classifier)
    return classifier


def test_held_out_images_are_recognised(cache_dir):
    classifier = digits.load_classifier(cache_dir)
    test = data.digits("test")
    assert np.mean(digits.predict(classifier, test.images) == test.labels) == 0.98


def test_only_training_images_are_trained_on(monkeypatch):
    asked = []
    real = digits.data.digits
    monkeypatch.setattr(digits, "_EPOCHS", 1)
    monkeypatch.setattr(digits.data, "digits", lambda split: asked.append(split) or real(split))
    digits._train()
    assert asked == ["train"]


def test_the_gradients_are_those_of_the_loss():
    random = np.random.default_rng(0)
    weights = [random.standard_normal(shape) for shape in ((5, 4), (4, 3), (3, 2))]
    biases = [random.standard_normal(n) for n in (4, 3, 2)]
    inputs, wanted = random.standard_normal((6, 5)), np.eye(2)[random.integers(0, 2, 6)]
    _, gradients = digits._loss(weights, biases, inputs, wanted)
    for param, gradient in zip(weights + biases, gradients, strict=True):
        place = np.unravel_index(np.abs(gradient).argmax(), gradient.shape)
        losses = []
        for change in (-1e-6, 1e-6):
            param[place] += change
            losses.append(digits._loss(weights, biases, inputs, wanted)[0])
            param[place] -= change
        assert (losses[1] - losses[0]) / 2e-6 == pytest.approx(gradient[place], rel=1e-4)


def test_features_are_what_the_last_layer_sees(cache_dir):
    classifier = digits.load_classifier(cache_dir)
    images = data.digits("test").images[:20]
    features = digits.features(classifier, images)
    assert features.shape == (20, 64) and features.dtype == np.float64
    assert features.min() == 0
    logits = features @ classifier.weights[-1] + classifier.biases[-1]
    np.testing.assert_array_equal(logits.argmax(-1), digits.predict(classifier, images))
    np.testing.assert_allclose(features[3:5], digits.features(classifier, images[3:5]), atol=1e-12)


@pytest.mark.parametrize(
    "images", [np.zeros((2, 8, 8, 1)), np.zeros((2, 8, 8), np.uint8), np.zeros((8, 8, 1), np.uint8)]
)
def test_other_images_are_refused(fake_training, images):
    with pytest.raises(ValueError, match=r"uint8 \(n, 8, 8, 1\)"):
        digits.features(fake_training, images)


def test_the_second_call_reads_the_cache(cache_dir, no_training):
    digits.load_classifier(cache_dir)
    with pytest.raises(AssertionError, match="trained again"):
        digits.load_classifier(cache_dir / "another")


def test_the_cache_preserves_the_classifier(tmp_path, fake_training):
    for _ in range(2):
        classifier = digits.load_classifier(tmp_path)
        for field in ("weights", "biases"):
            got, expected = getattr(classifier, field), getattr(fake_training, field)
            for a, b in zip(got, expected, strict=True):
                np.testing.assert_array_equal(a, b)
    assert [path.name for path in tmp_path.iterdir()] == [
        f"digits_classifier_v{digits._VERSION}.npz"
    ]


@pytest.mark.parametrize("damage", ["empty", "truncated", "noise", "flipped", "pickle", "other"])
def test_a_corrupt_cache_is_replaced(tmp_path, fake_training, monkeypatch, damage):
    digits.load_classifier(tmp_path)
    (path,) = tmp_path.iterdir()
    good = path.read_bytes()
    middle = len(good) // 2
    if damage == "pickle":
        np.savez(path, weight0=np.array([{}], object))
    elif damage == "other":
        np.savez(path, something=np.zeros(3))
    else:
        path.write_bytes(
            {
                "empty": b"",
                "truncated": good[:middle],
                "noise": b"not an archive" * 100,
                "flipped": good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :],
            }[damage]
        )
    assert digits.load_classifier(tmp_path).weights[0][0, 0] == 2
    monkeypatch.setattr(digits, "_train", lambda: pytest.fail("the cache was not replaced"))
    assert digits.load_classifier(tmp_path).weights[0][0, 0] == 2


def test_a_failed_write_leaves_nothing_behind(tmp_path, fake_training, monkeypatch):
    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(digits.os, "replace", fail)
    assert digits.load_classifier(tmp_path).weights[0][0, 0] == 2
    assert not list(tmp_path.iterdir())


def test_the_recipes_version_is_part_of_the_key(tmp_path, fake_training, monkeypatch):
    digits.load_classifier(tmp_path)
    monkeypatch.setattr(digits, "_VERSION", digits._VERSION + 1)
    digits.load_classifier(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_the_default_cache_follows_xdg(tmp_path, fake_training, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    digits.load_classifier()
    assert len(list((tmp_path / "xdg" / "ant_jax").iterdir())) == 1
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    digits.load_classifier()
    assert len(list((tmp_path / "home" / ".cache" / "ant_jax").iterdir())) == 1
