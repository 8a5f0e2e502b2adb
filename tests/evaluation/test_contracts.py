"""What every feature extractor and every metric promises; one's own can be tested as well."""

import inspect

import numpy as np
import pytest

from ant_jax import data, evaluation, settings
from ant_jax.evaluation import features, metrics
from ant_jax.evaluation.summary import Reference, summarise

EXTRACTORS = settings.names_in(features, evaluation.Extractor)
METRICS = settings.names_in(metrics, evaluation.Metric)
# Where a figure is best, it has this value.
BEST = {
    "frechet_distance": 0,
    "sfid": 0,
    "group_frechet_distance": 0,
    "precision": 1,
    "recall": 1,
    "nearest_train_distance": 0,
    "label_accuracy": 1,
}


def test_the_folders_have_components():
    assert {"digits", "inception", "classifier"} <= set(EXTRACTORS)
    assert "inception_network" not in EXTRACTORS
    assert {"frechet", "inception_score", "precision_recall"} <= set(METRICS)


@pytest.fixture(scope="module", params=EXTRACTORS)
def extractor(request, inception_weights, users_cache):
    component = settings.resolve(features, request.param, evaluation.Extractor)
    training = evaluation.Images("digits", data.digits("test"), {"image_size": 8})
    given = {"weights": str(inception_weights), "training": lambda: training}
    needed = inspect.signature(component).parameters
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features.classifier, "_STEPS", 20)
        yield component(**{name: value for name, value in given.items() if name in needed})


def test_an_extractor_gives_what_it_says_whatever_the_batches(extractor, recorded):
    # As many at once as in the tests of Inception, so that it is compiled once.
    shapes = [recorded["images"].shape[1:], (8, 8, 1), (32, 32, 3)]
    shape = next(each for each in shapes if accepts(extractor, each))
    images = np.uint8(np.random.default_rng(0).integers(0, 256, (3, *shape)))
    network = extractor.load()
    assert network.digest

    def outputs(*batches):
        parts = list(network.outputs(iter(batches)))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    found = outputs(images[:1], images[1:])
    assert found.keys() == extractor.shapes.keys()
    for name, value in found.items():
        assert value.shape == (3, *extractor.shapes[name])
        assert value.dtype.kind in {"labels": "iu", "pixels": "u"}.get(name, "f")
        assert np.isfinite(value).all()
    assert any(np.ptp(value, axis=0).any() for value in found.values())
    for name, value in outputs(images[:1], images[1:2], images[2:]).items():
        np.testing.assert_allclose(value, found[name], rtol=1e-5, err_msg=name)
    for name, value in outputs(images[:1]).items():
        np.testing.assert_array_equal(value, found[name][:1])
    with pytest.raises(ValueError, match="uint8"):
        list(network.outputs([images / 255]))


def accepts(extractor, shape):
    try:
        extractor.check(*shape)
    except ValueError:
        return False
    return True


def images(num, seed, low=0, high=256):
    return np.uint8(np.random.default_rng(seed).integers(low, high, (num, 4, 4, 1)))


@pytest.fixture
def measured(linear, every_metric):
    """A function from a metric's name, samples and real images to figures."""

    def measure(name, samples, real, held_out=None):
        metric = every_metric[name]
        evaluator = evaluation.build_evaluator(linear, [metric])
        assert evaluator.metrics, "the extractor of these tests lacks what the metric needs"
        keep = evaluator.samples | evaluator.real
        of = lambda array: summarise(
            [(array, next(evaluator.network.outputs([array]))["labels"])],
            evaluator.network,
            evaluator.moments,
            keep,
        )
        return metric.measure(
            of(samples), Reference("real", of(real), None if held_out is None else of(held_out))
        )

    return measure


@pytest.mark.parametrize("name", METRICS)
def test_equal_sets_have_the_best_figures(name, measured):
    real = images(60, 0)
    same = measured(name, real, real, real)
    assert same and all(np.isfinite(value) for value in same.values())
    known = same.keys() & BEST.keys()
    best = {figure: BEST[figure] for figure in known}
    assert {figure: same[figure] for figure in known} == pytest.approx(best, abs=1e-9)
    # The labels are what the classifier sees.
    if known and "label_accuracy" not in known:
        other = measured(name, images(60, 1, 0, 90), real, real)
        assert {figure: other[figure] for figure in known} != pytest.approx(best, abs=0.01)


def test_the_page_of_figures_is_that_of_the_docstrings(metrics_page):
    assert metrics_page.PATH.read_text() == metrics_page.page()

    def silent():
        """Tells not enough.

        Figures:
          size: how large | pixels | 0 and above
        """

    with pytest.raises(ValueError, match=r"silent: size needs meaning \| unit \| range \| best"):
        metrics_page.figures(silent)


@pytest.mark.parametrize("name", METRICS)
def test_figures_are_explained_numbers_and_do_not_depend_on_the_order(name, measured, metrics_page):
    samples, real, held_out = images(40, 1), images(60, 0), images(40, 2)
    figures = measured(name, samples, real, held_out)
    component = settings.resolve(metrics, name, evaluation.Metric)
    assert figures.keys() == metrics_page.figures(component).keys()
    assert all(type(value) is float for value in figures.values())
    mixed = np.random.default_rng(0).permutation(40)
    assert measured(name, samples[mixed], real, held_out) == pytest.approx(figures, rel=1e-9)
    # Singular covariances, and neighbours at distance 0.
    for copies in (samples[:1].repeat(40, 0), real[:2].repeat(20, 0)):
        assert all(np.isfinite(value) for value in measured(name, copies, real).values())


@pytest.mark.parametrize("name", METRICS)
def test_too_few_samples_are_an_error_that_says_so_or_have_no_figure(name, measured):
    try:
        figures = measured(name, images(1, 1), images(60, 0), images(60, 2))
    except ValueError as error:
        assert "at least" in str(error) and "give" in str(error)
    else:
        assert all(np.isfinite(value) for value in figures.values())


@pytest.mark.parametrize("name", METRICS)
def test_floors_are_figures(name, measured, every_metric):
    figures = measured(name, images(40, 1), images(60, 0), images(40, 2))
    assert every_metric[name].floors <= figures.keys()
