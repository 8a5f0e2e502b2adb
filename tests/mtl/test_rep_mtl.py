"""Rep-MTL against the formulas of the paper, written out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inspection import largest_array, run_example

from ant_jax import mtl
from ant_jax.mtl.rep_mtl import cross_task_alignment, task_entropy

TAU = 0.3


def numpy_terms(saliencies, task=None):
    """Eq. 4 to 9 in float64, with all matrices of (C, C)."""
    k, examples, *_, channels = saliencies.shape
    size = np.abs(saliencies.mean(-1)).reshape(k, -1)
    shares = size / size.sum(0)
    entropy = np.mean(-np.sum(shares * np.log(shares), 0))

    each = saliencies.reshape(k, examples, -1, channels)
    unit = lambda matrix: matrix.ravel() / np.linalg.norm(matrix)
    anchors = []
    for b in range(examples):
        mean = each[:, b].mean(1).T
        anchors.append(unit(mean @ mean.T))
    total = 0.0
    for b in range(examples):
        others = sum(np.exp(anchors[b] @ anchors[c] / TAU) for c in range(examples) if c != b)
        for i in range(k) if task is None else [task]:
            own = np.exp(anchors[b] @ unit(each[i, b].T @ each[i, b]) / TAU)
            total -= np.log(own / others)
    return entropy, total / (examples * (k if task is None else 1))


def random_saliencies(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


@jax.jit
def terms(saliencies):
    """The entropy, the alignment, and the gradient of their sum."""
    both = lambda s: (task_entropy(s), cross_task_alignment(s, TAU))
    values, pullback = jax.vjp(both, saliencies)
    (gradient,) = pullback((jnp.float32(1), jnp.float32(1)))
    return jnp.stack(values), gradient


def found_for(saliencies):
    return jax.tree.map(np.asarray, terms(jnp.asarray(saliencies, jnp.float32)))


# Without positions, fewer positions than channels, and more.
@pytest.mark.parametrize("shape", [(3, 4, 6), (2, 3, 2, 7), (3, 4, 3, 3, 2)], ids=str)
def test_terms_are_those_of_the_formulas(shape):
    saliencies = random_saliencies(*shape)
    values, _ = found_for(saliencies)
    np.testing.assert_allclose(values, numpy_terms(saliencies), rtol=1e-5, atol=1e-5)


def test_the_alignment_of_one_task():
    saliencies = random_saliencies(3, 4, 6)
    of_task = jax.jit(lambda s: jnp.stack([cross_task_alignment(s, TAU, i) for i in range(3)]))
    found = of_task(jnp.asarray(saliencies, jnp.float32))
    want = [numpy_terms(saliencies, i)[1] for i in range(3)]
    np.testing.assert_allclose(found, want, rtol=1e-5)
    np.testing.assert_allclose(found.mean(), found_for(saliencies)[0][1], rtol=1e-5)


def test_closed_forms():
    """Two examples whose saliencies are orthogonal, each the same for all tasks."""
    (entropy, alignment), _ = found_for([np.eye(2, 3)] * 4)
    np.testing.assert_allclose(entropy, np.log(4), rtol=1e-6)
    np.testing.assert_allclose(alignment, -1 / TAU, rtol=1e-6)


def heads(params, z, numpy):
    """Task losses of two heads on features of (B, N, C), in NumPy or JAX."""
    out = numpy.tanh(z @ params["heads"])
    return numpy.stack([(out[..., 0] ** 2).mean(), ((out[..., 1] - 1) ** 2).sum() / 7])


def small_network():
    rng = np.random.default_rng(0)
    params = {"trunk": rng.normal(size=(2, 3)), "heads": rng.normal(size=(3, 2))}
    return params, rng.normal(size=(3, 4, 2))


def test_saliencies_are_the_derivatives_by_the_features():
    """The whole function against finite differences of the losses and the formulas."""
    params, x = small_network()
    z = np.tanh(x @ params["trunk"])
    step = 1e-6
    saliencies = np.zeros((2, *z.shape))
    for index in np.ndindex(z.shape):
        ahead, back = z.copy(), z.copy()
        ahead[index] += step
        back[index] -= step
        saliencies[:, *index] = (heads(params, ahead, np) - heads(params, back, np)) / (2 * step)
    entropy, alignment = numpy_terms(saliencies)
    with jax.enable_x64(True):
        whole = lambda z: mtl.rep_mtl(lambda z: heads(params, z, jnp), z, 0.7, 1.5, TAU)
        found = jax.jit(whole)(jnp.asarray(z))
    np.testing.assert_allclose(found.losses, heads(params, z, np), rtol=1e-10)
    np.testing.assert_allclose(found.entropy, entropy, rtol=1e-6)
    np.testing.assert_allclose(found.alignment, alignment, rtol=1e-6)
    total = heads(params, z, np).sum() + 0.7 * entropy + 1.5 * alignment
    np.testing.assert_allclose(found.total, total, rtol=1e-6)


def test_the_gradients_are_those_of_finite_differences():
    with jax.enable_x64(True):
        params, x = small_network()
        flat, unflatten = jax.flatten_util.ravel_pytree(params)

        def values(flat):
            params = unflatten(flat)
            z = jnp.tanh(x @ params["trunk"])
            found = mtl.rep_mtl(lambda z: heads(params, z, jnp), z, 0.7, 1.5, TAU)
            return jnp.stack([found.entropy, found.alignment, found.total])

        difference = lambda d: (values(flat + d) - values(flat - d)) / 2e-5
        differences = jax.jit(jax.vmap(difference))(1e-5 * jnp.eye(flat.size)).T
        gradients = np.asarray(jax.jit(jax.jacrev(values))(flat))
        np.testing.assert_allclose(gradients, differences, rtol=1e-5, atol=1e-8)
        assert np.abs(gradients).min() > 1e-4


def test_invariances():
    saliencies = random_saliencies(3, 4, 5, 6)
    want, _ = found_for(saliencies)
    close = lambda found, want: np.testing.assert_allclose(found, want, rtol=1e-4)
    close(found_for(saliencies[[2, 0, 1]])[0], want)
    close(found_for(saliencies[:, [3, 1, 0, 2]])[0], want)
    close(found_for(saliencies[:, :, ::-1])[0], want)
    close(found_for(saliencies[..., ::-1])[0], want)
    rotation = np.linalg.qr(random_saliencies(6, 6, seed=1))[0]
    close(found_for(saliencies @ rotation)[0][1], want[1])
    # Each example has a scale of its own.
    scales = 10.0 ** np.arange(-9, 3, 3)[:, None, None]
    close(found_for(saliencies * scales)[0], want)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_tiny_and_huge_saliencies(scale):
    """In float32 their squares are 0 or infinite."""
    saliencies = random_saliencies(3, 4, 5, 6)
    values, gradient = found_for(saliencies)
    scaled_values, scaled_gradient = found_for(saliencies * scale)
    np.testing.assert_allclose(scaled_values, values, rtol=1e-5)
    np.testing.assert_allclose(scaled_gradient * np.float64(scale), gradient, rtol=1e-3, atol=1e-6)


def test_one_task():
    """All shares are 1. Where only one example has a saliency, the other cosines are 0."""
    saliencies = random_saliencies(1, 4, 3)
    saliencies[:, 1:] = 0
    (entropy, alignment), gradient = found_for(saliencies)
    assert entropy == 0
    np.testing.assert_allclose(alignment, np.log(3) - 1 / TAU / 4, rtol=1e-5)
    np.testing.assert_allclose(gradient, 0, atol=1e-5)


ZEROS = {
    "one task": np.s_[0],
    "one example": np.s_[:, 0],
    "one position": np.s_[:, :, 0],
    "all but one": np.s_[1:, 1:, 1:],
    "all": np.s_[:],
}


@pytest.mark.parametrize("case", ZEROS)
def test_saliencies_of_zero(case):
    saliencies = random_saliencies(3, 4, 5, 6)
    saliencies[ZEROS[case]] = 0
    values, gradient = found_for(saliencies)
    assert np.isfinite(values).all() and np.isfinite(gradient).all()


def test_tasks_with_examples_of_their_own_have_no_entropy():
    """As noise levels have."""
    saliencies = random_saliencies(2, 4, 5)
    saliencies[0, 2:] = saliencies[1, :2] = 0
    entropy, gradient = jax.jit(jax.value_and_grad(task_entropy))(jnp.float32(saliencies))
    assert entropy == 0 and not np.any(gradient)


@pytest.mark.parametrize("axis", [1, 2])
def test_means_that_are_rounding_errors_count_as_zero(axis):
    """By a normalisation, the channels of a saliency add up to 0, or the positions do."""
    rng = np.random.default_rng(0)
    z = jnp.asarray(rng.normal(size=(3, 4, 64)), jnp.float32)
    weights = jnp.asarray(rng.normal(size=(64, 2)), jnp.float32)

    def saliency_terms(z):
        normal = lambda z: (z - z.mean(axis, keepdims=True)) / z.std(axis, keepdims=True)
        found = mtl.rep_mtl(lambda z: jnp.mean((normal(z) @ weights - 1) ** 2, (0, 1)), z)
        return (found.entropy, found.alignment)[axis == 1]

    value, gradient = jax.jit(jax.value_and_grad(saliency_terms))(z)
    # Without channels no entropy, without anchors cosines of 0 with the 2 other examples.
    np.testing.assert_allclose(value, np.log(2) if axis == 1 else 0, rtol=1e-6)
    np.testing.assert_array_equal(gradient, 0)


def test_the_alignment_needs_two_examples():
    with pytest.raises(ValueError, match="2 or more, got 1"):
        cross_task_alignment(jnp.ones((2, 1, 3, 2)), TAU)


def test_many_channels_need_no_matrix_of_channels():
    saliencies = jnp.ones((2, 3, 4, 128))
    gradient = jax.grad(lambda s: cross_task_alignment(s, TAU))
    assert largest_array(gradient, saliencies) < 128 * 128


def test_the_example_of_the_docstring_runs():
    (gradient,) = run_example(mtl.rep_mtl, "gradient")
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert np.any(gradient["trunk"])
