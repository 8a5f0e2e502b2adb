"""Times one call of each weighting under jit: ``python -m benchmarks.weighting``.

With ``--torchjd`` it also times the weightings of TorchJD on the same Gram matrices, where that
package is installed. All calls of one k take turns in one process, so other work on the machine
affects all of them. PyTorch uses one thread.
"""

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ant_jax import mtl, settings

KINDS = ("random", "nearly parallel", "opposed")
# The class of each method in `torchjd.aggregation`, and its arguments.
TORCHJD = {
    "aligned_mtl": ("AlignedMTLWeighting", {}),
    "cagrad": ("CAGradWeighting", {"c": 0.4}),
    "dualproj": ("DualProjWeighting", {}),
    "fairgrad": ("FairGradWeighting", {"alpha": 1.0}),
    "gradvac": ("GradVacWeighting", {}),
    "imtl_g": ("IMTLGWeighting", {}),
    "krum": ("KrumWeighting", {"n_byzantine": 1}),
    "mgda": ("MGDAWeighting", {}),
    "pcgrad": ("PCGradWeighting", {}),
    "upgrad": ("UPGradWeighting", {}),
}


def main():
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--torchjd", action="store_true", help="time TorchJD too")
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--k", type=int, nargs="+", default=[2, 5, 8, 20])
    args = parser.parse_args()
    columns = [f"us, {kind}" for kind in KINDS]
    if args.torchjd:
        columns += [f"TorchJD us, {kind}" for kind in KINDS]
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}; medians of {args.repeats} calls")
    print(f"| k | weighting | {' | '.join(columns)} |\n|{' --- |' * (2 + len(columns))}")
    for k in args.k:
        calls = ours(k)
        if args.torchjd:
            calls |= torchjd(k)
        times = median_us(calls, args.repeats)
        for name in settings.names_in(mtl, mtl.Weighting):
            rows = [("ours", name, kind) for kind in KINDS]
            rows += [("torchjd", name, kind) for kind in KINDS] * args.torchjd
            cells = [f"{times[row]:.0f}" if row in times else "" for row in rows]
            print(f"| {k} | {name} | {' | '.join(cells)} |", flush=True)


def grams(k: int) -> dict[str, np.ndarray]:
    """The Gram matrices, float32 (k, k), by the kind of their gradients."""
    rng = np.random.default_rng(k)
    gradients = {"random": rng.normal(size=(k, 100))}
    gradients["nearly parallel"] = rng.normal(size=100) + 1e-3 * gradients["random"]
    gradients["opposed"] = np.concatenate([gradients["random"][:-1], -gradients["random"][:1]])
    return {kind: (g @ g.T).astype(np.float32) for kind, g in gradients.items()}


def ours(k: int) -> dict[tuple[str, str, str], Callable[[], Any]]:
    """Calls of our weightings, by ("ours", method, kind)."""
    calls = {}
    for name in settings.names_in(mtl, mtl.Weighting):
        weighting = settings.resolve(mtl, name, mtl.Weighting)(k)
        weigh, state = jax.jit(weighting.weigh), weighting.init()
        for kind, gram in grams(k).items():
            # Without the Gram matrix, all kinds are the same.
            if kind == KINDS[0] or "gram" in weighting.needs:
                stats = mtl.TaskStats(jnp.ones(k), jnp.asarray(gram), jnp.ones(k))
                calls["ours", name, kind] = functools.partial(weigh, stats, state)
    return calls


def torchjd(k: int) -> dict[tuple[str, str, str], Callable[[], Any]]:
    """Calls of TorchJD's weightings, by ("torchjd", method, kind)."""
    import torch
    from torchjd import aggregation

    torch.set_num_threads(1)
    calls = {}
    for name, (attribute, arguments) in TORCHJD.items():
        if name == "krum" and k < 4:
            continue
        make = getattr(aggregation, attribute)
        weighting = make(**arguments)
        for kind, gram in grams(k).items():
            calls["torchjd", name, kind] = functools.partial(weighting, torch.from_numpy(gram))
    return calls


def median_us(
    calls: dict[tuple[str, str, str], Callable[[], Any]], repeats: int
) -> dict[tuple[str, str, str], float]:
    """Median microseconds of each call."""
    times = {row: [] for row in calls}
    for call in calls.values():
        jax.block_until_ready(call())
    rows, rng = list(calls), np.random.default_rng(0)
    for _ in range(repeats):
        # In random order: a call after another of the same method finds its code in the cache.
        for i in rng.permutation(len(rows)):
            row, call = rows[i], calls[rows[i]]
            start = time.perf_counter()
            result = call()
            if row[0] == "ours":
                jax.block_until_ready(result)
            times[row].append(time.perf_counter() - start)
    return {row: 1e6 * float(np.median(values)) for row, values in times.items()}


if __name__ == "__main__":
    main()
