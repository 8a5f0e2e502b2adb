"""With 64 bits enabled too, losses, weights and states are float32, whatever the gradients are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from every_method import AGGREGATORS, FOLDER, HALVES

from ant_jax import mtl
from ant_jax.mtl.famo import exact_update

K = 3


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
@pytest.mark.parametrize("dtype", ["float32", "float64"])
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


def test_the_exact_update_of_famo_keeps_its_types():
    with jax.enable_x64(True):
        state, losses = mtl.famo(K).init(), jnp.ones(K, "float64")
        after = jax.eval_shape(exact_update, state, losses, losses, losses > 0)
        assert types(after) == types(state)
