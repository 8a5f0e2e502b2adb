"""docs/methods.md: every method says what the page needs, and its example runs."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ant_jax import mtl, settings
from ant_jax.mtl.aggregators.halves import OnHalves

_spec = importlib.util.spec_from_file_location(
    "methods_page", Path(__file__).parents[2] / "docs" / "methods.py"
)
methods_page = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(methods_page)


def test_the_page_is_as_the_docstrings_are_now():
    assert methods_page.PATH.read_text() == methods_page.page()


@pytest.mark.parametrize("name", settings.names_in(mtl, mtl.Weighting))
def test_the_example_of_a_docstring_runs(name):
    said = methods_page.description(settings.resolve(mtl, name, mtl.Weighting))
    assert f"mtl.{name}(" in said.example
    scope = {"mtl": mtl, "optax": optax}
    exec(said.example, scope)
    params = jnp.ones(3)
    state = scope["tx"].init(params)
    k = len(state[0].weights)
    stacked = jnp.asarray(np.random.default_rng(0).normal(size=(k, 3)), jnp.float32)
    updates, _ = jax.jit(scope["tx"].update)(stacked, state, params, losses=jnp.ones(k))
    assert updates.shape == (3,) and np.isfinite(updates).all()


@pytest.mark.parametrize("name", mtl.aggregators.__all__)
def test_the_example_of_an_aggregator_runs(name):
    said = methods_page.description(getattr(mtl, name))
    assert f"mtl.{name}(5" in said.example
    scope = {"mtl": mtl, "optax": optax}
    exec(said.example, scope)
    params = jnp.ones(3)
    state = scope["tx"].init(params)
    n = 10 if isinstance(getattr(mtl, name)(5), OnHalves) else 5
    updates, _ = jax.eval_shape(scope["tx"].update, jnp.ones((n, 3)), state, params)
    assert updates.shape == (3,)


def test_a_docstring_that_lacks_a_part_is_named():
    def silent(k):
        """Nothing else."""

    with pytest.raises(ValueError, match="docstring of silent has no formula"):
        methods_page.description(silent)
