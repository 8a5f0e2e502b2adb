"""Records the updates of other implementations of the multi-task methods for `test_references.py`.

Usage: python record.py FILE LIBMTL, with the versions recorded in the file, where FILE is an .npz
and LIBMTL a checkout of median-research-group/LibMTL at the commit below.

All is computed in float64 on Jacobians that float32 holds exactly. Each method sees 5 Jacobians in
a row from each family and k, and starts anew after them. Random orders and draws are replaced:
tasks are visited in their order, and uniform numbers are the recorded ones.

Beside each update stands an error, which is 0 where the reference solves the problem that defines
its method. For an optimisation problem it is the distance from the exact update, or a bound on it,
in units of `unit`. 1 or more says that there is nothing to compare with.
"""

import contextlib
import functools
import importlib.metadata
import sys
import types
from pathlib import Path

import cvxpy
import numpy as np
import torch
from torchjd import aggregation, scalarization
from torchjd.linalg import QuadprogProjector

LIBMTL = "4336804847eaa5e0b924b743d76beec7ac3fdc97"
KS = range(2, 9)
CALLS = 5
P = 8
CAGRAD_C = 0.4
# The defaults, 1e-4, are too large for gradients of different lengths.
PROJECTOR = QuadprogProjector(norm_eps=0.0, reg_eps=1e-12)
FAMILIES = ("random", "parallel", "scales", "dependent", "opposed", "zero")


def jacobians(family, k):
    """(CALLS, k, P) of norms about 1, exact in float32."""
    rng = np.random.RandomState(100 * k + FAMILIES.index(family))
    gradients = rng.standard_normal((CALLS, k, P)) / np.sqrt(P)
    if family == "parallel":
        angles = 10 ** np.linspace(-1, -3, CALLS)[:, None, None]
        gradients = rng.standard_normal((CALLS, 1, P)) / np.sqrt(P) + angles * gradients
    elif family == "scales":
        exponents = rng.uniform(-1, 1, (CALLS, k, 1))
        exponents[:, 0], exponents[:, -1] = 1, -1
        # From 4 to 1000 between the longest and the shortest.
        gradients *= 10 ** (np.linspace(0.3, 1.5, CALLS)[:, None, None] * exponents)
    elif family in ("dependent", "opposed"):
        # Multiples of 2**-8, so that their combination is exact.
        gradients = np.round(gradients * 256) / 256
        if family == "dependent":
            factors = rng.choice([-1, -0.5, 0.5, 1, 2], (CALLS, k - 1, 1))
            factors[:, 0] = 1
            gradients[:, -1] = (factors * gradients[:, :-1]).sum(1)
        else:
            gradients[:, -1] = -rng.choice([0.25, 0.5, 1, 2], (CALLS, 1)) * gradients[:, 0]
    elif family == "zero":
        gradients[np.arange(CALLS), rng.randint(k, size=CALLS)] = 0
    return np.float32(gradients).astype(float)


def losses(family, k):
    """(CALLS, k) between 0.05 and 20."""
    rng = np.random.RandomState(1000 + 100 * k + FAMILIES.index(family))
    return np.float32(0.05 * 400 ** rng.uniform(size=(CALLS, k))).astype(float)


def uniforms(family, k):
    """(CALLS, P) draws in [0, 1)."""
    rng = np.random.RandomState(2000 + 100 * k + FAMILIES.index(family))
    return np.float32(rng.uniform(size=(CALLS, P))).astype(float)


def unit(update, gradients):
    """What errors are relative to: the update, or the shortest gradient where that is longer."""
    norms = np.linalg.norm(gradients, axis=-1)
    return max(np.linalg.norm(update), norms[norms > 0].min())


def supports(g):
    """Each set of linearly independent gradients: its indices, norms and inverse of the cosines."""
    norms = np.linalg.norm(g, axis=1)
    for mask in range(1, 2 ** len(g)):
        s = [i for i in range(len(g)) if mask >> i & 1 and norms[i] > 0]
        if len(s) == mask.bit_count():
            unit_vectors = g[s] / norms[s, None]
            if np.linalg.svd(unit_vectors @ unit_vectors.T, compute_uv=False).min() > 1e-12:
                yield s, norms[s], np.linalg.inv(unit_vectors @ unit_vectors.T)


# Methods of a Gram matrix: (make, error). `make(k)` gives an aggregator with a weighting of Gram
# matrices; `error` has the weights, the gradients and the weighting.


def shortest(g):
    """The shortest vector of the convex hull: the best of all sets of positive weights."""
    best = g[np.linalg.norm(g, axis=1).argmin()]
    # With one more entry, the same for all, opposed gradients are independent.
    for s, norms, inverse in supports(np.c_[g, np.full(len(g), unit(0 * best, g))]):
        x = inverse @ (1 / norms) / norms
        x /= x.sum()
        if x.min() > -1e-9 and np.linalg.norm(x @ g[s]) < np.linalg.norm(best):
            best = x @ g[s]
    return best


def mgda_error(w, g, _):
    best = shortest(g)
    return np.linalg.norm(w @ g - best) / unit(best, g)


def cagrad_error(w, g, _):
    """The best of all sets of positive weights.

    If the best worst progress is 0, many directions have it. This takes the one nearest to the
    mean, which solvers find.
    """
    mean = g.mean(0)
    radius = CAGRAD_C * np.linalg.norm(mean)
    most, best = -np.inf, mean
    for s, norms, inverse in supports(g):
        # Shifts of equal progress t are t a - b; the longer root of the length.
        a = inverse @ (1 / norms)
        b = inverse @ (g[s] @ mean / norms)
        square, half = a @ (1 / norms), a @ (g[s] @ mean / norms)
        root = half**2 - square * (b @ (g[s] @ mean / norms) - radius**2)
        if root < 0:
            continue
        v = ((half + np.sqrt(root)) / square * a - b) / norms
        d = mean + v @ g[s]
        if v.min() > -1e-9 * v.max() and (g @ d).min() > most:
            most, best = (g @ d).min(), d
    if np.linalg.norm(shortest(g)) < 1e-9:
        equal = torch.full((len(g),), 1 / len(g))
        nearest = PROJECTOR(equal, torch.tensor(g @ g.T)).numpy() @ g
        best = nearest if np.linalg.norm(nearest - mean) <= radius else best
    return np.linalg.norm(w @ g - best) / unit(best, g)


def projections_error(starts, weights, g):
    """Of projections on the dual cone: the root of twice the gap, and the conflicts left."""
    gram = g @ g.T
    norms = np.linalg.norm(g, axis=1)
    norms[norms == 0] = 1
    total = 0
    for u, v in zip(starts, weights, strict=True):
        inner = gram @ v
        total += np.sqrt(2 * max(np.maximum(inner, 0) @ np.maximum(v - u, 0), 0))
        total += max((-inner / norms).max(), 0)
    return total / unit(weights.sum(0) @ g, g)


def upgrad_error(w, g, _):
    starts = np.eye(len(w)) / len(w)
    rows = PROJECTOR(torch.tensor(starts), torch.tensor(g @ g.T)).numpy()
    return projections_error(starts, rows, g)


def dualproj_error(w, g, _):
    return projections_error(np.full((1, len(w)), 1 / len(w)), w[None], g)


def units(g):
    """The unit vectors of the gradients that are not 0."""
    norms = np.linalg.norm(g, axis=1)
    return g[norms > 0] / norms[norms > 0, None]


def imtl_g_error(w, g, _):
    """0 for equal projections on the unit gradients, else 2; 3 where they are negative."""
    inner = units(g) @ (w @ g)
    if inner.max() < 0:
        return 3.0
    return 2.0 if np.ptp(inner) > 1e-6 * inner.max() or abs(w.sum() - 1) > 1e-6 else 0.0


def aligned_error(w, g, weighting):
    """The aligned gradients are orthogonal and of one norm in the space that they span."""
    gram = torch.tensor(g @ g.T)
    balance = weighting._compute_balance_transformation(gram, weighting.scale_mode)
    values = np.linalg.eigvalsh((balance @ gram @ balance).numpy())
    rank = np.linalg.matrix_rank(g)
    top = values[-rank:]
    return max(np.ptp(top), np.abs(values[:-rank]).max(initial=0)) / top.max()


def config_error(d, g):
    """Direction of the least-squares solution of U x = 1, length the sum of the projections."""
    if not d.any():
        return 2.0
    u = units(g)
    inner = u @ d
    if inner.sum() <= 0:
        return 2.0
    x = d * inner.sum() / (inner @ inner)
    gradient = np.linalg.norm(u.T @ (u @ x - 1)) / np.linalg.norm(x) / len(u)
    length = abs((g @ d).sum() / (d @ d) - 1)
    return gradient + length


def fair_error(w, g, alpha):
    """A bound on the distance: the gradient of the convex objective in the norm of its Hessian.

    A gradient that is 0 has no equation.
    """
    active = g.any(1)
    w, g = w[active], g[active]
    if not (w > 0).all():
        return 2.0
    d = w @ g
    size = alpha * w ** (1 + 1 / alpha) * (g @ d - w ** (-1 / alpha)) ** 2
    return np.sqrt(size.sum()) / np.linalg.norm(d) if d.any() else 2.0


def fairgrad_error(w, g, weighting):
    return fair_error(w, g, weighting.alpha)


def krum_error(w, g, weighting):
    """1 where squared distances, as in the paper, select others; 2 for equal scores in float32."""
    m = weighting.n_selected
    rounding = 1e-5 * (g**2).sum(1).max()
    squares = ((g[:, None] - g) ** 2).sum(-1)
    np.fill_diagonal(squares, np.inf)
    scores = np.sort(squares, 1)[:, : len(w) - weighting.n_byzantine - 2].sum(1)
    order = np.argsort(scores)
    if scores[order[m]] - scores[order[m - 1]] < rounding:
        return 2.0
    return float(set(order[:m]) != set(np.flatnonzero(w)))


exact = lambda w, g, _: 0.0

GRAM = {
    "mgda": (lambda k: aggregation.MGDA(epsilon=1e-9, max_iters=20000), mgda_error),
    "cagrad": (lambda k: aggregation.CAGrad(c=CAGRAD_C, norm_eps=0.0), cagrad_error),
    "upgrad": (lambda k: aggregation.UPGrad(projector=PROJECTOR), upgrad_error),
    "dualproj": (lambda k: aggregation.DualProj(projector=PROJECTOR), dualproj_error),
    "imtl_g": (lambda k: aggregation.IMTLG(), imtl_g_error),
    "aligned_mtl_min": (lambda k: aggregation.AlignedMTL(scale_mode="min"), aligned_error),
    "aligned_mtl_median": (lambda k: aggregation.AlignedMTL(scale_mode="median"), aligned_error),
    "aligned_mtl_rmse": (lambda k: aggregation.AlignedMTL(scale_mode="rmse"), aligned_error),
    "fairgrad_1": (lambda k: aggregation.FairGrad(alpha=1.0), fairgrad_error),
    "fairgrad_2": (lambda k: aggregation.FairGrad(alpha=2.0), fairgrad_error),
    "krum_1": (lambda k: aggregation.Krum(n_byzantine=1) if k > 3 else None, krum_error),
    "krum_2": (
        lambda k: aggregation.Krum(n_byzantine=1, n_selected=2) if k > 3 else None,
        krum_error,
    ),
    "gradvac": (lambda k: aggregation.GradVac(beta=0.5), exact),
    "pcgrad": (lambda k: aggregation.PCGrad(), exact),
    "cr_mogm": (
        lambda k: aggregation.GramianWeightedAggregator(
            aggregation.CRMOGMWeighting(aggregation.UPGradWeighting(projector=PROJECTOR), 0.9)
        ),
        exact,
    ),
}


def gram_method(name, g, *_):
    make, error = GRAM[name]
    aggregator = make(g.shape[1])
    if aggregator is None:
        return np.full((CALLS, P), np.nan), np.full(CALLS, np.nan)
    weighting = aggregator.gramian_weighting
    updates, errors = [], []
    for gradients in g:
        w = weighting(torch.tensor(gradients @ gradients.T)).numpy()
        updates.append(w @ gradients)
        errors.append(error(w, gradients, weighting) if np.isfinite(w).all() else 3.0)
    return np.array(updates), np.array(errors)


# Methods of the gradients themselves, and others.


def config(g, *_):
    aggregator = aggregation.ConFIG()
    updates = [aggregator(torch.tensor(gradients)).numpy() for gradients in g]
    errors = [config_error(*pair) for pair in zip(updates, g, strict=True)]
    return np.array(updates), np.array(errors)


def nash(g, *_):
    """Without clipping; the weights solve w (G w) = 1."""
    updates, errors = [], []
    for gradients in g:
        weighting = aggregation.NashMTL(len(gradients), max_norm=0.0).weighting
        alpha = weighting(torch.tensor(gradients)).numpy()
        updates.append(alpha @ gradients)
        errors.append(fair_error(alpha, gradients, 1.0))
    return np.array(updates), np.array(errors)


def graddrop(g, _, u):
    aggregator = aggregation.GradDrop()
    updates = []
    for gradients, draws in zip(g, u, strict=True):
        torch.rand, old = lambda *a, draws=draws, **b: torch.tensor(draws), torch.rand
        updates.append(aggregator(torch.tensor(gradients)).numpy())
        torch.rand = old
    return np.array(updates), np.zeros(CALLS)


def trimmed_mean(g, *_):
    if g.shape[1] < 3:
        return np.full((CALLS, P), np.nan), np.full(CALLS, np.nan)
    aggregator = aggregation.TrimmedMean(trim_number=1)
    updates = [aggregator(torch.tensor(gradients)).numpy() for gradients in g]
    return np.array(updates), np.zeros(CALLS)


def halves(g, weights):
    """Updates, where the second half of each batch has the Jacobian of the next call."""
    pairs = zip(g, np.roll(g, -1, 0), strict=True)
    return np.array([weights(a, b) @ (a + b) / 2 for a, b in pairs]), np.zeros(CALLS)


def modo(g, *_):
    """The matrix is divided by the mean of the traces of both Gram matrices."""
    weighting = aggregation.MoDoWeighting(gamma=0.5, rho=0.02)
    scale = lambda a, b: ((a**2).sum() + (b**2).sum()) / 2
    return halves(g, lambda a, b: weighting(torch.tensor(a @ b.T / scale(a, b))).numpy())


def sdmgrad(g, *_):
    """The step is that of a matrix of norm 1, whatever the mean of the diagonal is."""
    weighting = aggregation.SDMGradWeighting(lambda_=0.3)

    def weights(a, b):
        matrix = a @ b.T
        matrix /= np.linalg.norm(matrix)
        weighting.lr = float(np.sqrt(np.maximum(np.diag(matrix), 0)).mean() ** 2 + 1e-8)
        return weighting(torch.tensor(matrix)).numpy()

    return halves(g, weights)


def excess_mtl(g, *_):
    weighting = aggregation.ExcessMTLWeighting(robust_step_size=0.1, n_warmup_steps=1)
    updates = [weighting(torch.tensor(gradients)).numpy() @ gradients for gradients in g]
    return np.array(updates), np.zeros(CALLS)


# Scalarizers: the weights are the gradient by the losses. `update` follows each call.


def scalarizer(make, update=lambda module, optimizer, now, then: None):
    def method(g, values, _):
        module = make(values.shape[1])
        parameters = list(module.parameters())
        optimizer = torch.optim.Adam(parameters, lr=0.025) if parameters else None
        weights = []
        for call, now in enumerate(values):
            point = torch.tensor(now, requires_grad=True)
            for parameter in parameters:
                parameter.grad = None
            module(point).backward()
            weights.append(point.grad.numpy())
            then = torch.tensor(values[call + 1]) if call + 1 < CALLS else None
            update(module, optimizer, point, then)
        return np.array(weights), np.zeros(CALLS)

    return method


def famo_update(module, optimizer, now, then):
    if then is not None:
        module.update(then)


# Proportional to 1, 2, ..., k.
preference = lambda k: torch.arange(1.0, k + 1) / torch.arange(1, k + 1).sum()

SCALARIZERS = {
    "geometric_mean": scalarizer(lambda k: scalarization.GeometricMean()),
    "pbi": scalarizer(lambda k: scalarization.PBI(5.0, preference(k))),
    "cosmos": scalarizer(lambda k: scalarization.COSMOS(2.0, preference(k))),
    "imtl_l": scalarizer(scalarization.IMTLL, lambda m, optimizer, now, then: optimizer.step()),
    "uncertainty": scalarizer(scalarization.UW, lambda m, optimizer, now, then: optimizer.step()),
    # A decay that is seen in 5 calls.
    "famo": scalarizer(lambda k: scalarization.FAMO(k, weight_decay=0.5), famo_update),
    "dwa": scalarizer(lambda k: scalarization.DWA(), lambda m, optimizer, now, then: m.step()),
}


# LibMTL: the shared parameters are one vector, at which the losses have the given gradients.


def libmtl(name, folder, epochs=lambda call: 0, **settings):
    for package in ("LibMTL", "LibMTL.weighting"):
        module = sys.modules.setdefault(package, types.ModuleType(package))
        module.__path__ = [str(Path(folder, *package.split(".")))]
    rule = getattr(importlib.import_module(f"LibMTL.weighting.{name}"), name)

    def method(g, values, _):
        weighting = rule()
        point = torch.nn.Parameter(torch.zeros(P))
        weighting.task_num, weighting.device, weighting.rep_grad = g.shape[1], "cpu", False
        weighting.get_share_params = lambda: [point]
        weighting.zero_grad_share_params = lambda: point.grad.zero_()
        weighting.init_param()
        # The mean losses of the first epoch.
        weighting.train_loss_buffer = values[0][:, None]
        parameters = list(weighting.parameters())
        optimizer = torch.optim.Adam(parameters, lr=0.025) if parameters else None
        updates = []
        for call in range(CALLS):
            weighting.epoch = epochs(call)
            for parameter in (point, *parameters):
                parameter.grad = None
            at_point = torch.tensor(values[call]) + torch.tensor(g[call]) @ point
            with contextlib.redirect_stdout(None):
                weighting.backward(at_point, **settings)
            updates.append(point.grad.numpy().copy())
            if optimizer is not None:
                optimizer.step()
        return np.array(updates), np.zeros(CALLS)

    return method


def longest_one(method):
    """With each call's gradients divided by the longest, since Adam mixes the calls."""

    def scaled(g, *rest):
        longest = np.linalg.norm(g, axis=-1).max(-1)[:, None]
        updates, errors = method(g / longest[..., None], *rest)
        return longest * updates, errors

    return scaled


def libmtl_methods(folder):
    return {
        "db_mtl": libmtl("DB_MTL", folder, DB_beta=0.0, DB_beta_sigma=0.0),
        "gradnorm": longest_one(libmtl("GradNorm", folder, lambda call: 1, alpha=1.5)),
        # Two calls of warm-up, one for the nadir.
        "stch": libmtl(
            "STCH", folder, lambda call: max(call - 1, 0), STCH_mu=0.5, STCH_warmup_epoch=1
        ),
    }


def main(file, folder):
    torch.set_default_dtype(torch.float64)
    # Visits tasks in their order.
    torch.randperm = torch.arange
    # At its default tolerance of 1e-8, CAGrad's update is right to 1e-4 only.
    tight = dict.fromkeys(("tol_gap_abs", "tol_gap_rel", "tol_feas"), 1e-13)
    solve = cvxpy.Problem.solve
    cvxpy.Problem.solve = lambda problem, *a, **b: solve(
        problem, *a, **b, **(tight if cvxpy.CLARABEL in a else {})
    )
    methods = {name: functools.partial(gram_method, name) for name in GRAM}
    methods |= dict(config=config, nash=nash, graddrop=graddrop, trimmed_mean=trimmed_mean)
    methods |= dict(modo=modo, sdmgrad=sdmgrad, excess_mtl=excess_mtl)
    methods |= SCALARIZERS | libmtl_methods(folder)
    cases = [(family, k) for k in KS for family in FAMILIES]
    record = dict(
        versions=f"torchjd {importlib.metadata.version('torchjd')}, torch {torch.__version__}, "
        f"LibMTL {LIBMTL}",
    )
    pad = lambda a: np.pad(a, [(0, 0), (0, max(KS) - a.shape[1])] + [(0, 0)] * (a.ndim - 2))
    stack = lambda arrays: np.float32(np.stack(arrays))
    record["ks"] = np.int8([k for _, k in cases])
    record["families"] = [family for family, _ in cases]
    record["gradients"] = stack([pad(jacobians(*case)) for case in cases])
    record["losses"] = stack([pad(losses(*case)) for case in cases])
    record["uniforms"] = stack([uniforms(*case) for case in cases])
    for name, method in methods.items():
        found = [method(jacobians(*case), losses(*case), uniforms(*case)) for case in cases]
        values, errors = zip(*found, strict=True)
        if name in SCALARIZERS:
            values = [pad(value) for value in values]
        kind = "weights" if name in SCALARIZERS else "update"
        record |= {f"{name}/{kind}": stack(values), f"{name}/error": stack(errors)}
        defined = np.isfinite(record[f"{name}/{kind}"]).all(-1).sum()
        print(f"{name}: {(stack(errors) < 1e-4).sum()} of {defined} solved", flush=True)
    np.savez_compressed(file, **record)


if __name__ == "__main__":
    main(*sys.argv[1:])
