import pytest

from ant_jax.evaluation.features import digits


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
    """A cache that holds the trained classifier."""
    path = tmp_path_factory.mktemp("cache")
    digits.load_classifier(path)
    return path
