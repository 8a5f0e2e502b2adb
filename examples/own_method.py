"""A weighting of your own: random loss weighting (Lin et al., 2022) on the digits.

python examples/own_method.py
"""

import jax
import jax.numpy as jnp

from ant_jax.config.file import read
from ant_jax.mtl import TaskStats, Weighting
from ant_jax.train import train


def random_weights(k: int, seed: int = 0, temperature: float = 1.0) -> Weighting:
    """Weights that are the softmax of normal numbers, drawn anew at each step."""

    def weigh(stats: TaskStats, count: jax.Array) -> tuple[jax.Array, jax.Array]:
        key = jax.random.fold_in(jax.random.key(seed), count)
        logits = jax.random.normal(key, (k,)) / temperature
        return jax.nn.softmax(jnp.where(stats.counts > 0, logits, -jnp.inf)), count + 1

    return Weighting(init=lambda: jnp.int32(0), weigh=weigh, k=k, needs=frozenset())


def main(workdir: str = "runs/own_method", num_steps: int = 200) -> None:
    config = read("configs/digits.py:linear")
    config.num_steps = num_steps
    train(config, workdir, weighting=random_weights(config.clusters.k))


if __name__ == "__main__":
    main()
