"""Interval costs against plain loops, the programme against every partition."""

import itertools
import subprocess
import sys
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ant_jax.tasks import clustering


def _distances(kind, n, rng):
    """The (centre, timestep) distances of each cost, and the costs under test."""
    t = np.arange(n)
    if kind == "timestep":
        return abs(t[:, None] - t), clustering.timestep_costs(n)
    if kind == "snr":
        log_snr = -np.sort(rng.normal(size=n))
        return abs(log_snr[:, None] - log_snr), clustering.snr_costs(log_snr)
    if kind == "snr not monotone":
        log_snr = rng.normal(size=n)
        return abs(log_snr[:, None] - log_snr), clustering.snr_costs(log_snr)
    affinity = rng.uniform(-1, 1, size=(n, n))
    return -affinity, clustering.gradient_costs(affinity)


KINDS = ("timestep", "snr", "snr not monotone", "gradient")


def _total(costs, boundaries):
    return sum(costs[start, end - 1] for start, end in itertools.pairwise(boundaries))


def _least_by_enumeration(costs, k):
    n = len(costs)
    inner = itertools.combinations(range(1, n), k - 1)
    return min(_total(costs, (0, *b, n)) for b in inner)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", [1, 2, 3, 8, 13])
def test_costs_equal_the_plain_sum(kind, n):
    distances, costs = _distances(kind, n, np.random.default_rng(n))
    expected = np.full((n, n), np.inf)
    for left in range(n):
        for right in range(left, n):
            centre = (left + right + 1) // 2
            expected[left, right] = sum(distances[centre, t] for t in range(left, right + 1))
    assert costs.dtype == np.float64
    np.testing.assert_allclose(costs, expected, rtol=1e-13, atol=1e-14)


def test_snr_costs_keep_precision_beside_an_extreme_value():
    log_snr = np.concatenate([[1e16], np.linspace(1, -1, 21)])
    costs = clustering.snr_costs(log_snr)
    np.testing.assert_allclose(costs[1:, 1:], clustering.snr_costs(log_snr[1:]), rtol=1e-14)


@pytest.mark.parametrize("kind", [*KINDS, "random"])
@pytest.mark.parametrize("n", [1, 2, 5, 9])
def test_programme_equals_enumeration(kind, n):
    rng = np.random.default_rng(n)
    for _ in range(3):
        costs = rng.normal(size=(n, n)) if kind == "random" else _distances(kind, n, rng)[1]
        for k in range(1, n + 1):
            boundaries = clustering.interval_clusters(costs, k)
            assert boundaries.shape == (k + 1,)
            assert np.issubdtype(boundaries.dtype, np.integer)
            assert boundaries[0] == 0
            assert boundaries[-1] == n
            assert (np.diff(boundaries) > 0).all()
            least = _least_by_enumeration(costs, k)
            assert _total(costs, boundaries) == pytest.approx(least, rel=1e-12)


def test_programme_over_more_rows_than_it_looks_at_together():
    n, k = 600, 4
    rng = np.random.default_rng(0)
    costs = np.triu(rng.uniform(size=(n, n)) * np.arange(n) ** 0.5)
    upper = np.where(np.tri(n, k=-1, dtype=bool), np.inf, costs)
    least = upper[0]
    for _ in range(k - 1):
        least = np.append(np.inf, (least[:-1, None] + upper[1:]).min(0)[1:])
    boundaries = clustering.interval_clusters(costs, k)
    np.testing.assert_allclose(_total(costs, boundaries), least[-1], rtol=1e-14)
    costs[450, 500] = np.nan
    with pytest.raises(ValueError, match="must be finite"):
        clustering.interval_clusters(costs, k)


def test_memory_is_that_of_one_matrix():
    n = 4000
    log_snr = -(np.linspace(-1, 1, n) ** 3)
    tracemalloc.start()
    costs = clustering.snr_costs(log_snr)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()
    clustering.interval_clusters(costs, 5)
    _, after = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.05 * costs.nbytes
    assert after - before < 0.2 * costs.nbytes


@pytest.mark.parametrize(
    "costs",
    [clustering.timestep_costs, lambda n: clustering.snr_costs(np.arange(n, dtype=float))],
    ids=["timestep", "snr"],
)
def test_too_many_timesteps_are_an_error_before_memory_is_taken(costs):
    with pytest.raises(ValueError, match=r"200000 timesteps would take 320 GB: .* at most 10000"):
        costs(200_000)


def test_entries_below_the_diagonal_are_ignored():
    costs = np.random.default_rng(0).normal(size=(7, 7))
    filled = np.where(np.tri(7, k=-1), -1e6, costs)
    for k in range(1, 8):
        np.testing.assert_array_equal(
            clustering.interval_clusters(filled, k), clustering.interval_clusters(costs, k)
        )


def test_ties_are_broken_towards_early_boundaries():
    costs = np.zeros((6, 6))
    np.testing.assert_array_equal(clustering.interval_clusters(costs, 3), [0, 1, 2, 6])
    # Equal values of log-SNR make every partition as good.
    costs = clustering.snr_costs(np.full(6, 3.0))
    np.testing.assert_array_equal(clustering.interval_clusters(costs, 4), [0, 1, 2, 3, 6])


def test_programme_leaves_its_input_alone():
    costs = np.zeros((4, 4))
    clustering.interval_clusters(costs, 3)
    assert (costs == 0).all()


@pytest.mark.parametrize("k", [1, 2, 5, 8])
def test_optimum_is_never_above_uniform_clusters(k):
    n = 200
    phase = (np.arange(n) + 1) / (n + 1) * np.pi / 2
    log_snr = 2 * np.log(np.cos(phase) / np.sin(phase))
    affinity = np.exp(-abs(log_snr[:, None] - log_snr))
    uniform = clustering.uniform_boundaries(n, k)
    for costs in (clustering.snr_costs(log_snr), clustering.gradient_costs(affinity)):
        best = _total(costs, clustering.interval_clusters(costs, k))
        if k == 1:
            assert best == _total(costs, uniform)
        else:
            assert best < _total(costs, uniform)


@pytest.mark.parametrize("n, k", [(1000, 5), (1000, 7), (1000, 8), (127, 10), (12, 12), (11, 7)])
def test_uniform_clusters_are_optimal_in_timesteps(n, k):
    costs = clustering.timestep_costs(n)
    uniform = clustering.uniform_boundaries(n, k)
    assert np.ptp(np.diff(uniform)) == (n % k > 0)
    assert _total(costs, uniform) == _total(costs, clustering.interval_clusters(costs, k))


def test_uniform_boundaries():
    np.testing.assert_array_equal(
        clustering.uniform_boundaries(1000, 5), [0, 200, 400, 600, 800, 1000]
    )
    np.testing.assert_array_equal(clustering.uniform_boundaries(7, 3), [0, 2, 4, 7])


BOUNDARIES = np.array([0, 3, 4, 10])
T = np.array([0, 2, 3, 4, 9])
CLUSTERS = np.array([0, 0, 1, 2, 2])


def test_assign_clusters_of_numpy():
    clusters = clustering.assign_clusters(T, BOUNDARIES)
    assert isinstance(clusters, np.ndarray)
    assert np.issubdtype(clusters.dtype, np.integer)
    np.testing.assert_array_equal(clusters, CLUSTERS)
    np.testing.assert_array_equal(
        clustering.assign_clusters(np.arange(10), BOUNDARIES),
        np.repeat(np.arange(3), np.diff(BOUNDARIES)),
    )
    outside = clustering.assign_clusters(np.array([-1, 10]), BOUNDARIES)
    np.testing.assert_array_equal(outside, [0, 2])
    two_dimensional = clustering.assign_clusters(T.reshape(5, 1), BOUNDARIES)
    np.testing.assert_array_equal(two_dimensional, CLUSTERS.reshape(5, 1))
    np.testing.assert_array_equal(clustering.assign_clusters(T, np.array([0, 10])), np.zeros(5))


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_assign_clusters_of_jax(kind):
    boundaries = kind(BOUNDARIES)
    eager = clustering.assign_clusters(jnp.asarray(T), boundaries)
    compiled = jax.jit(lambda t: clustering.assign_clusters(t, boundaries))(T)
    for clusters in (eager, compiled):
        assert isinstance(clusters, jax.Array)
        assert jnp.issubdtype(clusters.dtype, jnp.integer)
        np.testing.assert_array_equal(clusters, CLUSTERS)


@pytest.mark.parametrize("k", [0, -1, 6, 2.0, True, None])
def test_bad_k(k):
    with pytest.raises(ValueError, match="k must be"):
        clustering.interval_clusters(np.zeros((5, 5)), k)
    with pytest.raises(ValueError, match="k must be"):
        clustering.uniform_boundaries(5, k)


@pytest.mark.parametrize("num_timesteps", [0, -1, 5.0, True])
def test_bad_num_timesteps(num_timesteps):
    with pytest.raises(ValueError, match="num_timesteps"):
        clustering.timestep_costs(num_timesteps)
    with pytest.raises(ValueError, match="num_timesteps"):
        clustering.uniform_boundaries(num_timesteps, 1)


def _programme(costs):
    return clustering.interval_clusters(costs, 1)


@pytest.mark.parametrize("function", [clustering.gradient_costs, _programme])
@pytest.mark.parametrize("shape", [(0, 0), (3,), (3, 4), (3, 3, 3)])
def test_bad_shape_of_a_matrix(function, shape):
    with pytest.raises(ValueError, match=r"must have shape \(n, n\)"):
        function(np.zeros(shape))


@pytest.mark.parametrize("function", [clustering.gradient_costs, _programme])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_matrix_that_is_not_finite(function, value):
    matrix = np.zeros((4, 4))
    matrix[1, 2] = value
    with pytest.raises(ValueError, match="must be finite"):
        function(matrix)


@pytest.mark.parametrize(
    "log_snr, match",
    [
        (np.zeros((2, 2)), "shape"),
        (np.zeros(0), "shape"),
        (np.float64(0), "shape"),
        ([0, np.nan], "finite"),
        ([0, -np.inf], "finite"),
    ],
)
def test_bad_log_snr(log_snr, match):
    with pytest.raises(ValueError, match=match):
        clustering.snr_costs(log_snr)


def test_importing_clustering_does_not_import_jax():
    program = "import sys, ant_jax.tasks.clustering; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
