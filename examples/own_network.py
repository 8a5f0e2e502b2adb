"""A network of your own: a perceptron on the digits, as any Flax module (x, t, y) -> output.

python examples/own_network.py
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ant_jax.config.file import read
from ant_jax.train import train


class Perceptron(nn.Module):
    """Two layers over pixels, the noise level and the label; predicts the noise."""

    width: int = 512
    num_classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, t: jax.Array, y: jax.Array) -> jax.Array:
        level = jnp.sin(t[:, None] / 1000 * 2.0 ** jnp.arange(8))
        # One more row for labels that are dropped.
        inputs = (x.reshape(len(x), -1), level, jax.nn.one_hot(y, self.num_classes + 1))
        hidden = nn.silu(nn.Dense(self.width)(jnp.concatenate(inputs, axis=1)))
        hidden = nn.silu(nn.Dense(self.width)(hidden))
        return nn.Dense(x[0].size)(hidden).reshape(x.shape)


def main(workdir: str = "runs/own_network", num_steps: int = 200) -> None:
    config = read("configs/digits.py:nash")
    config.num_steps = num_steps
    train(config, workdir, model=Perceptron())


if __name__ == "__main__":
    main()
