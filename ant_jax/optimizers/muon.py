"""Muon: orthogonal updates of matrices."""

from typing import Annotated

import jax
import optax
from optax.contrib import MuonDimensionNumbers

from ant_jax.optimizers.by_name import matching
from ant_jax.optimizers.optimizer import Optimizer
from ant_jax.settings import Integer, Number, Pattern

_MATRIX = MuonDimensionNumbers(0, 1)
# Of height, width, input and output: a matrix from all inputs of a pixel to its outputs.
_CONVOLUTION = MuonDimensionNumbers((0, 1, 2), 3)


def muon(
    learning_rate: optax.Schedule,
    weight_decay: float,
    mask=None,
    beta: Annotated[float, Number(0, 0.999999)] = 0.95,
    ns_steps: Annotated[int, Integer(1, 100)] = 5,
    rms: Annotated[float, Number(above=0)] = 0.2,
    adam: Pattern = "embedding|^output/",
    b1: Annotated[float, Number(0, 0.999999)] = 0.9,
    b2: Annotated[float, Number(0, 0.999999)] = 0.999,
    eps: Annotated[float, Number(above=0)] = 1e-8,
) -> Optimizer:
    """Muon (Jordan et al. 2024) for matrices and convolutions, Adam for all other parameters.

    An update is the orthogonal matrix nearest to a momentum, by Newton-Schulz steps. The factor
    ``rms`` makes learning rates and weight decays those of AdamW (Liu et al., *Muon is Scalable for
    LLM Training*, arXiv 2502.16982).

    Args:
      learning_rate: of each step.
      weight_decay: times the learning rate: the share of each parameter that a step removes.
      mask: ``params -> booleans``, the parameters that decay; None for all.
      beta: decay of the momentum.
      ns_steps: number of Newton-Schulz steps.
      rms: root mean square of the entries of an update, divided by the learning rate; AdamW's is
        about 0.2.
      adam: regular expression for the matrices that Adam updates too.
      b1: decay of Adam's mean of the gradients.
      b2: decay of Adam's mean of their squares.
      eps: added to the root of Adam's mean square, and to norms.
    """

    def axes(params):
        by_adam = matching(params, adam) if adam else jax.tree.map(lambda _: False, params)
        of = lambda leaf, excluded: (
            None if excluded else {2: _MATRIX, 4: _CONVOLUTION}.get(leaf.ndim)
        )
        return jax.tree.map(of, params, by_adam)

    direction = optax.contrib.muon(
        # The sign of a gradient: what follows is the same for matrices and others, as in AdamW.
        -1.0,
        ns_steps=ns_steps,
        beta=beta,
        eps=eps,
        adam_b1=b1,
        adam_b2=b2,
        muon_weight_dimension_numbers=axes,
        consistent_rms=rms,
    )

    def update(updates, state, params=None):
        with jax.default_matmul_precision("highest"):
            return direction.update(updates, state, params)

    return Optimizer(
        optax.chain(
            optax.GradientTransformation(direction.init, update),
            optax.add_decayed_weights(weight_decay, mask),
            optax.scale_by_learning_rate(learning_rate),
        )
    )
