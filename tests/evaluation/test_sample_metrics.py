import itertools

import numpy as np
import pytest

from ant_jax import data, evaluation
from ant_jax.evaluation import covariance, frechet_distance, moments


@pytest.fixture(scope="module")
def model(cache_dir):
    return evaluation.extractor("digits", cache_dir)


@pytest.fixture(scope="module")
def test_split():
    return data.digits("test")


def test_metrics_of_the_held_out_images(model, test_split):
    metrics = evaluation.sample_metrics([(test_split.images, test_split.labels)], model)
    train = model.features(data.digits("train").images)
    held_out = model.features(test_split.images)
    expected = frechet_distance(
        held_out.mean(0), np.cov(held_out.T), train.mean(0), np.cov(train.T)
    )
    assert metrics["frechet_distance"] == pytest.approx(expected, rel=1e-9)
    assert metrics["label_accuracy"] == metrics["classifier_test_accuracy"] > 0.97
    assert metrics["num_samples"] == 300


def test_the_training_images_themselves_are_at_distance_zero(model):
    train = data.digits("train")
    metrics = evaluation.sample_metrics([(train.images, train.labels)], model)
    assert metrics["frechet_distance"] < 1e-8


def test_streaming_from_a_generator_changes_nothing(model, test_split):
    whole = evaluation.sample_metrics([(test_split.images, test_split.labels)], model)
    cuts = [0, 1, 120, 300]
    stream = ((test_split.images[a:b], test_split.labels[a:b]) for a, b in itertools.pairwise(cuts))
    assert evaluation.sample_metrics(stream, model) == pytest.approx(whole, rel=1e-8)


def test_noise_is_far_from_the_digits(model):
    noise = np.random.default_rng(0).integers(0, 256, (300, 8, 8, 1)).astype(np.uint8)
    metrics = evaluation.sample_metrics([(noise, None)], model)
    assert metrics["frechet_distance"] > 20 * evaluation.real_floor(model)["frechet_distance"]
    assert "label_accuracy" not in metrics


def test_missing_digits_are_noticed(model, test_split):
    some = test_split.images[test_split.labels < 5]
    metrics = evaluation.sample_metrics([(some, None)], model)
    assert metrics["frechet_distance"] > 5 * evaluation.real_floor(model)["frechet_distance"]


def test_wrong_labels_are_right_by_chance_only(model, test_split):
    shuffled = np.random.default_rng(0).permutation(test_split.labels)
    metrics = evaluation.sample_metrics([(test_split.images, shuffled)], model)
    assert 0.04 < metrics["label_accuracy"] < 0.17


def test_accuracy_counts_the_labelled_samples_only(model, test_split):
    images, labels = test_split.images, test_split.labels
    batches = [(images[:100], labels[:100]), (images[100:], None)]
    right = np.mean(model.predict(images[:100]) == labels[:100])
    assert evaluation.sample_metrics(batches, model)["label_accuracy"] == pytest.approx(right)


def test_real_floor(model):
    floor = evaluation.real_floor(model)
    assert floor == evaluation.real_floor(model)
    assert floor["num_samples"] == 300
    train, held_out = (moments(model.features(data.digits(s).images)) for s in ("train", "test"))
    expected = frechet_distance(held_out.mean, covariance(held_out), train.mean, covariance(train))
    assert floor["frechet_distance"] == pytest.approx(expected, rel=1e-9)
    metrics = evaluation.sample_metrics([(data.digits("test").images, None)], model)
    assert metrics["group_frechet_distance"] == pytest.approx(expected, rel=1e-9)


def test_groups_are_as_large_as_the_held_out_images(model):
    images = data.digits("train").images
    metrics = evaluation.sample_metrics([(images[:450], None), (images[450:], None)], model)
    train = moments(model.features(images))
    groups = [moments(model.features(images[i : i + 300])) for i in range(0, 1200, 300)]
    expected = [
        frechet_distance(g.mean, covariance(g), train.mean, covariance(train)) for g in groups
    ]
    assert metrics["group_frechet_distance"] == pytest.approx(np.mean(expected), rel=1e-9)
    assert "group_frechet_distance" not in evaluation.sample_metrics([(images[:299], None)], model)


def test_errors(model, test_split):
    with pytest.raises(ValueError, match=r"'inception'.*digits"):
        evaluation.extractor("inception")
    with pytest.raises(ValueError, match="no samples"):
        evaluation.sample_metrics([], model)
    with pytest.raises(ValueError, match="at least 2"):
        evaluation.sample_metrics([(test_split.images[:1], None)], model)
    with pytest.raises(ValueError, match=r"3 images.*\(2,\)"):
        evaluation.sample_metrics([(test_split.images[:3], test_split.labels[:2])], model)


def test_held_out_images_are_no_copies(model, test_split):
    metrics = evaluation.sample_metrics([(test_split.images, None)], model)
    train = data.digits("train").images.reshape(-1, 64) / 255
    held_out = test_split.images.reshape(-1, 64) / 255
    nearest = np.array([np.linalg.norm(train - image, axis=1).min() for image in held_out])
    assert metrics["nearest_train_distance"] == pytest.approx(nearest.mean(), rel=1e-9)
    assert evaluation.real_floor(model)["nearest_train_distance"] == pytest.approx(nearest.mean())
    assert metrics["copies"] == 0.01
    metrics = evaluation.sample_metrics([(test_split.images[np.argsort(nearest)[3:]], None)], model)
    assert metrics["copies"] == 0


def test_copies_are_counted(model, test_split):
    train, held_out = data.digits("train").images, test_split.images
    metrics = evaluation.sample_metrics([(train[:50], None), (train[50:], None)], model)
    assert metrics["copies"] == 1
    assert metrics["nearest_train_distance"] == 0
    barely_changed = train[:100] ^ 1
    metrics = evaluation.sample_metrics([(barely_changed, None), (held_out, None)], model)
    assert metrics["copies"] == pytest.approx(103 / 400)


def test_noise_is_far_from_the_training_images(model):
    noise = np.random.default_rng(0).integers(0, 256, (300, 8, 8, 1)).astype(np.uint8)
    metrics = evaluation.sample_metrics([(noise, None)], model)
    assert metrics["copies"] == 0
    floor = evaluation.real_floor(model)
    assert metrics["nearest_train_distance"] > 2 * floor["nearest_train_distance"]


def test_exact_copies_count_where_held_out_images_are_copies_too(model):
    model = model._replace(held_out_distances=np.append(np.zeros(20), model.held_out_distances))
    metrics = evaluation.sample_metrics([(data.digits("train").images[:100], None)], model)
    assert metrics["copies"] == 1
