import functools
import io
import pickle
import tracemalloc
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ant_jax.diffusion import GaussianDiffusion, alphas_bar
from ant_jax.models.dit import DiT
from ant_jax.tasks import affinity as af
from ant_jax.tasks import clustering
from ant_jax.tasks.affinity import gradients

T = 100
DIFFUSION = GaussianDiffusion(alphas_bar("cosine", T))
TIMESTEPS = np.array([0, 3, 20, 50, 80, 99])
KEY = jax.random.key(7)


def toy(params, x, t, y):
    """A network that is small to compile; x and t count, and y where there is one."""
    features = jnp.concatenate([x.reshape(len(x), -1), jnp.sin(t[:, None] / 20)], 1)
    hidden = features @ params["in"]
    if y is not None:
        hidden += params["labels"][y]
    return (jnp.tanh(hidden) @ params["out"]).reshape(*x.shape[:3], -1)


def toy_params(width=12, channels=1):
    rng = np.random.default_rng(1)
    shapes = {"in": (17, width), "labels": (3, width), "out": (width, 16 * channels)}
    return {n: jnp.asarray(0.4 * rng.normal(size=s), jnp.float32) for n, s in shapes.items()}


def images(m=4, side=4):
    x0 = np.random.default_rng(0).uniform(-1, 1, (m, side, side, 1)).astype(np.float32)
    return x0, np.arange(m) % 3


def reference(apply_fn, params, diffusion, x0, timesteps, y):
    """Cosines by one gradient after the other, in float64 from there."""
    noise = jax.random.normal(jax.random.split(KEY)[0], x0.shape)

    @jax.jit
    def gradient(t):
        def loss(p):
            model = lambda x, t, y: apply_fn(p, x, t, y)
            t_all = jnp.full(len(x0), t)
            return diffusion.losses(model, x0, t_all, noise, y).mean()

        return jax.grad(loss)(params)

    rows = []
    for t in timesteps:
        leaves = [np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(gradient(t))]
        rows.append(np.concatenate(leaves))
    rows = np.stack(rows)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows @ rows.T


def assert_is_affinity(matrix, n):
    assert matrix.shape == (n, n) and matrix.dtype == np.float64
    np.testing.assert_array_equal(matrix, matrix.T)
    np.testing.assert_array_equal(matrix.diagonal(), 1)
    assert np.abs(matrix).max() <= 1


def test_sketched_affinity_of_a_dit():
    model = DiT(width=64, depth=1, heads=2, patch=4, channels=1, num_classes=10)
    zeros = jnp.zeros(1, jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)), zeros, zeros)
    rng = np.random.default_rng(1)
    # Not the initial parameters: at adaLN-Zero most of the gradients vanish.
    draw = lambda leaf: rng.normal(0, 0.15, leaf.shape).astype(np.float32)
    params = jax.tree.map(draw, shapes["params"])
    apply_fn = lambda p, x, t, y: model.apply({"params": p}, x, t, y)
    x0, y = images(side=8)
    exact, sketched = (
        af.task_affinity(apply_fn, params, DIFFUSION, x0, TIMESTEPS, KEY, y=y, sketch_size=size)
        for size in (None, 2**14)
    )
    assert_is_affinity(exact, len(TIMESTEPS))
    assert_is_affinity(sketched, len(TIMESTEPS))
    off_diagonal = exact[~np.eye(len(exact), dtype=bool)]
    assert off_diagonal.min() < 0.2 < 0.5 < off_diagonal.max()
    # A sixth of the parameters, so there are errors; four standard deviations of them.
    assert 1e-3 < np.abs(sketched - exact).max() < 4 / 2**7


@pytest.mark.parametrize("variance, labelled", [("fixed_large", False), ("learned_range", True)])
def test_microbatches_and_learned_variance(variance, labelled):
    # Weighted, so that the two parts of the hybrid loss are mixed by timestep.
    diffusion = GaussianDiffusion(
        DIFFUSION.alphas_bar, variance, loss_weight=np.geomspace(0.01, 10, T)
    )
    params = toy_params(channels=1 + (variance == "learned_range"))
    x0, y = images(6)
    y = y if labelled else None
    want = reference(toy, params, diffusion, x0, TIMESTEPS, y)
    measure = functools.partial(
        af.task_affinity, toy, params, diffusion, x0, TIMESTEPS, KEY, y=y, sketch_size=None
    )
    for microbatch in (2,) if labelled else (2, None):
        got = measure(microbatch=microbatch)
        assert_is_affinity(got, len(TIMESTEPS))
        np.testing.assert_allclose(got, want, atol=2e-5)


@functools.cache
def toy_affinity():
    return af.task_affinity(
        toy, toy_params(), DIFFUSION, images()[0], TIMESTEPS, KEY, sketch_size=None
    )


def test_sketched_affinity_is_exact_where_the_sketch_would_be_larger(monkeypatch):
    monkeypatch.setattr(af, "sketch", None)
    apply_fn = lambda *args: toy(*args)  # not the object of an earlier compilation
    got = af.task_affinity(apply_fn, toy_params(), DIFFUSION, images()[0], TIMESTEPS, KEY)
    np.testing.assert_array_equal(got, toy_affinity())


def test_zero_gradients_and_those_whose_squares_leave_float32():
    silent = lambda p, x, t, y: jnp.where(t[:, None, None, None] < 10, 0, toy(p, x, t, y))
    args = (toy_params(), DIFFUSION, images()[0], TIMESTEPS, KEY)
    got = af.task_affinity(silent, *args)
    assert_is_affinity(got, len(TIMESTEPS))
    np.testing.assert_array_equal(got[:2], np.eye(len(TIMESTEPS))[:2])
    np.testing.assert_allclose(got[2:, 2:], toy_affinity()[2:, 2:], atol=1e-6)

    weight = np.geomspace(1e-30, 1e30, T)
    weighted = GaussianDiffusion(DIFFUSION.alphas_bar, loss_weight=weight)
    got = af.task_affinity(toy, args[0], weighted, *args[2:])
    np.testing.assert_allclose(got, toy_affinity(), atol=1e-5)


def test_gradients_that_are_not_finite_are_named():
    broken = lambda p, x, t, y: toy(p, x, t, y) / (t[:, None, None, None] - 50)
    with pytest.raises(ValueError, match=r"timesteps \[50\] are not finite"):
        af.task_affinity(broken, toy_params(), DIFFUSION, images()[0], TIMESTEPS, KEY)


def test_compiles_once_for_several_checkpoints():
    traces = []

    def apply_fn(*args):
        traces.append(args)
        return toy(*args)

    x0, y = images()
    params = toy_params()
    measure = functools.partial(af.task_affinity, apply_fn, sketch_size=64)
    first = measure(params, DIFFUSION, x0, TIMESTEPS, KEY, y=y)
    assert traces
    traces.clear()
    other = jax.tree.map(lambda leaf: 1.5 * leaf, params)
    results = [
        measure(other, DIFFUSION, x0, TIMESTEPS, KEY, y=y),
        measure(params, DIFFUSION, jnp.asarray(-x0), TIMESTEPS, KEY, y=y),
        measure(params, DIFFUSION, x0, TIMESTEPS, jax.random.key(8), y=y),
        measure(params, DIFFUSION, x0, TIMESTEPS // 2, KEY, y=y),
        measure(params, DIFFUSION, x0, TIMESTEPS, KEY, y=jnp.asarray(2 - y)),
    ]
    assert not traces
    assert all(np.abs(result - first).max() > 1e-3 for result in results)


def test_memory_does_not_hold_all_gradients():
    params = toy_params(width=6000)
    num_params = sum(leaf.size for leaf in params.values())
    size = 512

    def temporary(n, sketch_size):
        program = gradients._gram.lower(
            *(params, images()[0], np.arange(n, dtype=np.int32), KEY, None),
            apply_fn=toy,
            diffusion=GaussianDiffusion(alphas_bar("cosine", 200)),
            sketch_size=sketch_size,
            microbatch=4,
        )
        return program.compile().memory_analysis().temp_size_in_bytes

    small = temporary(20, size)
    assert small < 6 * 4 * num_params
    assert temporary(200, size) - small < 3 * 4 * 180 * size
    assert temporary(200, None) > 4 * 200 * num_params  # what the two bounds are to catch


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"x0": np.zeros((4, 4, 4), np.float32)}, "x0 must be"),
        ({"x0": np.zeros((4, 4, 4, 1), np.uint8)}, "x0 must be floating point"),
        ({"y": np.zeros(2, int)}, r"y must have shape \(4,\)"),
        ({"timesteps": [0, T]}, r"timesteps must be in \[0, 100\)"),
        ({"timesteps": [-1, 0]}, r"timesteps must be in \[0, 100\)"),
        ({"timesteps": [0.0, 1.0]}, "timesteps must be integers"),
        ({"timesteps": []}, "timesteps must be integers"),
        ({"sketch_size": 0}, "sketch_size must be an integer >= 1"),
        ({"microbatch": 3}, "microbatch must divide the 4 images, not be 3"),
        ({"microbatch": 0}, "microbatch must be an integer >= 1"),
    ],
)
def test_impossible_measurements(settings, message):
    settings = {"x0": images()[0], "timesteps": TIMESTEPS, "key": KEY} | settings
    with pytest.raises(ValueError, match=message):
        af.task_affinity(toy, toy_params(), DIFFUSION, **settings)


def test_sketch_keeps_inner_products_within_two_percent_at_the_default_size():
    rng = np.random.default_rng(0)
    # Five chunks, the last of them not whole.
    p, chunk = 600_000, af.SKETCH_SIZE
    draw = lambda: rng.standard_normal(p, np.float32)
    normal = draw()
    leaf = np.repeat(rng.lognormal(sigma=4, size=25), p // 25)
    strided = np.zeros(p)
    strided[5::chunk] = 1
    vectors = {
        "normal": normal,
        "opposed": -3 * normal,
        "near": normal + 0.3 * draw(),
        "leaves": leaf * draw(),
        "leaves of equal sign": leaf * np.abs(draw()),
        "heavy-tailed": draw() / (1e-3 + rng.random(p)),
        "sparse": np.where(rng.random(p) < 1e-3, draw(), 0),
        "constant": np.ones(p),
        "one place of each chunk": strided,
        "the place next to it": np.roll(strided, 1),
        "first half": np.where(np.arange(p) < p // 2, normal, 0),
        "second half": np.where(np.arange(p) < p // 2, 0, normal),
    }
    rows = np.stack([v.astype(np.float32) for v in vectors.values()])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    as_tree = lambda row: {"a": row[:7].reshape(1, 7), "b": [row[7:50_000], row[50_000:]]}
    sketch_all = jax.jit(jax.vmap(lambda row: af.sketch(as_tree(row), chunk, KEY)))
    sketches = np.asarray(sketch_all(rows), np.float64)
    assert sketches.shape == (len(rows), chunk)
    errors = np.abs(sketches @ sketches.T - rows @ rows.T)
    worst = np.unravel_index(errors.argmax(), errors.shape)
    assert errors.max() < 0.02, [list(vectors)[i] for i in worst]
    assert errors.max() > 1e-3


def test_sketch_is_unbiased_with_the_stated_variance():
    d, keys = 16, 40_000
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(2, 3, d))
    a[2, 5:] = b[2, 5:] = 0  # the last chunk is padded
    a[0] *= 3
    b += a / 2
    p = 2 * d + 5
    sketch = jax.vmap(lambda v, key: af.sketch(v.ravel()[:p], d, key), (None, 0))
    split = jax.random.split(KEY, keys)
    sketches = [np.asarray(sketch(jnp.asarray(v), split), np.float64) for v in (a, b)]
    products = np.sum(sketches[0] * sketches[1], axis=1)
    by_chunk = lambda u, v: np.sum(u * v, axis=1)
    aa, bb, ab = by_chunk(a, a), by_chunk(b, b), by_chunk(a, b)
    variance = (aa.sum() * bb.sum() - aa @ bb + ab.sum() ** 2 - ab @ ab) / d
    assert abs(products.mean() - ab.sum()) < 4 * np.sqrt(variance / keys)
    np.testing.assert_allclose(products.var(), variance, rtol=0.03)
    assert variance <= (aa.sum() * bb.sum() + ab.sum() ** 2) / d


def test_sketch_is_linear_and_depends_on_its_key():
    rng = np.random.default_rng(3)
    trees = [{"w": rng.normal(size=(7, 5)), "b": rng.normal(size=3)} for _ in range(2)]
    a, b = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), trees)
    combined = jax.tree.map(lambda x, y: 2 * x - 3 * y, a, b)
    want = 2 * af.sketch(a, 8, KEY) - 3 * af.sketch(b, 8, KEY)
    np.testing.assert_allclose(af.sketch(combined, 8, KEY), want, rtol=1e-4, atol=1e-5)
    assert np.abs(af.sketch(a, 8, KEY) - af.sketch(a, 8, jax.random.key(0))).max() > 0.1


def test_timestep_grid():
    for t in (1, 2, 3, 10, 1000):
        np.testing.assert_array_equal(af.timestep_grid(t, t), np.arange(t))
        for n in range(2, t + 1):
            grid = af.timestep_grid(t, n)
            assert grid.shape == (n,) and grid[0] == 0 and grid[-1] == t - 1
            assert np.diff(grid).min() >= 1 and np.ptp(np.diff(grid)) <= 1
    np.testing.assert_array_equal(af.timestep_grid(1000, 1), [500])
    np.testing.assert_array_equal(af.timestep_grid(11, 6), [0, 2, 4, 6, 8, 10])
    for bad in ((10, 11), (10, 0), (0, 1), (10, 2.0), (10, True)):
        with pytest.raises(ValueError, match="must be"):
            af.timestep_grid(*bad)


def smooth_affinity(num_timesteps):
    """Falls with the gap, faster where the noise is greater."""
    t = np.linspace(0, 1, num_timesteps)
    position = t + 2 * t**3
    return 1 / (1 + (position[:, None] - position) ** 2)


def test_interpolation_keeps_what_was_measured():
    full = np.random.default_rng(4).normal(size=(9, 9))
    np.testing.assert_array_equal(af.interpolate(full, np.arange(9), 9), full)
    np.testing.assert_array_equal(af.interpolate([[1.0]], [0], 1), [[1]])
    grid = np.array([2, 3, 7])
    got = af.interpolate(full[:3, :3], grid, 9)
    np.testing.assert_array_equal(got[np.ix_(grid, grid)], full[:3, :3])
    np.testing.assert_array_equal(got[:2], got[[2, 2]])
    np.testing.assert_array_equal(got[:, 8], got[:, 7])


def test_interpolation_reproduces_bilinear_functions():
    function = lambda s, t: 3 + 2 * s[:, None] - t + 0.5 * s[:, None] * t
    grid, every = np.array([0, 1, 5, 11, 19]), np.arange(20)
    got = af.interpolate(function(grid, grid), grid, 20)
    np.testing.assert_allclose(got, function(every, every), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("k", [2, 5, 8])
def test_a_coarser_grid_gives_the_same_clusters_within_a_cell(k):
    num_timesteps, n = 400, 41
    full = smooth_affinity(num_timesteps)
    grid = af.timestep_grid(num_timesteps, n)
    coarse = af.interpolate(full[np.ix_(grid, grid)], grid, num_timesteps)
    clusters = [
        clustering.interval_clusters(clustering.gradient_costs(a), k) for a in (full, coarse)
    ]
    assert np.abs(clusters[0] - clustering.uniform_boundaries(num_timesteps, k)).max() > 10
    assert np.abs(clusters[1] - clusters[0]).max() <= np.diff(grid).max()


BAD_GRIDS = [
    (np.ones((2, 3)), [0, 5], 10, "shape"),
    (np.full((2, 2), np.nan), [0, 5], 10, "finite"),
    (np.eye(2), [5, 0], 10, "strictly increasing"),
    (np.eye(2), [5, 5], 10, "strictly increasing"),
    (np.eye(2), np.array([5, 0], np.uint8), 10, "strictly increasing"),
    (np.eye(2), [0, 10], 10, r"in \[0, 10\)"),
    (np.eye(2), [-1, 5], 10, r"in \[0, 10\)"),
    (np.eye(2), [0.0, 5.0], 10, "integers"),
    (np.eye(2), [0, 1, 2], 10, "timesteps must be 2 integers"),
    (np.eye(1), [0], 10, "one timestep is too few"),
    (np.eye(2), [0, 1], 0, "num_timesteps must be"),
]


@pytest.mark.parametrize("affinity, timesteps, num_timesteps, message", BAD_GRIDS)
def test_impossible_grids(affinity, timesteps, num_timesteps, message):
    with pytest.raises(ValueError, match=message):
        af.interpolate(affinity, timesteps, num_timesteps)
    with pytest.raises(ValueError, match=message):
        af.save(io.BytesIO(), affinity, timesteps, num_timesteps)


def test_saved_affinity_comes_back_interpolated(tmp_path):
    path = tmp_path / "affinity"
    affinity = smooth_affinity(20)[:4, :4]
    with path.open("wb") as file:
        af.save(file, affinity, [0, 3, 10, 19], 20)
    got = af.load(str(path), 20)
    np.testing.assert_array_equal(got, af.interpolate(affinity, [0, 3, 10, 19], 20))


def npz(**arrays):
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def npy():
    file = io.BytesIO()
    np.save(file, np.eye(2))
    return file.getvalue()


GOOD = {"affinity": np.eye(2), "timesteps": np.array([0, 499]), "num_timesteps": 500}


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "it is damaged, or not an .npz file"),
        (b"some text", "it is damaged, or not an .npz file"),
        (pickle.dumps([1]), "it is damaged, or not an .npz file"),
        (npy(), "it is damaged, or not an .npz file"),
        (npz(**GOOD)[:200], "it is damaged, or not an .npz file"),
        (
            npz(affinity=np.eye(2)),
            "it is not a task affinity: it has no num_timesteps, timesteps; ",
        ),
        (npz(**GOOD | {"num_timesteps": 1000}), "was measured with T = 1000, the config has T = 5"),
        (
            npz(**GOOD | {"num_timesteps": [500, 500]}),
            r"'num_timesteps' has shape \(2,\)",
        ),
        (npz(**GOOD | {"timesteps": np.arange(2) * 500}), r"strictly increasing in \[0, 500\)"),
        (npz(**GOOD | {"timesteps": np.arange(400)}), r"2 integers, .* not \[ 0, 1, 2, ..., 397"),
        (npz(**GOOD | {"affinity": np.full((2, 2), np.inf)}), "finite"),
        (npz(**GOOD | {"affinity": np.full((2, 2), np.nan)}), "finite"),
        (npz(**GOOD | {"affinity": np.eye(3)[:2]}), r"shape \(n, n\)"),
        (npz(**GOOD | {"affinity": np.array([None])}), "'affinity' has objects of Python"),
        (npz(**GOOD | {"affinity": np.eye(2) + 0j}), "'affinity' must be numbers, not complex128"),
        (npz(**GOOD | {"affinity": np.array([["1"]])}), "'affinity' must be numbers, not <U1"),
        (npz(**GOOD | {"num_timesteps": "500"}), "'num_timesteps' must be numbers"),
    ],
)
def test_files_that_cannot_be_used(content, message, tmp_path):
    path = tmp_path / "measured.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"measured.npz cannot be used: .*{message}") as error:
        af.load(path, 500)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_damage_anywhere_is_one_line_or_no_matter(tmp_path):
    path, good = tmp_path / "measured.npz", npz(**GOOD)
    rng = np.random.default_rng(0)
    path.write_bytes(good)
    expected = af.load(path, 500)
    for place in range(0, len(good), 11):
        changed = bytearray(good)
        changed[place] = rng.integers(256)
        for damaged in (good[:place], bytes(changed)):
            path.write_bytes(damaged)
            try:
                np.testing.assert_array_equal(af.load(path, 500), expected)
            except ValueError as error:
                assert "\n" not in str(error)


def bomb(header):
    """A small file whose affinity says that it is large."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("num_timesteps", "timesteps"):
            with archive.open(f"{name}.npy", "w") as member:
                np.save(member, GOOD[name])
        with archive.open("affinity.npy", "w") as member:
            np.lib.format.write_array_header_1_0(member, header)
            member.write(bytes(8 * 1000**2 if header["shape"] == (1000, 1000) else 0))
    return file.getvalue()


@pytest.mark.parametrize("shape", [(1000, 1000), (20_000, 20_000)])
def test_a_small_file_takes_little_memory_whatever_it_says(shape, tmp_path):
    path = tmp_path / "measured.npz"
    path.write_bytes(bomb({"shape": shape, "fortran_order": False, "descr": "<f8"}))
    assert path.stat().st_size < 10_000
    tracemalloc.start()
    with pytest.raises(
        ValueError, match=r"'affinity' has (shape \(1000, 1000\), more than|0 bytes)"
    ):
        af.load(path, 500)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5e6


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.npz"):
        af.load(tmp_path / "absent.npz", 10)


def test_affinity_by_gap():
    affinity = np.full((4, 4), np.nan)
    affinity[np.triu_indices(4, 1)] = [1, 0.5, 0.3, 0.1, 0.2, 0.8]
    affinity[np.tri(4, dtype=bool)] = 0  # not read
    # Gaps in the same order: 1, 2, 10, 1, 9, 8.
    centres, mean, std, count = af.affinity_by_gap(affinity, [0, -1, -2, -10], bins=5)
    np.testing.assert_allclose(centres, [1, 3, 9])
    np.testing.assert_allclose(mean, [0.55, 0.5, np.mean([0.3, 0.2, 0.8])])
    np.testing.assert_allclose(std, [0.45, 0, np.std([0.3, 0.2, 0.8])], atol=1e-15)
    np.testing.assert_array_equal(count, [2, 1, 3])


def test_rank_correlation_is_spearmans():
    rng = np.random.default_rng(5)
    affinity = rng.integers(0, 6, (12, 12)) / 5.0  # many ties
    positions = rng.normal(size=12)
    i, j = np.triu_indices(12, 1)
    for where in (positions, np.arange(12)):
        want = stats.spearmanr(affinity[i, j], np.abs(where[i] - where[j])).statistic
        assert abs(want) > 0.01
        np.testing.assert_allclose(af.rank_correlation(affinity, where), want, rtol=1e-12)
    falling = np.exp(-np.abs(positions[:, None] - positions))
    np.testing.assert_allclose(af.rank_correlation(falling, positions), -1, rtol=1e-12)


@pytest.mark.parametrize(
    "affinity, positions, message",
    [
        (np.eye(3), [0, 1], "positions must be 3"),
        (np.eye(3), [0, 1, np.nan], "positions must be 3 finite"),
        (np.eye(3)[:2], [0, 1], "shape"),
        (np.full((2, 2), np.nan), [0, 1], "finite"),
        (np.eye(1), [0], "at least two tasks"),
        (np.diag([1.0, 2, 3]) + np.arange(3), [4, 4, 4], "positions must not|the gap of all pairs"),
    ],
)
def test_pairs_that_say_nothing(affinity, positions, message):
    for function in (af.affinity_by_gap, af.rank_correlation):
        with pytest.raises(ValueError, match=message):
            function(affinity, positions)


def test_constant_affinity_has_no_rank_correlation():
    with pytest.raises(ValueError, match="affinity of all pairs is the same"):
        af.rank_correlation(np.eye(3), [0, 1, 3])
    with pytest.raises(ValueError, match="bins must be"):
        af.affinity_by_gap(np.eye(3), [0, 1, 3], bins=0)
