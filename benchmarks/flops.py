"""FLOPs of a DiT's train step, counted from the architecture, and the peak FLOPs of devices.

A FLOP is one multiplication or one addition. The count includes the matrix products and the two
products of attention, at 2 FLOPs per multiply-add. It excludes costs that depend only on the
number of activations or parameters: norms, softmax, GELU, residual sums, the loss, AdamW and the
moving average. By XLA's count these add 0.8 % to a train step of DiT-S/2 and 0.3 % to L/2.
"""

from typing import NamedTuple

from ant_jax.models.dit import MLP_RATIO, TIMESTEP_FEATURES, DiT

# Dense bfloat16 TFLOP/s of one device, by its device kind in JAX. Sources: for GPUs NVIDIA's data
# sheets (A100 2020; H100 SXM 2023 and H200 2024, which print twice this, with sparsity), for TPUs
# the pages "TPU v4" to "TPU v6e" of Google Cloud's documentation.
PEAK_TFLOPS = {
    "NVIDIA A100-SXM4-40GB": 312,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA A100-PCIE-40GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H200": 989,
    "TPU v4": 275,
    "TPU v5 lite": 197,
    "TPU v5": 459,
    "TPU v6 lite": 918,
}


class Products(NamedTuple):
    """Multiply-adds of one example's forward pass.

    Attributes:
      first: those of layers whose input needs no gradient: patches and timestep features.
      rest: those of all other layers.
    """

    first: int
    rest: int


def products(model: DiT, height: int, width: int) -> Products:
    """Counts the multiply-adds of a DiT's forward pass on one input of height x width.

    Their sum is what Peebles & Xie (ICCV 2023, arXiv 2212.09748) call FLOPs.
    """
    tokens = _tokens(model, height, width)
    features, patch = model.width, model.patch**2 * model.channels
    block, _ = _block(model, tokens)
    outputs = patch * (2 if model.learned_variance else 1)
    first = tokens * patch * features + TIMESTEP_FEATURES * features
    rest = features**2 + model.depth * block + 2 * features**2 + tokens * features * outputs
    return Products(first, rest)


def _tokens(model, height, width):
    return (height // model.patch) * (width // model.patch)


def _block(model, tokens):
    """Multiply-adds of a block, and those of attention's two products among them."""
    per_token = (3 + 1 + 2 * MLP_RATIO) * model.width**2
    attention = 2 * tokens**2 * model.width
    return tokens * per_token + attention + 6 * model.width**2, attention


def forward_flops(model: DiT, height: int, width: int) -> int:
    """FLOPs of the forward pass of a DiT on one input of height x width."""
    return 2 * sum(products(model, height, width))


def gradient_flops(model: DiT, height: int, width: int) -> int:
    """FLOPs of the loss and its gradient on one input of height x width, without recomputation.

    The backward pass computes two more products for each product, the gradients of its two factors.
    Inputs of the network need no gradient. Model FLOPs utilisation (MFU) counts exactly these FLOPs
    and no recomputation (Chowdhery et al., *PaLM*, 2022, appendix B).
    """
    first, rest = products(model, height, width)
    return 2 * (2 * first + 3 * rest)


def step_flops(model: DiT, height: int, width: int) -> int:
    """`gradient_flops`, and what the model's ``remat`` computes again in the backward pass."""
    block, attention = _block(model, _tokens(model, height, width))
    again = {"none": 0, "dots": attention, "blocks": block}[model.remat]
    return gradient_flops(model, height, width) + 2 * model.depth * again


def combine_flops(num_params: int, k: int) -> int:
    """FLOPs of the Gram matrix of k gradients and of their weighted sum."""
    return 2 * k * k * num_params + 2 * k * num_params
