"""What a step should cost, proved on compiled programs and counts: no time is measured."""

import functools
import importlib
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from ant_jax import mtl
from ant_jax.diffusion import GaussianDiffusion, alphas_bar
from ant_jax.models.dit import SIZES, DiT
from ant_jax.runtime import devices as devices_lib
from ant_jax.train_step import check_step
from benchmarks import flops, many_devices, programs, step

K = 5
PROCESS = GaussianDiffusion(alphas_bar("cosine", 1000), "learned_range")
# Quicker to compile.
SIMPLE = GaussianDiffusion(alphas_bar("cosine", 1000), "fixed_small")
# Compiling takes as long for large layers as for small ones, and nothing here is run.
MODEL = DiT(width=256, depth=1, heads=4, patch=2, channels=4, num_classes=9, learned_variance=True)


def task(side):
    return programs.Task(MODEL, (side, side, 4), PROCESS, K)


TASK = programs.Task(MODEL, (16, 16, 4), PROCESS, K)
BATCH = 8 * K


class Layers(nn.Module):
    """A network that is quick to compile, for what does not depend on the network."""

    num_classes = 0

    @nn.compact
    def __call__(self, x, t, y):
        h = x.reshape(len(x), -1) + t[:, None] / 1000
        for _ in range(4):
            h = nn.tanh(nn.Dense(192)(h))
        return nn.Dense(x[0].size)(h).reshape(x.shape)


@functools.cache
def traced(variant):
    """The step of a variant, not compiled."""
    state = jax.eval_shape(lambda: programs.first_state(TASK, variant))
    batch = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, programs.first_batch(TASK, BATCH)))
    return jax.jit(programs.step_of(TASK, variant)).trace(state, batch)


@functools.cache
def flops_by_xla(variant):
    return traced(variant).lower().cost_analysis()["flops"]


def loops(jaxpr):
    """All equations of a program that repeat a part of it."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("scan", "while"):
            yield equation
        for inner in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from loops(inner)


def largest_in_loops(variant):
    """Elements of the largest array that a loop reads or writes."""
    found = loops(traced(variant).jaxpr.jaxpr)
    arrays = (array for loop in found for array in (*loop.invars, *loop.outvars))
    return max((math.prod(array.aval.shape) for array in arrays), default=0)


@pytest.mark.parametrize(
    "size, published", [("S", 6.06), ("B", 23.01), ("L", 80.71), ("XL", 118.64)]
)
def test_the_published_counts_of_dit(size, published):
    """Those of Peebles & Xie 2023, at 256 x 256: multiply-adds, in 10^9."""
    model = DiT(**SIZES[size], patch=2, channels=4, num_classes=1000, learned_variance=True)
    assert sum(flops.products(model, 32, 32)) / 1e9 == pytest.approx(published, rel=1e-3)


def test_the_counts_agree_with_xla():
    x = jax.ShapeDtypeStruct((2, 16, 32, 4), jnp.float32)
    integers = jax.ShapeDtypeStruct((2,), jnp.int32)
    params = jax.eval_shape(MODEL.init, jax.random.key(0), x, integers, integers)
    loss = lambda params, *inputs: jnp.sum(MODEL.apply(params, *inputs) ** 2)

    def by_xla(function):
        compiled = jax.jit(function).lower(params, x, integers, integers).compile()
        return compiled.cost_analysis()["flops"]

    # XLA counts norms, softmax and sums too.
    forward = by_xla(MODEL.apply) / (2 * flops.forward_flops(MODEL, 16, 32))
    gradient = by_xla(jax.grad(loss)) / (2 * flops.gradient_flops(MODEL, 16, 32))
    assert 1 < forward < 1.02
    assert 1 < gradient < 1.02


@pytest.mark.parametrize("remat", ["dots", "blocks"])
def test_the_count_of_what_is_computed_again_agrees_with_xla(remat):
    model, integers = MODEL.clone(remat=remat), jax.ShapeDtypeStruct((2,), jnp.int32)
    inputs = jax.ShapeDtypeStruct((2, 16, 32, 4), jnp.float32), integers, integers
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    loss = lambda params, *inputs: jnp.sum(model.apply(params, *inputs) ** 2)
    lowered = jax.jit(jax.grad(loss)).lower(params, *inputs)
    by_xla = lowered.cost_analysis()["flops"]
    assert 1 < by_xla / (2 * flops.step_flops(model, 16, 32)) < 1.03


@pytest.mark.parametrize("k", [5, 8])
@pytest.mark.parametrize("n", [8, 64, 256])
def test_the_batches_of_the_table_fit_the_devices(k, n):
    check_step(
        *(k, many_devices.nearest_batch(256, k, n), n),
        draw="stratified",
        form="vmap",
        microbatches=1,
        weighting=mtl.nash(k),
    )


def test_a_variant_is_a_method_a_form_and_a_number_of_microbatches():
    for name, loop, microbatches in (
        ("vanilla", False, 1),
        ("nash/scan", True, 1),
        ("vanilla/vmap/2", True, 2),
    ):
        assert programs.variant(name) == name
        assert programs.has_loop(name) == loop
        assert programs.microbatches_of(name) == microbatches
        primitives = {each.primitive.name for each in traced(name).jaxpr.jaxpr.eqns}
        assert ("scan" in primitives) == loop
    for name in ("adam", "nash/loop", "nash/scan/0", "nash/scan/2/2", "nash/scan/two"):
        with pytest.raises(ValueError):
            programs.variant(name)


@pytest.mark.parametrize("variant", ["uncertainty", "pcgrad/vmap", "nash/vmap"])
def test_a_multi_task_step_has_hardly_more_flops_than_vanilla(variant):
    assert flops_by_xla(variant) <= 1.05 * flops_by_xla("vanilla")
    # A loop's body is counted once, so that none may hide work: they weigh k gradients.
    assert largest_in_loops(variant) <= 4 * K * K
    assert largest_in_loops("vanilla") == 0


def test_the_walk_over_loops_finds_one_that_hides_work():
    # Which the count does not: it takes k pullbacks for one.
    assert largest_in_loops("pcgrad/masked") > programs.num_params(TASK) / 10


@functools.cache
def memory(size, variant):
    """Bytes of a step's program, in multiples of the parameters."""
    task = programs.Task(Layers(), (4, 4, 3), SIMPLE, K)
    program = programs.compile_step(task, variant, size, jax.devices()[:1])
    return programs.program_bytes(program.compiled) / (4 * programs.num_params(task))


@pytest.mark.parametrize("count", [1, 2])
def test_what_is_compiled_ahead_runs(count, monkeypatch):
    # Under the flags of these tests programs have no options of their own.
    options = {"xla_backend_optimization_level": 0}
    monkeypatch.setattr(devices_lib, "compiler_options", lambda devices: options)
    task, devices = programs.Task(Layers(), (4, 4, 1), SIMPLE, K), jax.devices()[:count]
    program = programs.compile_step(task, "uncertainty", 2 * K, devices)
    state = jax.jit(lambda: programs.first_state(task, "uncertainty"))()
    state = programs.place(state, devices)
    state, metrics = program.compiled(state, programs.first_batch(task, 2 * K))
    assert int(state.step) == 1 and metrics["loss"] > 0


def test_vmap_takes_no_more_memory_than_the_gradients():
    # So few examples that the parameters outweigh all else.
    vanilla, vmap = memory(K, "vanilla"), memory(K, "pcgrad/vmap")
    assert vanilla < 7
    assert vanilla + K - 2 < vmap < vanilla + K + 1


def test_scan_takes_less_memory_than_vanilla_where_activations_outweigh_parameters():
    assert memory(2000 * K, "pcgrad/scan") < 0.75 * memory(2000 * K, "vanilla")


@pytest.mark.parametrize("name", programs.MODELS)
def test_a_model_is_that_of_its_config(name, monkeypatch):
    monkeypatch.setattr("sys.argv", ["step", "--model", name, "--remat", "dots"])
    task, size = step.what(step.parse())
    config = importlib.import_module(f"configs.imagenet256_dit_{name.lower().replace('/', '')}")
    config = config.get_config()
    assert (task.model.width, task.model.depth) == (config.model.width, config.model.depth)
    assert (task.model.remat, task.model.dtype) == ("dots", jnp.bfloat16)
    assert task.model.learned_variance and task.process.variance == "learned_range"
    assert (task.shape, task.model.num_classes, size) == ((32, 32, 4), 1000, config.data.batch_size)


def test_a_batch_can_be_given(monkeypatch):
    monkeypatch.setattr("sys.argv", ["step", "--model", "L/2", "--batch", "15"])
    assert step.what(step.parse())[1] == 15


@pytest.mark.parametrize("limit", [5, 6, 37, 40, 41])
def test_the_largest_batch_that_fits(limit):
    tried = []

    def fits(size):
        tried.append(size)
        return size <= limit

    assert programs.largest_batch(fits, 5) == limit // 5 * 5
    assert len(tried) == len(set(tried)) and all(size % 5 == 0 for size in tried)


def test_no_batch_fits():
    with pytest.raises(ValueError, match="not even a batch of 5 fits"):
        programs.largest_batch(lambda size: False, 5)
