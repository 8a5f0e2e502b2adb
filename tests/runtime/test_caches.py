"""The caches are optional: without one, everything is computed again."""

import contextlib
import os
import resource

import jax
import numpy as np
import pytest
from absl import logging

from ant_jax import data, evaluation
from ant_jax.evaluation.features import digits
from ant_jax.evaluation.metrics.frechet import frechet
from ant_jax.runtime import compilation_cache, files


def no_home(monkeypatch, place):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    # A user without an entry in /etc/passwd, as in many containers.
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 3)


def a_file_in_its_place(monkeypatch, place):
    (place / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "file"))


def a_full_disk(monkeypatch, place):
    monkeypatch.setenv("XDG_CACHE_HOME", str(place))
    # Folders and files can be created, but nothing can be written into files.
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))


@pytest.fixture(params=[no_home, a_file_in_its_place, a_full_disk])
def keeping_nothing(request, monkeypatch, tmp_path):
    """A context in which nothing can be cached; one line says so."""

    @contextlib.contextmanager
    def context():
        warnings = []
        note = lambda text, *values: warnings.append(text % values)
        monkeypatch.setattr(logging, "warning", note)
        files._user_cache.cache_clear()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        request.param(monkeypatch, tmp_path)
        try:
            yield
        finally:
            # Before pytest writes its report, which may go to a file.
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        (line,) = warnings
        assert "for the next start" in line and "\n" not in line
        assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size]

    return context


def test_programs_are_compiled_without_a_cache(keeping_nothing, monkeypatch):
    settings = {"jax_compilation_cache_dir": ""}
    monkeypatch.setattr(compilation_cache, "_cpu", lambda: "CPU")
    monkeypatch.setattr(jax.config, "update", settings.__setitem__)
    monkeypatch.setattr(type(jax.config), "jax_compilation_cache_dir", "", raising=False)
    with keeping_nothing():
        compilation_cache.enable()
    folder = settings["jax_compilation_cache_dir"]
    never = settings.get("jax_persistent_cache_min_compile_time_secs") == float("inf")
    assert not folder or (os.path.isdir(folder) and never)


def test_digits_are_judged_without_a_cache(keeping_nothing, monkeypatch):
    classifier = digits.DigitsClassifier((np.eye(3),) * 3, (np.zeros(3),) * 3)
    monkeypatch.setattr(digits, "_train", lambda: classifier)
    with keeping_nothing():
        assert digits.load_classifier() is classifier


def test_data_are_a_reference_without_a_cache(keeping_nothing):
    outputs = lambda batches: ({"features": np.float64(x.reshape(len(x), -1))} for x in batches)
    network = evaluation.Network(outputs, "digest")
    extractor = evaluation.Extractor({"features": (64,)}, None, lambda: network)
    evaluator = evaluation.build_evaluator(extractor, [frechet()])
    source = data.digits("test")
    with keeping_nothing():
        found = evaluation.data_reference(evaluator, evaluation.Images("data", source, key={}))
    np.testing.assert_allclose(
        found.summary.gaussians["features"].mean, source.images.reshape(300, 64).mean(0)
    )
