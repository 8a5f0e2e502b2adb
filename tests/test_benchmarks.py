"""What a step should cost, proved on compiled programs and counts: no time is measured."""

import functools
import math

import jax
import jax.numpy as jnp
import pytest

from ant_jax.diffusion import GaussianDiffusion, alphas_bar
from ant_jax.models.dit import DiT, dit
from benchmarks import flops, programs
from benchmarks.programs import program_bytes

K = 5
PROCESS = GaussianDiffusion(alphas_bar("cosine", 1000), "learned_range")
# Compiling takes as long for large layers as for small ones, and nothing here is run.
MODEL = DiT(width=256, depth=1, heads=4, patch=2, channels=4, num_classes=9, learned_variance=True)


def task(side):
    return programs.Task(MODEL, (side, side, 4), PROCESS, K)


# Many tokens, so that activations outweigh parameters; and hardly any.
LARGE, SMALL = (task(16), 8 * K), (task(2), K)


@functools.cache
def lowered(variant):
    """(equations, XLA's FLOPs) of a variant's step at the large size, not compiled."""
    large, size = LARGE
    state = jax.eval_shape(lambda: programs.first_state(large, variant))
    batch = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, programs.first_batch(large, size)))
    traced = jax.jit(programs.step_of(large, variant)).trace(state, batch)
    return traced.jaxpr, traced.lower().cost_analysis()["flops"]


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
    jaxpr, _ = lowered(variant)
    return max(
        (
            math.prod(v.aval.shape)
            for loop in loops(jaxpr.jaxpr)
            for v in (*loop.invars, *loop.outvars)
        ),
        default=0,
    )


@pytest.mark.parametrize(
    "size, published", [("S", 6.06), ("B", 23.01), ("L", 80.71), ("XL", 118.64)]
)
def test_the_published_counts_of_dit(size, published):
    """Table 4 of Peebles & Xie 2023, at 256 x 256: multiply-adds, in 10^9."""
    model = dit(size, patch=2, channels=4, num_classes=1000, learned_variance=True)
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


@pytest.mark.parametrize("variant", ["uncertainty", "pcgrad/vmap", "nash/vmap"])
def test_a_multi_task_step_has_hardly_more_flops_than_vanilla(variant):
    assert lowered(variant)[1] <= 1.05 * lowered("vanilla")[1]
    # A loop's body is counted once, so that none may hide work: they weigh k gradients.
    assert largest_in_loops(variant) <= 4 * K * K
    assert largest_in_loops("vanilla") == 0


def test_the_walk_over_loops_finds_those_that_hide_work():
    for variant in ("pcgrad/masked", "pcgrad/scan"):
        assert largest_in_loops(variant) > programs.num_params(LARGE[0]) / 10


@functools.cache
def program(size, variant):
    compiled = programs.compile_step(size[0], variant, size[1], jax.devices()[:1])
    return compiled.compiled


def test_vmap_takes_no_more_memory_than_the_gradients():
    params = 4 * programs.num_params(SMALL[0])
    vanilla, vmap = (program_bytes(program(SMALL, name)) for name in ("vanilla", "pcgrad/vmap"))
    assert vanilla < 7 * params
    assert vanilla + (K - 2) * params < vmap < vanilla + (K + 1) * params


def test_scan_takes_less_memory_than_vanilla_where_activations_outweigh_parameters():
    vanilla, scan = (program_bytes(program(LARGE, name)) for name in ("vanilla", "pcgrad/scan"))
    assert scan < 0.75 * vanilla


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
