"""With 64 bits enabled too, losses, weights and states are float32, whatever the gradients are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from every_method import AGGREGATORS, FOLDER, HALVES

from ant_jax import mtl
from ant_jax.mtl.backward import FORMS
from ant_jax.mtl.famo import exact_update

K, B = 3, 12
TASKS = np.arange(B) * K // B
DTYPES = ("bfloat16", "float32", "float64")


def wrapped(weighting):
    inner = mtl.every(mtl.scaled(weighting, np.full(K, 3.0)), 2)
    return mtl.cr_mogm(mtl.clipped(inner, 1.0), 0.9)


METHODS = {name: lambda make=make: mtl.combine(make(K)) for name, make in FOLDER.items()}
METHODS |= {
    f"{name}, wrapped": lambda make=make: mtl.combine(wrapped(make(K)))
    for name, make in FOLDER.items()
}
METHODS |= {name: lambda name=name: getattr(mtl, name)(K) for name in AGGREGATORS}


def types(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), tree)


def assert_float32(tree):
    floats = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert all(leaf.dtype == jnp.float32 for leaf in floats)


# Types are known when a program is traced: nothing is compiled here.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", METHODS)
def test_the_state_keeps_its_types(name, dtype):
    rows = 2 * K if name in HALVES else K
    with jax.enable_x64(True):
        tx = METHODS[name]()
        state = tx.init(jnp.ones(4, dtype))
        assert_float32(state)

        def update(stacked, losses, counts):
            return tx.update(stacked, state, losses=losses, counts=counts)

        arguments = jnp.ones((rows, 4), dtype), jnp.ones(rows, dtype)
        for counts in (None, jnp.ones(rows, int), jnp.ones(rows, dtype)):
            found, after = jax.eval_shape(update, *arguments, counts)
            assert found.dtype == dtype
            assert types(after) == types(state)


def squares(params, part):
    return ((part["x"] * params["w"]) ** 2).sum(1)


def means(params, part):
    return squares(params, part).reshape(K, -1).mean(1)


def assert_backward_keeps_types(weighting, dtype, find):
    """All of what ``find(params, batch, state)`` has found is float32 but the gradient."""
    draw = lambda *shape: jnp.ones(shape, dtype)
    params, batch = {"w": draw(5)}, {"x": draw(B, 5), "levels": draw(B)}
    state = mtl.init_combine(weighting)
    found = jax.eval_shape(find, params, batch, state)
    assert found.gradient["w"].dtype == dtype
    assert_float32(found._replace(gradient=()))
    assert types(found.state.weighting_state) == types(state.weighting_state)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("method", [mtl.uncertainty, mtl.nash])
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_of_tasks(dtype, method, microbatches, form):
    with jax.enable_x64(True):
        weighting = mtl.level_uncertainty(method(K), 0.1)
        settings = {"tasks": TASKS, "microbatches": microbatches, "form": form}

        def find(params, batch, state):
            levels = batch["levels"]
            return mtl.backward(squares, params, batch, weighting, state, levels=levels, **settings)

        assert_backward_keeps_types(weighting, dtype, find)


@pytest.mark.parametrize("method", [mtl.uncertainty, mtl.nash])
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_of_tasks_that_share_all_examples(dtype, method):
    trunk = lambda params, part: part["x"] * params["w"]
    heads = lambda params, z, part: (z * params["w"]).reshape(K, -1).mean(1)
    with jax.enable_x64(True):
        weighting = method(K)
        for microbatches in (1, 2):
            assert_backward_keeps_types(
                weighting,
                dtype,
                lambda *args, n=microbatches: mtl.backward(
                    means, *args[:2], weighting, args[2], microbatches=n
                ),
            )
        assert_backward_keeps_types(
            weighting,
            dtype,
            lambda *args: mtl.backward_at_features(trunk, heads, *args[:2], weighting, args[2]),
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_of_blocks(dtype):
    with jax.enable_x64(True):
        weighting = mtl.pike(mtl.nash(K), 1.0, blocks=2)

        def find(params, batch, state):
            pooled = mtl.pooled(weighting, weighting.blocks.tasks(state.weighting_state))
            blocks = np.arange(B) * pooled.k // B
            return mtl.backward(squares, params, batch, pooled, state, tasks=blocks)

        assert_backward_keeps_types(weighting, dtype, find)


def test_the_exact_update_of_famo_keeps_its_types():
    with jax.enable_x64(True):
        state, losses = mtl.famo(K).init(), jnp.ones(K, "float64")
        after = jax.eval_shape(exact_update, state, losses, losses, losses > 0)
        assert types(after) == types(state)
