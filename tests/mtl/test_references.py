"""The methods against TorchJD and LibMTL, as `tests/data/mtl/record.py` recorded them."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ant_jax import mtl
from ant_jax.mtl import TaskStats
from ant_jax.mtl.famo import exact_update, famo_weights

TOLERANCE = 1e-4
# All sets are padded with absent tasks, so that each method is compiled once.
K = 8
# Ratios of eigenvalues up to this are what methods use in float32.
RESOLVED = 1 / (1e-6 * K)


def _condition(gradients):
    """The largest eigenvalue of a Gram matrix over the smallest that is not 0."""
    squared = np.linalg.svd(gradients, compute_uv=False) ** 2
    # Eigenvalues of dependent gradients are 1e-32, of nearly parallel ones 1e-9.
    positive = np.where(squared > 1e-14 * squared.max(-1, keepdims=True), squared, np.inf)
    return squared.max(-1) / positive.min(-1)


class Record:
    """42 sets, of a family and a number of tasks, of 5 Jacobians in a row, (42, 5, K, P)."""

    def __init__(self):
        file = np.load(Path(__file__).parent.parent / "data/mtl/references.npz")
        self.ks, self.families = file["ks"].astype(int), file["families"]
        self.gradients, self.losses = file["gradients"], file["losses"]
        self.uniforms = file["uniforms"]
        kinds = [name.split("/") for name in file.files if "/" in name]
        self.error = {name: file[f"{name}/error"] for name, kind in kinds if kind == "error"}
        self.kind = {name: kind for name, kind in kinds if kind != "error"}
        self.values = {name: file[f"{name}/{kind}"] for name, kind in self.kind.items()}
        gradients = self.gradients.astype(float)
        self.gram = np.float32(np.einsum("sckp,sclp->sckl", gradients, gradients))
        norms = np.linalg.norm(gradients, axis=-1)
        self.shortest = np.where(norms > 0, norms, np.inf).min(-1)
        units = gradients / np.where(norms > 0, norms, 1)[..., None]
        self.condition = {"cosines": _condition(units), "gram": _condition(gradients)}
        self.counts = np.float32(np.arange(K) < self.ks[:, None])


RECORD = Record()


class Method(NamedTuple):
    """Our counterpart of a recorded method.

    Attributes:
      make: with K.
      factor: ours is this times the reference's, a number or a function of k.
      halves: whether it needs the gradients of two halves.
    """

    make: Callable
    factor: Callable | float = 1
    halves: bool = False


def lagged_famo(k):
    """FAMO whose losses after a step are those of the next call."""

    def weigh(stats, state):
        inner, before, count = state
        moved = exact_update(inner, before, stats.losses, stats.present, weight_decay=0.5)
        inner = jax.tree.map(lambda new, old: jnp.where(count > 0, new, old), moved, inner)
        weights = famo_weights(inner, stats.losses, stats.present)
        return weights, (inner, stats.losses, count + 1)

    init = lambda: (mtl.famo(k).init(), jnp.ones(k), jnp.int32(0))
    return mtl.Weighting(init, weigh, k, frozenset({"losses"}))


mean = lambda k: 1 / k
CAGRAD_C = 0.4
PREFERENCE = tuple(range(1, K + 1))

METHODS = {
    "mgda": Method(lambda: mtl.mgda(K)),
    "cagrad": Method(lambda: mtl.cagrad(K, CAGRAD_C), 1 / (1 + CAGRAD_C**2)),
    "upgrad": Method(lambda: mtl.upgrad(K)),
    "dualproj": Method(lambda: mtl.dualproj(K)),
    "imtl_g": Method(lambda: mtl.imtl_g(K)),
    "aligned_mtl_min": Method(lambda: mtl.aligned_mtl(K, "min")),
    "aligned_mtl_median": Method(lambda: mtl.aligned_mtl(K, "median")),
    "aligned_mtl_rmse": Method(lambda: mtl.aligned_mtl(K, "rmse")),
    "config": Method(lambda: mtl.config(K), mean),
    "fairgrad_1": Method(lambda: mtl.fairgrad(K, 1.0)),
    "fairgrad_2": Method(lambda: mtl.fairgrad(K, 2.0)),
    "krum_1": Method(lambda: mtl.krum(K, outliers=1)),
    "krum_2": Method(lambda: mtl.krum(K, outliers=1, selected=2)),
    "gradvac": Method(lambda: mtl.gradvac(K, beta=0.5), mean),
    "pcgrad": Method(lambda: mtl.pcgrad(K), mean),
    "nash": Method(lambda: mtl.nash(K), mean),
    "cr_mogm": Method(lambda: mtl.cr_mogm(mtl.upgrad(K), 0.9)),
    "graddrop": Method(lambda: mtl.graddrop(K), mean),
    "trimmed_mean": Method(lambda: mtl.trimmed_mean(K, trim=1)),
    "modo": Method(lambda: mtl.modo(K, gamma=0.5, rho=0.02), halves=True),
    "sdmgrad": Method(lambda: mtl.sdmgrad(K, lam=0.3), halves=True),
    "excess_mtl": Method(lambda: mtl.excess_mtl(K, eta=0.1, warmup=1)),
    "geometric_mean": Method(lambda: mtl.geometric_mean(K)),
    # Divided by the sum of the unit vector of the preference.
    "pbi": Method(
        lambda: mtl.pbi(K, 5.0, PREFERENCE),
        lambda k: np.sqrt(k * (k + 1) * (2 * k + 1) / 6) / (k * (k + 1) / 2),
    ),
    "cosmos": Method(lambda: mtl.cosmos(K, 2.0, PREFERENCE)),
    # Both divide by K, whatever tasks are present.
    "imtl_l": Method(lambda: mtl.imtl_l(K), mean),
    "uncertainty": Method(lambda: mtl.scaled(mtl.uncertainty(K), np.full(K, float(K)))),
    "famo": Method(lambda: lagged_famo(K)),
    "dwa": Method(lambda: mtl.dwa(K, steps_per_epoch=1), mean),
    "db_mtl": Method(lambda: mtl.db_mtl(K), mean),
    "gradnorm": Method(lambda: mtl.gradnorm(K), mean),
    "stch": Method(lambda: mtl.stch(K, mu=0.5, warmup_steps=3), mean),
}


@pytest.fixture
def run(monkeypatch):
    """Our updates, (42, 5, P), or weights, (42, 5, K), with the recorded orders and draws."""
    draws = []

    in_order = lambda seed, count, k: jnp.tile(jnp.arange(k), (k, 1))
    for name in ("pcgrad", "gradvac"):
        module = importlib.import_module(f"ant_jax.mtl.{name}")
        monkeypatch.setattr(module, "projection_orders", in_order)
    module = importlib.import_module("ant_jax.mtl.aggregators.graddrop")
    monkeypatch.setattr(module, "entry_draws", lambda *_: draws[-1])

    def run(name):
        method = METHODS[name]
        rule = method.make()
        is_weighting = isinstance(rule, mtl.Weighting)

        def call(state, inputs):
            losses, gram, gradients, second, uniforms, counts = inputs
            if is_weighting:
                weights, state = rule.weigh(TaskStats(losses, gram, counts), state)
                return state, weights
            draws.append(uniforms)
            if method.halves:
                gradients = jnp.concatenate([gradients, second])
                counts, losses = jnp.tile(counts, 2), None
            update, state = rule.update(gradients, state, losses=losses, counts=counts)
            return state, update

        def sequence(*inputs):
            state = rule.init() if is_weighting else rule.init(jnp.zeros(inputs[2].shape[-1]))
            return jax.lax.scan(call, state, inputs)[1]

        second = np.roll(RECORD.gradients, -1, 1)
        counts = np.repeat(RECORD.counts[:, None], RECORD.losses.shape[1], 1)
        found = jax.jit(jax.vmap(sequence))(
            RECORD.losses, RECORD.gram, RECORD.gradients, second, RECORD.uniforms, counts
        )
        found = np.asarray(found, float)
        if is_weighting and RECORD.kind[name] == "update":
            found = np.einsum("sck,sckp->scp", found, RECORD.gradients.astype(float))
        return found

    return run


def differences(name, found):
    """(42, 5), relative to the reference's update or the shortest gradient, whichever is longer.

    Where weights are recorded, which are unique, it is relative to the largest weight.
    """
    factor = METHODS[name].factor
    factor = factor(RECORD.ks[:, None, None]) if callable(factor) else factor
    reference = RECORD.values[name].astype(float)
    if RECORD.kind[name] == "weights":
        size = np.abs(reference).max(-1)
        return np.abs(found / factor - reference).max(-1) / size
    size = np.maximum(np.linalg.norm(reference, axis=-1), RECORD.shortest)
    return np.linalg.norm(found / factor - reference, axis=-1) / size


# Cases by family in which the reference does not solve its own problem, and why.
UNSOLVED = {
    "mgda": (
        dict(random=22, scales=18, dependent=18, opposed=30),
        "20000 steps of Frank-Wolfe are more than 1e-4 away from the shortest vector",
    ),
    "cagrad": (
        dict(opposed=2, zero=26),
        "no direction is good for all tasks, and TorchJD's solver is inexact",
    ),
    "imtl_g": (
        dict(scales=1, dependent=30, opposed=35),
        "no equal projections on dependent gradients; in one set the weights have a negative sum",
    ),
    "config": (dict(opposed=5), "two opposed gradients have no common direction"),
    "fairgrad_1": (dict(opposed=35), "no solution exists"),
    "fairgrad_2": (dict(opposed=35), "no solution exists"),
    "krum_1": (
        dict(random=5, parallel=13, scales=11, dependent=6, opposed=5, zero=5),
        "TorchJD adds distances, not squares; or scores are equal, as both of k = 4 are",
    ),
    "krum_2": (
        dict(random=1, parallel=11, scales=6, dependent=2, opposed=1, zero=1),
        "TorchJD adds distances, not squares; or scores are equal",
    ),
    "nash": (
        dict(random=5, parallel=9, scales=11, dependent=9, opposed=35, zero=35),
        "TorchJD's convex approximations stop early; opposed gradients have no solution",
    ),
}

# Cases by family in which ours is another by design, and why.
_LEFT_OUT = "a gradient that is 0 is left out here"
APART = {
    "mgda": (dict(zero=35), _LEFT_OUT + "; by the formula it has all the weight"),
    "cagrad": (dict(zero=28), _LEFT_OUT + ", also of the mean"),
    "krum_1": (dict(zero=20), _LEFT_OUT),
    "krum_2": (dict(zero=23), _LEFT_OUT),
    "gradvac": (dict(zero=15), _LEFT_OUT + ", also of the average cosines"),
    "modo": (dict(zero=35), _LEFT_OUT),
    "sdmgrad": (dict(zero=34), _LEFT_OUT),
    "excess_mtl": (dict(zero=28), "a risk of 0 is no baseline here"),
    "gradnorm": (dict(zero=35), _LEFT_OUT),
}

# Methods that divide by the eigenvalues of a matrix, which float32 knows to 1e-7 of the largest.
# Those below 1e-6 k of it count as 0.
EIGENVALUES = {
    "imtl_g": "cosines",
    "config": "cosines",
    "aligned_mtl_min": "gram",
    "aligned_mtl_median": "gram",
    "aligned_mtl_rmse": "gram",
}
UNRESOLVED = {"cosines": dict(parallel=20), "gram": dict(parallel=20, scales=10)}

# What is added to the tolerance, by method and family.
LOOSE = {
    # One set of 8 gradients, with eigenvalues of the cosines 7e4 apart.
    ("upgrad", "random"): 1e-3,
    ("dualproj", "random"): 1e-3,
    ("fairgrad_1", "random"): 1e-3,
    ("fairgrad_2", "random"): 1e-3,
    ("nash", "random"): 1e-3,
    # In float32 opposed gradients do not cancel exactly.
    ("cagrad", "opposed"): 1e-3,
    # sqrt(1 - cosine^2) of a cosine of -1.
    ("gradvac", "opposed"): 2e-3,
    # Losses that are nearly in proportion to the preference.
    ("pbi", "zero"): 1e-3,
}


def by_family(cases):
    """The number of cases in each family that has some."""
    return {
        str(family): int(cases[RECORD.families == family].sum())
        for family in dict.fromkeys(RECORD.families)
        if cases[RECORD.families == family].any()
    }


def test_each_recorded_method_has_a_counterpart():
    assert METHODS.keys() == RECORD.values.keys()


def test_float32_resolves_the_eigenvalues_of_most_sets():
    found = {matrix: by_family(RECORD.condition[matrix] > RESOLVED) for matrix in UNRESOLVED}
    assert found == UNRESOLVED


@pytest.mark.parametrize("name", METHODS)
def test_updates_agree(run, name):
    """To 1e-4; where the reference is further from its solution, to that distance more."""
    difference, error = differences(name, run(name)), RECORD.error[name]
    defined = np.isfinite(RECORD.values[name]).all(-1)
    unsolved, why = UNSOLVED.get(name, ({}, ""))
    assert by_family(defined & ~(error < TOLERANCE)) == unsolved, why

    tolerance = TOLERANCE + np.where(error < 1, error, np.inf)
    if name in EIGENVALUES:
        condition = RECORD.condition[EIGENVALUES[name]]
        tolerance += np.where(condition < RESOLVED, 2e-7 * condition, np.inf)
    for (method, family), more in LOOSE.items():
        tolerance[RECORD.families == family] += more * (method == name)
    apart, why = APART.get(name, ({}, ""))
    assert by_family(defined & ~(difference <= tolerance)) == apart, why
