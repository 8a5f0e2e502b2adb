import numpy as np
import pytest

from ant_jax import data, evaluation
from ant_jax.evaluation import frechet_distance, summarise
from ant_jax.evaluation.features.digits import digits


def images(num, seed=0, high=256):
    return np.uint8(np.random.default_rng(seed).integers(0, high, (num, 4, 4, 1)))


def batches(array, size=7, labels=None):
    for i in range(0, len(array), size):
        yield array[i : i + size], None if labels is None else labels[i : i + size]


@pytest.fixture
def evaluator(linear, every_metric):
    named = linear._replace(figure_names={"frechet_distance": "fid"})
    return evaluation.build_evaluator(named, list(every_metric.values()))


def reference(evaluator, real, held_out=None):
    of = lambda array: summarise(
        batches(array), evaluator.network, evaluator.moments, evaluator.samples | evaluator.real
    )
    return evaluation.Reference("real", of(real), None if held_out is None else of(held_out))


def test_each_figure_is_that_of_its_outputs(evaluator):
    real, fake = images(60), images(50, 1, 220)
    theirs, ours = (next(evaluator.network.outputs([x])) for x in (real, fake))
    labels = np.arange(50) % 5
    found = evaluation.measure(batches(fake, 7, labels), evaluator, reference(evaluator, real))
    gaussian = lambda x: (x.mean(0), np.cov(x, rowvar=False))
    distance = lambda name: frechet_distance(*gaussian(ours[name]), *gaussian(theirs[name]))
    expected = {
        "fid": distance("features"),
        "sfid": distance("spatial"),
        "inception_score": evaluation.inception_score_of(ours["logits"]),
        **evaluation.precision_and_recall(theirs["features"], ours["features"])._asdict(),
        "label_accuracy": np.mean(ours["labels"] == labels),
        "nearest_train_distance": evaluation.nearest_distances(fake, real).mean(),
        "num_samples": 50,
    }
    assert found.pop("reference") == "real"
    assert found == pytest.approx(expected, rel=1e-9)
    assert expected["precision"] != expected["recall"] and expected["fid"] > 0.1


def test_what_held_out_images_score_is_the_scale(evaluator):
    real, held_out = images(60), images(20, 2)
    found = evaluation.measure(
        batches(images(50, 1)), evaluator, reference(evaluator, real, held_out)
    )
    floors = {name: value for name, value in found.items() if name.startswith("real_")}
    theirs = evaluation.measure(batches(held_out), evaluator, reference(evaluator, real, held_out))
    names = ("fid", "nearest_train_distance", "num_samples")
    assert floors == pytest.approx({f"real_{name}": theirs[name] for name in names})
    assert floors["real_num_samples"] == 20


def test_what_the_extractor_or_the_reference_lacks_is_absent(evaluator, linear):
    whole = reference(evaluator, images(20))
    statistics = whole.summary._replace(gaussians={"features": whole.summary.gaussians["features"]})
    bare = whole._replace(summary=statistics._replace(kept={}))
    found = evaluation.measure(batches(images(9)), evaluator, bare)
    assert list(found) == ["fid", "inception_score", "num_samples", "reference"]
    # Three neighbours need four points in either set.
    few = whole._replace(summary=whole.summary._replace(kept={"features": np.zeros((3, 5))}))
    for real, num in ((whole, 3), (few, 9)):
        assert "recall" not in evaluation.measure(batches(images(num)), evaluator, real)
    assert "recall" in evaluation.measure(batches(images(4)), evaluator, whole)
    poorer = linear._replace(shapes={"features": (5,)})
    assert len(evaluation.build_evaluator(poorer, evaluator.metrics).metrics) == 3
    with pytest.raises(ValueError, match="no images"):
        evaluation.measure([], evaluator, whole)


@pytest.mark.parametrize(
    ("shapes", "is_"), [({"features": (3,)}, r"\(5,\)"), ({"x": ()}, "missing")]
)
def test_outputs_of_other_shapes_than_the_extractor_s_are_refused(
    shapes, is_, linear, every_metric
):
    wrong = evaluation.build_evaluator(linear._replace(shapes=shapes), [])
    with pytest.raises(
        ValueError, match=rf"shapes say that '\w+' of an image is .* output is {is_}"
    ):
        evaluation.summarise(batches(images(3)), wrong.network, [], [])


def test_only_the_outputs_that_metrics_need_are_kept(evaluator):
    kept = []

    def measure(samples, reference):
        kept.append((samples.gaussians, samples.kept))
        return {"mine": 0.0}

    mine = evaluation.Metric(measure)
    whole = reference(evaluator, images(20))
    found = evaluation.measure(batches(images(9)), evaluator._replace(metrics=(mine,)), whole)
    assert kept == [({}, {})] and found["mine"] == 0


@pytest.fixture(scope="module")
def digits_judge(users_cache, every_metric):
    evaluator = evaluation.build_evaluator(digits(), list(every_metric.values()))
    real, held_out = (evaluation.Images(s, data.digits(s)) for s in ("train", "test"))
    return evaluator, evaluation.data_reference(evaluator, real, held_out)


def test_the_figures_of_the_digits(digits_judge):
    test, train = data.digits("test"), data.digits("train")
    figures = lambda images, labels=None: evaluation.measure([(images, labels)], *digits_judge)
    found = figures(test.images, test.labels)
    assert found["frechet_distance"] == pytest.approx(0.83734, abs=1e-4)
    assert found["real_frechet_distance"] == pytest.approx(found["frechet_distance"])
    assert found["group_frechet_distance"] == pytest.approx(found["frechet_distance"])
    assert found["label_accuracy"] == found["classifier_test_accuracy"] == 0.98
    assert found["copies"] == 0.01 and found["num_samples"] == found["real_num_samples"] == 300
    assert found["nearest_train_distance"] == found["real_nearest_train_distance"]

    found = figures(train.images, train.labels)
    assert found["frechet_distance"] < 1e-8 and found["copies"] == 1
    assert found["nearest_train_distance"] == 0
    noise = np.uint8(np.random.default_rng(0).integers(0, 256, (300, 8, 8, 1)))
    found = figures(noise)
    assert found["frechet_distance"] > 20 * found["real_frechet_distance"]
    assert found["nearest_train_distance"] > 2 * found["real_nearest_train_distance"]
    assert found["copies"] == 0 and "label_accuracy" not in found
    # Missing digits are noticed.
    found = figures(test.images[test.labels < 5])
    assert found["frechet_distance"] > 5 * found["real_frechet_distance"]
