"""The optax transformation: values, errors, devices, chains and checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ant_jax import mtl
from ant_jax.runtime import checkpoint

METHODS = {
    "linear": mtl.linear,
    "uncertainty": mtl.uncertainty,
    "pcgrad": mtl.pcgrad,
    "nash": mtl.nash,
}
K = 3


def _stacked(rng, k=K):
    return {
        "kernel": rng.normal(size=(k, 4, 5)).astype(np.float32),
        "bias": [rng.normal(size=(k, 5)).astype(np.float32), np.float32(rng.normal(size=k))],
    }


LOSSES = jnp.float32([0.5, 2, 4])
SOME = jnp.array([3, 0, 1])


def _recorder(needs):
    """A weighting whose state is what it was given and how often, and whose weights use it all."""

    def weigh(stats, state):
        weights = stats.losses * stats.present
        if "gram" in needs:
            weights += jnp.diag(stats.gram)
        return weights, (stats.losses, stats.counts, state[2] + 1)

    state = (jnp.zeros(K), jnp.zeros(K, int), jnp.int32(0))
    return mtl.Weighting(lambda: state, weigh, K, frozenset(needs))


@pytest.mark.parametrize("counts", [None, SOME], ids=["all", "some"])
@pytest.mark.parametrize("needs", [("losses", "gram"), ("losses",)])
def test_update_is_the_weighted_sum_and_the_state_says_what_was_used(needs, counts):
    tx = mtl.combine(_recorder(needs))
    stacked = _stacked(np.random.default_rng(0))
    params = jax.tree.map(lambda leaf: leaf[0], stacked)
    start = tx.init(params)
    assert isinstance(start, mtl.CombineState)
    assert not any(leaf.any() for leaf in jax.tree.leaves(start))

    @jax.jit
    def update(stacked, state):
        return tx.update(stacked, state, params, losses=LOSSES, counts=counts, unknown=1)

    _, state = update(stacked, start)
    updates, state = update(stacked, state)

    counts = np.ones(K) if counts is None else np.asarray(counts)
    jax.tree.map(np.testing.assert_array_equal, state.weighting_state, (LOSSES, counts, 2))
    weights = np.float64(LOSSES * (counts > 0))
    if "gram" in needs:
        flat = np.concatenate([leaf.reshape(K, -1) for leaf in jax.tree.leaves(stacked)], 1)
        np.testing.assert_allclose(state.gram, flat @ flat.T, rtol=1e-5, atol=1e-5)
        weights += (flat**2).sum(1)
    else:
        assert state.gram is None
    np.testing.assert_allclose(state.weights, weights, rtol=1e-5)
    jax.tree.map(
        lambda update, leaf: np.testing.assert_allclose(
            update, np.tensordot(weights, leaf, 1), rtol=1e-4, atol=1e-4
        ),
        updates,
        stacked,
    )


def test_low_precision_gradients_are_summed_in_float32():
    stacked = jnp.array([[1.9921875, 256], [1.9921875, 1], [2, 1]], jnp.bfloat16)
    tx = mtl.combine(mtl.linear(3))
    updates, _ = tx.update(stacked, tx.init(None))
    # With 1/3 in bfloat16 the first were 2; added up in bfloat16, 256 + 1 + 1 is 256.
    expected = jnp.array([1.9947917, 86], jnp.bfloat16)
    assert updates.dtype == jnp.bfloat16
    np.testing.assert_array_equal(updates, expected)


def test_missing_losses_are_an_error_where_they_are_needed():
    stacked = _stacked(np.random.default_rng(0))
    for name, method in METHODS.items():
        tx = mtl.combine(method(K))
        if name == "uncertainty":
            with pytest.raises(ValueError, match="losses"):
                tx.update(stacked, tx.init(None))
        else:
            jax.eval_shape(tx.update, stacked, tx.init(None))


def test_weights_of_a_wrong_shape_are_an_error_that_names_the_method():
    wrong = mtl.linear(K)._replace(weigh=lambda stats, state: (stats.counts[1:], state))
    stacked, tx = _stacked(np.random.default_rng(0)), mtl.combine(wrong)
    words = rf"test_weights_of_a_wrong_shape\w* must return .* = \({K},\) .*, got .* \({K - 1},\)"
    with pytest.raises(mtl.WeighError, match=words):
        tx.update(stacked, tx.init(None))


@pytest.mark.parametrize("make", [lambda k: mtl.combine(mtl.nash(k)), mtl.moco])
@pytest.mark.parametrize("name", ["losses", "counts"])
def test_losses_and_counts_of_a_wrong_shape_are_an_error(name, make):
    tx = make(K)
    with pytest.raises(ValueError, match=rf"{name} must have shape \(3,\), got \(4,\)"):
        tx.update(jnp.ones((K, 2)), tx.init(jnp.ones(2)), **{name: jnp.ones(4)})


def test_shared_of_another_structure_is_an_error_that_says_what_it_must_be():
    tx = mtl.combine(mtl.nash(K), shared={"trunk": True})
    stacked = {"trunk": jnp.ones((K, 2)), "heads": jnp.ones((K, 2))}
    with pytest.raises(ValueError, match="shared must be a pytree of bools") as error:
        tx.update(stacked, tx.init(None))
    assert "heads" in str(error.value.__cause__)


@pytest.mark.parametrize("shape", [(4, 5), (1, 3), ()])
def test_wrong_leading_axis_is_an_error_that_names_the_leaf(shape):
    tx = mtl.combine(mtl.linear(K))
    stacked = {"good": jnp.ones((K, 2)), "bad": {"kernel": jnp.ones(shape)}}
    with pytest.raises(ValueError, match=r"\['bad'\]\['kernel'\].*k = 3"):
        tx.update(stacked, tx.init(None))


@pytest.mark.parametrize("name", ["uncertainty", "nash"])
def test_four_devices_give_the_update_of_one(name):
    """Each device holds a contribution; only their sum is the gradient."""
    devices = 4
    stacked = _stacked(np.random.default_rng(0))
    noise = _stacked(np.random.default_rng(1), devices * K)

    def split(leaf, noise):
        parts = noise.reshape(devices, *leaf.shape)
        return parts - parts.mean(0) + leaf / devices

    parts = jax.tree.map(split, stacked, noise)
    single, mapped = mtl.combine(METHODS[name](K)), mtl.combine(METHODS[name](K), "batch")
    state = single.init(None)

    def on(tx):
        return lambda stacked: tx.update(stacked, state, losses=LOSSES, counts=SOME)

    expected = jax.jit(on(single))(stacked)
    # out_axes=0 shows every replica.
    found = jax.device_get(jax.pmap(on(mapped), "batch", devices=jax.devices()[:devices])(parts))
    for replicas, leaf in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert replicas.shape == (devices, *leaf.shape)
        np.testing.assert_array_equal(replicas, np.broadcast_to(replicas[0], replicas.shape))
        np.testing.assert_allclose(replicas[0], leaf, rtol=1e-4, atol=1e-5)


def _least_squares(seed=0):
    """Losses of two regressions that share their parameters and disagree, one 100 times larger."""
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(2, 16, 6)).astype(np.float32)
    targets = np.einsum("knd,kd->kn", inputs, rng.normal(size=(2, 6))).astype(np.float32)
    scales = np.float32([1, 100])

    def losses(params):
        predictions = inputs @ params["kernel"] + params["bias"]
        return scales * ((predictions - targets) ** 2).mean(1)

    return losses


@pytest.mark.parametrize("name", ["uncertainty", "pcgrad", "nash"])
def test_trains_in_a_chain_with_adamw_and_resumes_from_a_checkpoint(name, tmp_path):
    task_losses = _least_squares()
    tx = optax.chain(mtl.combine(METHODS[name](2)), optax.adamw(0.05))
    params = {"kernel": jnp.zeros(6), "bias": jnp.zeros(())}

    @jax.jit
    def train(params, state):
        def step(_, carry):
            params, state = carry
            updates, state = tx.update(
                jax.jacrev(task_losses)(params), state, params, losses=task_losses(params)
            )
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, 20, step, (params, state))

    template = (params, tx.init(params))
    middle = train(*template)
    expected = train(*middle)
    saver = checkpoint.Checkpointer(tmp_path)
    saver.save(20, middle)
    saver.close()
    step, restored = checkpoint.restore(tmp_path, template)
    assert step == 20
    jax.tree.map(np.testing.assert_array_equal, restored, middle)
    jax.tree.map(np.testing.assert_array_equal, train(*restored), expected)

    before, after = task_losses(params), task_losses(expected[0])
    if name == "nash":  # the others follow the larger loss
        assert (after < before).all()
    assert after.sum() < before.sum()


def _memory(k):
    """A stranger's method: its state is an average of all that it has seen."""

    def weigh(stats, state):
        state = state * 0.9 + 0.1 * (stats.losses + stats.gram.sum(1))
        return stats.present / (1 + jnp.abs(state)), state

    return mtl.Weighting(lambda: jnp.zeros(k), weigh, k, frozenset({"losses", "gram"}))


@pytest.fixture(scope="module", params=METHODS | {"nash, wrapped": None, "memory": None})
def guarded(request):
    """A chain as the docstring has it, as (state, params, gradients, losses) -> (state, params)."""
    wrapped = lambda k: mtl.cr_mogm(mtl.clipped(mtl.every(mtl.nash(k), 2), 1.0), 0.9)
    others = {"nash, wrapped": wrapped, "memory": _memory}
    weighting = (METHODS | others)[request.param](K)
    tx = optax.chain(mtl.combine(weighting), optax.apply_if_finite(optax.adam(0.1), 10))

    @jax.jit
    def step(state, params, stacked, losses):
        updates, state = tx.update(stacked, state, params, losses=losses)
        return state, optax.apply_updates(params, updates)

    return tx, step


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["a loss", "losses", "a gradient", "gradients", "all"])
def test_a_batch_that_is_not_finite_leaves_no_trace(guarded, where, value):
    tx, step = guarded
    rng = np.random.default_rng(0)
    good, later = _stacked(rng), _stacked(rng)
    bad, losses = jax.tree.map(np.copy, later), np.array(LOSSES)
    which = 1 if where.startswith("a ") else slice(None)
    if "loss" in where or where == "all":
        losses[which] = value
    if "gradient" in where or where == "all":
        bad["kernel"][which, 2, 3] = value
    params = jax.tree.map(lambda leaf: leaf[0], good)
    state, params = step(tx.init(params), params, good, LOSSES)

    after, same = step(state, params, bad, losses)
    jax.tree.map(np.testing.assert_array_equal, same, params)
    assert int(after[1].notfinite_count) == 1
    jax.tree.map(np.testing.assert_array_equal, after[0].weighting_state, state[0].weighting_state)
    expected, result = step(state, params, later, LOSSES), step(after, same, later, LOSSES)
    jax.tree.map(
        np.testing.assert_array_equal, (result[0][0], result[1]), (expected[0][0], expected[1])
    )


def test_a_gram_matrix_that_overflows_leaves_no_trace_either():
    """The gradients, weights and update are finite."""
    count = mtl.Weighting(
        lambda: jnp.int32(0),
        lambda stats, count: (jnp.full(2, 0.5), count + 1),
        2,
        frozenset({"gram"}),
    )
    tx = mtl.combine(count)
    state = tx.init(None)
    for size, calls in ((1.0, 1), (1e20, 1), (1.0, 2)):
        update, state = tx.update(jnp.full((2, 3), size), state)
        assert np.isfinite(update).all() and state.weighting_state == calls
