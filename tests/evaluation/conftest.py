import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest

from ant_jax import evaluation, interop, settings
from ant_jax.evaluation import metrics
from ant_jax.evaluation.features import digits

RECORDED = Path(__file__).parents[1] / "data" / "inception"
_spec = importlib.util.spec_from_file_location("record_inception", RECORDED / "record.py")
_record = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_record)


@pytest.fixture(scope="session")
def metrics_page():
    """The module that writes docs/metrics.md."""
    path = Path(__file__).parents[2] / "docs" / "metrics.py"
    spec = importlib.util.spec_from_file_location("metrics_page", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
    """A cache that holds the trained classifier."""
    path = tmp_path_factory.mktemp("cache") / "ant_jax"
    digits.load_classifier(path)
    return path


@pytest.fixture(scope="module")
def users_cache(cache_dir):
    """The user's cache is the one with the trained classifier."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache_dir.parent))
        yield


@pytest.fixture(scope="session")
def recorded():
    """What public implementations of Inception give."""
    with np.load(RECORDED / "inception.npz") as stored:
        return dict(stored)


@pytest.fixture(scope="session")
def inception_weights(recorded, tmp_path_factory):
    """A file of the recorded network's weights."""
    path = tmp_path_factory.mktemp("inception") / "weights.safetensors"
    interop.write_state(
        path,
        {
            str(name): _record.weight(str(name), tuple(map(int, str(shape).split())))
            for name, shape in zip(recorded["names"], recorded["shapes"], strict=True)
        },
    )
    return path


@pytest.fixture(scope="session")
def every_metric():
    """All metrics of the folder, by name."""
    names = settings.names_in(metrics, evaluation.Metric)
    return {name: settings.resolve(metrics, name, evaluation.Metric)() for name in names}


@pytest.fixture(scope="session")
def linear():
    """An extractor of 4 x 4 grey pixels that gives all that the metrics know."""
    weights = np.random.default_rng(0).standard_normal((16, 14)) / 99
    shapes = {"features": (5,), "spatial": (4,), "logits": (5,), "labels": (), "pixels": (4, 4, 1)}

    def outputs(batches):
        for images in batches:
            every = images.reshape(len(images), -1) @ weights
            found = dict(zip(shapes, np.split(every, [5, 9], axis=1), strict=False))
            yield found | {"labels": found["logits"].argmax(1), "pixels": images}

    network = evaluation.Network(outputs, "digest")
    return evaluation.Extractor(shapes, lambda *_: None, lambda: network)


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Others would work on padding in these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
        yield
