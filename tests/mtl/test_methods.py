"""What holds for every method of the folder, and for the wrappers around one."""

import inspect

import gradients as sets
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from every_method import FOLDER

from ant_jax import mtl, settings
from ant_jax.mtl import TaskStats

WRAPPED = {
    "scaled": lambda k: mtl.scaled(mtl.nash(k), jnp.full(k, 3.0)),
    "every": lambda k: mtl.every(mtl.nash(k), 2),
    "clipped": lambda k: mtl.clipped(mtl.uncertainty(k), 0.1),
    "cr_mogm": lambda k: mtl.cr_mogm(mtl.nash(k), 0.9),
}
METHODS = FOLDER | WRAPPED
KS = (1, 5)


@pytest.fixture(scope="module", params=[(name, k) for name in METHODS for k in KS], ids=str)
def method(request):
    """(weighting, jitted weigh, arguments), compiled once for all tests of like shapes."""
    name, k = request.param
    weighting = METHODS[name](k)

    def weigh(losses, gram, counts, state):
        """Gives the method nothing but what it says that it needs."""
        assert weighting.needs <= {"losses", "gram"}
        losses = losses if "losses" in weighting.needs else None
        gram = gram if "gram" in weighting.needs else None
        return weighting.weigh(TaskStats(losses, gram, counts), state)

    return weighting, jax.jit(weigh), inspect.signature(METHODS[name]).parameters


def finite(tree):
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


def hard_grams(k):
    """Gram matrices, (n, k, k), of sets of gradients among which are all that have made trouble."""
    gradients = sets.draw(sets.REGULAR + sets.OPPOSED, k, n=3)
    gram = sets.grams(gradients)
    opposite = np.ones((1, k, 1)) * (-1.0) ** np.arange(k)[:, None]
    gram = np.concatenate([gram, sets.grams(opposite), 0 * gram[:1]])
    return np.concatenate([gram, 1e-20 * gram, 1e20 * gram]).astype(np.float32)


def test_weights_are_finite_on_hard_gram_matrices(method):
    weighting, weigh, _ = method
    k = weighting.k
    state = first = weighting.init()
    for call, gram in enumerate(hard_grams(k)):
        # From the first state, and on.
        state = first if call % 2 == 0 else state
        losses = np.float32([0, 1e-20, 1, 1e3, 1e25])[(np.arange(k) + call) % 5]
        weights, state = weigh(losses, gram, np.ones(k, np.float32), state)
        assert weights.shape == (k,) and weights.dtype == np.float32
        assert finite((weights, state))


def test_state_is_a_pytree_of_arrays_of_constant_structure(method):
    weighting, weigh, _ = method
    k = weighting.k
    before = weighting.init()
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(before))
    _, after = jax.eval_shape(weigh, jnp.ones(k), jnp.eye(k), jnp.ones(k), before)
    look = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    assert look(after) == look(before)


@pytest.mark.parametrize("name", METHODS)
def test_the_first_state_can_be_donated(name):
    """No array is in it twice."""
    state = mtl.init_combine(METHODS[name](5))
    arrays = jax.tree.leaves(state)
    assert len({array.unsafe_buffer_pointer() for array in arrays}) == len(arrays)


def test_absent_tasks_get_weight_zero_and_keep_their_state(method):
    """All but one present, one, none at all; an absent task's loss and row are garbage or 0."""
    weighting, weigh, _ = method
    k = weighting.k
    rng = np.random.default_rng(0)
    state = other = weighting.init()
    for present in rng.permutation(np.tri(k + 1, k, -1, dtype=bool)):
        counts = np.float32(present * rng.integers(1, 5, k))
        losses, gram = _random_stats(rng, k)
        weights, after = weigh(losses, gram, counts, state)
        np.testing.assert_array_equal(np.asarray(weights)[~present], 0)
        assert finite((weights, after))
        for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
            if old.shape[:1] == (k,):
                np.testing.assert_array_equal(np.asarray(new)[~present], np.asarray(old)[~present])
        empty = np.where(present[:, None] & present, gram, 0)
        zeros, other = weigh(np.where(present, losses, 0), empty, counts, other)
        np.testing.assert_allclose(weights, zeros, rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), after, other)
        state = after


def test_relabelling_of_tasks_permutes_the_weights(method):
    """The main task, where a method has one, keeps its label."""
    weighting, weigh, arguments = method
    if "seed" in arguments:
        return
    k = weighting.k
    rng = np.random.default_rng(0)
    main = 1 if "main" in arguments else 0
    relabel = np.concatenate([np.arange(main), main + np.roll(np.arange(k - main), 2)])
    state = other = weighting.init()
    for _ in range(3):
        losses, gram = _random_stats(rng, k)
        counts = np.float32(rng.integers(0, 5, k))
        weights, state = weigh(losses, gram, counts, state)
        relabelled, other = weigh(
            losses[relabel], gram[relabel][:, relabel], counts[relabel], other
        )
        weights = np.asarray(weights)
        # A weight near 0 is the difference of larger ones, and as exact as those.
        rounding = 1e-5 * np.abs(weights).max()
        np.testing.assert_allclose(relabelled, weights[relabel], rtol=1e-4, atol=rounding)


@pytest.mark.parametrize("name", FOLDER)
@pytest.mark.parametrize("k", [0, -1, 2.0, True])
def test_wrong_k_is_an_error(name, k):
    with pytest.raises(ValueError, match="k, the number of tasks"):
        FOLDER[name](k)


@pytest.mark.parametrize("name", FOLDER)
@pytest.mark.parametrize("value", [-5, np.nan])
def test_a_setting_out_of_its_range_is_an_error(name, value):
    for setting in settings.settings_of(FOLDER[name], {"k", "seed"}):
        with pytest.raises(ValueError, match=f"{setting} must be"):
            FOLDER[name](3, **{setting: value})


def test_numbers_of_numpy_and_jax_are_settings_too():
    expected = mtl.cagrad(3, 0.5)
    gram = jnp.eye(3) - 0.2
    for c in (np.float32(0.5), np.float64(0.5), jnp.float32(0.5)):
        found = jax.jit(mtl.cagrad(3, c).weigh)(TaskStats(None, gram, jnp.ones(3)), ())[0]
        want = jax.jit(expected.weigh)(TaskStats(None, gram, jnp.ones(3)), ())[0]
        np.testing.assert_allclose(found, want, rtol=1e-6)


def test_k_may_be_an_integer_of_numpy():
    assert mtl.linear(np.int64(3)).weigh(TaskStats(None, None, jnp.ones(3)), ())[0].shape == (3,)


@pytest.mark.parametrize("name", FOLDER)
def test_settings_have_defaults_that_they_allow_and_the_package_has_the_method(name):
    for setting in settings.settings_of(FOLDER[name], {"k", "seed"}).values():
        assert setting.problem(setting.default) is None
    assert getattr(mtl, name) is FOLDER[name] and name in mtl.__all__


def test_the_folder_has_methods():
    assert {"linear", "nash", "pcgrad", "uncertainty", "vanilla"} <= FOLDER.keys()


def _random_stats(rng, k):
    g = rng.normal(size=(k, 4))
    return np.float32(rng.uniform(0.1, 4 * k, size=k)), np.float32(g @ g.T)
