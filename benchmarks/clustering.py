"""Times the interval costs and the dynamic programme: ``python -m benchmarks.clustering``."""

import statistics
import time

import numpy as np

from ant_jax.tasks import clustering


def main():
    print(f"{'n':>5} {'k':>3} {'costs':<9} {'costs ms':>9} {'programme ms':>13} {'total ms':>9}")
    for n, k, repeats in ((1000, 5, 15), (4000, 5, 3)):
        t = np.arange(n)
        alphas_bar = np.cos((t + 1) / (n + 1) * np.pi / 2) ** 2
        log_snr = np.log(alphas_bar) - np.log1p(-alphas_bar)
        affinity = np.exp(-np.abs(t - t[:, None]) / n)
        kinds = {
            "timestep": lambda n=n: clustering.timestep_costs(n),
            "snr": lambda log_snr=log_snr: clustering.snr_costs(log_snr),
            "gradient": lambda affinity=affinity: clustering.gradient_costs(affinity),
        }
        for kind, build in kinds.items():
            costs = build()
            build_ms = _median_ms(build, repeats)
            solve_ms = _median_ms(
                lambda costs=costs, k=k: clustering.interval_clusters(costs, k), repeats
            )
            total_ms = build_ms + solve_ms
            print(f"{n:5} {k:3} {kind:<9} {build_ms:9.1f} {solve_ms:13.1f} {total_ms:9.1f}")


def _median_ms(function, repeats):
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


if __name__ == "__main__":
    main()
