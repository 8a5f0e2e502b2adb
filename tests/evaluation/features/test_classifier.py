import re

import jax
import numpy as np
import pytest

from ant_jax import data, evaluation
from ant_jax.evaluation.features import classifier
from ant_jax.runtime import progress


def training(num_classes=10, **changes):
    """Images of three classes, whose label is their brightness."""
    labels = np.arange(60) % 3
    noise = np.random.default_rng(0).integers(0, 50, (60, 8, 8, 1))
    images = np.uint8(noise + 90 * labels[:, None, None, None])
    source = data.ArraySource(images, labels if num_classes else None, "those", num_classes)
    found = evaluation.Images("those[train]", source, {"image_size": 8}, {"name": "those"})
    return found._replace(**changes)


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """An empty cache, and few steps."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(classifier, "_STEPS", 20)
    monkeypatch.setattr(classifier, "_trained", {})
    return tmp_path / "ant_jax"


@pytest.fixture
def quick(monkeypatch):
    """Training gives the first variables, and is counted."""
    count = []

    def train(images, layers, shape):
        count.append(images)
        return jax.tree.map(np.asarray, classifier._first(layers, shape))

    monkeypatch.setattr(classifier, "_train", train)
    return count


def test_it_learns_the_labels(monkeypatch):
    """And logs its steps: there may be fewer images than it sees."""
    logged = []
    monkeypatch.setattr(progress, "_REPORT_SECONDS", 0)
    monkeypatch.setattr(progress.logging, "info", lambda form, *args: logged.append(form % args))
    images = training()
    network = classifier.classifier(lambda: images).load()
    (found,) = network.outputs([images.source.images])
    assert np.mean(found["labels"] == images.source.labels) > 0.9
    assert "20/20 steps of the classifier  ETA 0s" in logged


def test_the_second_process_reads_the_cache(place, quick, monkeypatch):
    load = lambda **changes: classifier.classifier(lambda: training(**changes)).load().digest
    first = load()
    assert load() == first
    monkeypatch.setattr(classifier, "_trained", {})
    assert load() == first and len(quick) == 1 and len(list(place.iterdir())) == 1
    load(key={"name": "others"})
    load(num_classes=4)
    assert len(quick) == 3 and len(list(place.iterdir())) == 3


@pytest.mark.parametrize("damage", ["truncated", "other"])
def test_a_corrupt_cache_is_replaced(place, quick, monkeypatch, damage):
    for _ in range(2):
        classifier.classifier(training).load()
        monkeypatch.setattr(classifier, "_trained", {})
        (path,) = place.iterdir()
        if len(quick) == 1:
            path.write_bytes(path.read_bytes()[:2000])
            if damage == "other":
                np.savez(path, something=np.zeros(3))
    assert len(quick) == 2
    classifier.classifier(training).load()
    assert len(quick) == 2


@pytest.mark.parametrize(
    "shape, side", [((8, 8, 1), (8, 8, 1)), ((14, 14, 3), (14, 14, 3)), ((32, 32, 1), (16, 16, 4))]
)
def test_large_images_are_folded(shape, side):
    images = np.random.default_rng(0).random((2, *shape), np.float32)
    assert classifier._folded(images).shape == (2, *side)
    odd = classifier._folded(np.ones((1, 50, 50, 1), np.float32))
    assert odd.shape == (1, 13, 13, 16) and odd.sum() == 2500


@pytest.mark.parametrize(
    "size, changes, told",
    [
        ((4, 4, 1), {}, "evaluates images of 8x8 to 64x64 pixels, not of 4x4"),
        ((256, 256, None), {}, "not of 256x256"),
        ((8, 8, None), {"num_classes": 0}, "needs labelled images, and those has no labels"),
        ((8, 8, 3), {}, "evaluates images with the 1 channels of those, not with 3"),
    ],
)
def test_what_it_cannot_evaluate_is_said_before_it_is_trained(size, changes, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        classifier.classifier(lambda: training(**changes)).check(*size)
