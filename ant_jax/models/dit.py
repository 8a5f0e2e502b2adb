"""DiT, a diffusion transformer with adaLN-Zero conditioning.

Peebles & Xie, *Scalable Diffusion Models with Transformers* (ICCV 2023, arXiv 2212.09748). Widths,
initialisation and the order of channels in every parameter follow the paper's code, so its weights
can be used here after transposing them.
"""

import functools
from typing import Annotated, Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ant_jax.models.attention import (
    Attention,
    Implementation,
    check_attention,
    check_attention_devices,
)
from ant_jax.models.linear import Dense, SplitDense
from ant_jax.models.network import check_fields
from ant_jax.models.norms import RMSNorm, modulated_norm
from ant_jax.models.remat import Remat, rematerialised
from ant_jax.models.routing import routing_mask
from ant_jax.models.timesteps import LEVEL_SCALE, MAX_PERIOD, timestep_features
from ant_jax.settings import Integer, Number

# Table 1 of the paper. For example, DiT-XL/2 on latents is DiT(channels=4, patch=2, **SIZES["XL"]).
SIZES = {
    "S": dict(depth=12, width=384, heads=6),
    "B": dict(depth=12, width=768, heads=12),
    "L": dict(depth=24, width=1024, heads=16),
    "XL": dict(depth=28, width=1152, heads=16),
}

TIMESTEP_FEATURES = 256
MLP_RATIO = 4

_Dense = functools.partial(Dense, kernel_init=nn.initializers.xavier_uniform())
_SplitDense = functools.partial(SplitDense, kernel_init=nn.initializers.xavier_uniform())
_ZeroDense = functools.partial(Dense, kernel_init=nn.initializers.zeros)


class DiT(nn.Module):
    """A diffusion transformer (Peebles & Xie 2023) on images or latents, square or not.

    The output is exactly zero at initialisation. For every `dtype`, the parameters, the layer-norm
    statistics, the timestep embedding and the output layer are float32.

    Attributes:
      channels: Channels C of the input.
      num_classes: Number of classes; 0 for an unconditional model, without a label table.
      learned_variance: Whether to return C more channels, which parametrise the variance.
      dtype: Type of the activations.
      width: Features of a token; a multiple of `heads`, and of 4 for the position encoding.
      depth: Number of transformer blocks.
      heads: Attention heads.
      patch: Side in pixels of the square patch that becomes one token: 1, 2, 4 or 8.
      remat: Which activations of each block are kept for the backward pass. Keeping fewer saves
        memory, costs time, and changes no value: see `ant_jax.models.remat.rematerialised`.
      norm: "layer", or "rms" without the mean (Zhang & Sennrich 2019).
      qk_norm: Whether queries and keys are divided by their root mean square, with a learned scale
        for each channel of a head. Attention logits then cannot grow without limit, which makes
        training in bfloat16 diverge (Dehghani et al. 2023; Esser et al. 2024).
      mlp: "gelu", or "swiglu" (Shazeer 2020) with 2/3 of the hidden features and so as many
        parameters.
      position: "sincos", added to the tokens, or "rotary": queries and keys are rotated by their
        row and column (Su et al. 2021), so that attention depends on differences of positions. It
        needs heads of a multiple of 4 features.
      routing: Share of the channels that each noise level uses in the blocks; 1 is all. Denoising
        task routing (see `ant_jax.models.routing`) has 0.8.
      routing_power: Above 1, the windows of channels of low noise levels overlap more.
      routing_levels: Number of windows: T for integer noise levels.
      level_scale: Noise levels that are floats are multiplied by this in the timestep embedding.
        1 as in the code of SiT, or 1000 as for a thousand timesteps.
      attention: "xla" or "cudnn": see `ant_jax.models.attention.Attention`.

    Raises:
      ValueError: On construction, if a field is not as above.
    """

    channels: int
    num_classes: int = 0
    learned_variance: bool = False
    dtype: Any = jnp.float32
    width: Annotated[int, Integer(4, 2**16)] = 64
    depth: Annotated[int, Integer(1, 1024)] = 4
    heads: Annotated[int, Integer(1)] = 4
    patch: Literal[1, 2, 4, 8] = 4
    remat: Remat = "none"
    attention: Attention = "xla"
    norm: Literal["layer", "rms"] = "layer"
    qk_norm: bool = False
    mlp: Literal["gelu", "swiglu"] = "gelu"
    position: Literal["sincos", "rotary"] = "sincos"
    routing: Annotated[float, Number(0.01, 1)] = 1.0
    routing_power: Annotated[float, Number(above=0)] = 4.0
    routing_levels: Annotated[int, Integer(2, 10_000)] = 1000
    level_scale: Annotated[float, Number(above=0)] = LEVEL_SCALE

    def __post_init__(self):
        check_fields(self)
        if self.width % self.heads or self.width % 4:
            raise ValueError(
                f"width must be a multiple of heads ({self.heads}) and of 4, not {self.width}."
            )
        if self.position == "rotary" and self.width // self.heads % 4:
            raise ValueError(
                "position 'rotary' needs heads of a multiple of 4 features, not "
                f"{self.width // self.heads}."
            )
        check_attention(self.attention, self.width // self.heads, self.dtype)
        super().__post_init__()

    @property
    def input_multiple(self) -> int:
        """H and W must be multiples of this."""
        return self.patch

    def check_devices(self) -> None:
        """Raises a ValueError if the current devices don't support its `attention`."""
        check_attention_devices(self.attention)

    @nn.compact
    def __call__(self, x: jax.Array, t: jax.Array, y: jax.Array | None = None) -> jax.Array:
        """Predicts the noise, and the variance parameters if the model learns them.

        Args:
          x: Noisy input (B, H, W, C), with H and W multiples of `patch`.
          t: Noise levels (B,), integers or floats in [0, 1].
          y: Labels (B,), integers in `[0, num_classes]`, where `num_classes` is the null class of
            classifier-free guidance, or None for an unconditional model. The caller drops labels.

        Returns:
          Float32 array (B, H, W, C), or (B, H, W, 2C) with the noise in the first C channels and
          the variance in the last C.

        Raises:
          ValueError: If the shape of `x` doesn't match `patch` and `channels`, if a conditional
            model gets no labels, or if an unconditional model gets labels.
        """
        batch, height, width, channels = x.shape
        if height % self.patch or width % self.patch or channels != self.channels:
            raise ValueError(
                f"x must have shape (B, H, W, {self.channels}) with H and W multiples of the patch "
                f"size {self.patch}, not {x.shape}."
            )
        if (y is None) != (self.num_classes == 0):
            raise ValueError(
                f"y must be {'given' if self.num_classes else 'None'} for {self.num_classes} "
                "classes."
            )
        rows, columns, p = height // self.patch, width // self.patch, self.patch

        x = x.reshape(batch, rows, p, columns, p, channels).swapaxes(2, 3)
        x = x.reshape(batch, rows * columns, p * p * channels)
        x = _Dense(self.width, dtype=self.dtype, name="patch_embedding")(x)
        if self.position == "sincos":
            x += positions(rows, columns, self.width).astype(x.dtype)

        embedding = functools.partial(Dense, kernel_init=nn.initializers.normal(0.02))
        features = timestep_features(t, TIMESTEP_FEATURES, self.level_scale)
        condition = embedding(self.width, name="timestep_hidden")(features)
        condition = embedding(self.width, name="timestep_embedding")(nn.silu(condition))
        if y is not None:
            condition += nn.Embed(
                self.num_classes + 1,
                self.width,
                embedding_init=nn.initializers.normal(0.02),
                name="label_embedding",
            )(y)
        # Every modulation begins with this SiLU, so it is computed only once.
        condition = nn.silu(condition).astype(self.dtype)

        block = functools.partial(
            rematerialised(_Block, self.remat),
            width=self.width,
            heads=self.heads,
            dtype=self.dtype,
            attention=self.attention,
            norm=self.norm,
            qk_norm=self.qk_norm,
            mlp=self.mlp,
            grid=(rows, columns) if self.position == "rotary" else None,
        )
        mask = None
        if self.routing < 1:
            settings = self.routing_levels, self.width, self.routing, self.routing_power
            mask = routing_mask(t, *settings)[:, None].astype(self.dtype)
        for i in range(self.depth):
            layer = block(name=f"block_{i}")
            x = layer(x, condition) if mask is None else layer(x * mask, condition) + x * (1 - mask)

        modulation = _ZeroDense(2 * self.width, dtype=self.dtype, name="modulation")(condition)
        x = modulated_norm(x, *jnp.split(modulation, 2, axis=-1), self.norm, self.dtype)
        outputs = channels * (2 if self.learned_variance else 1)
        x = _ZeroDense(p * p * outputs, dtype=jnp.float32, name="output")(x)
        x = x.reshape(batch, rows, columns, p, p, outputs).swapaxes(2, 3)
        return x.reshape(batch, height, width, outputs)


class _Block(nn.Module):
    """A transformer block with adaLN-Zero, on tokens (B, N, width) and a condition (B, width)."""

    width: int
    heads: int
    dtype: Any
    attention: Implementation
    norm: Literal["layer", "rms"]
    qk_norm: bool
    mlp: str
    grid: tuple[int, int] | None

    @nn.compact
    def __call__(self, x: jax.Array, condition: jax.Array) -> jax.Array:
        modulation = _ZeroDense(6 * self.width, dtype=self.dtype, name="modulation")(condition)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = jnp.split(modulation, 6, axis=-1)

        h = modulated_norm(x, shift_1, scale_1, self.norm, self.dtype)
        qkv = _SplitDense(3 * self.width, 3, dtype=self.dtype, name="qkv")(h)
        by_head = (*x.shape[:2], self.heads, self.width // self.heads)
        query, key, value = (each.reshape(by_head) for each in qkv)
        if self.qk_norm:
            query = RMSNorm(epsilon=1e-6, dtype=self.dtype, name="query_norm")(query)
            key = RMSNorm(epsilon=1e-6, dtype=self.dtype, name="key_norm")(key)
        if self.grid is not None:
            angles = rotary_angles(*self.grid, self.width // self.heads)
            query, key = _rotated(query, angles), _rotated(key, angles)
        h = jax.nn.dot_product_attention(query, key, value, implementation=self.attention)
        h = _Dense(self.width, dtype=self.dtype, name="attention_output")(h.reshape(x.shape))
        x += gate_1[:, None] * h

        h = modulated_norm(x, shift_2, scale_2, self.norm, self.dtype)
        if self.mlp == "swiglu":
            hidden = MLP_RATIO * self.width * 2 // 3
            h = _Dense(2 * hidden, dtype=self.dtype, name="mlp_hidden")(h)
            gate, h = jnp.split(h, 2, axis=-1)
            h *= nn.silu(gate)
        else:
            hidden = MLP_RATIO * self.width
            h = _Dense(hidden, dtype=self.dtype, activation=nn.gelu, name="mlp_hidden")(h)
        h = _Dense(self.width, dtype=self.dtype, name="mlp_output")(h)
        return x + gate_2[:, None] * h


def _rotated(x: jax.Array, angles: np.ndarray) -> jax.Array:
    """Rotates pairs of features of (B, N, heads, features), the first half with the second."""
    cos, sin = (part.astype(np.float32)[:, None] for part in (np.cos(angles), np.sin(angles)))
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
    return turned.astype(x.dtype)


def rotary_angles(rows: int, columns: int, head: int) -> np.ndarray:
    """The angles by which the features of a head are rotated at each position.

    Args:
      rows: number of rows of tokens.
      columns: number of columns of tokens.
      head: features of a head, a multiple of 4.

    Returns:
      (rows * columns, head / 2) float64: half of them turn with the row, half with the column.
    """
    quarter = head // 4
    frequencies = MAX_PERIOD ** (-np.arange(quarter) / quarter)
    row, column = np.divmod(np.arange(rows * columns), columns)
    return np.concatenate([row[:, None] * frequencies, column[:, None] * frequencies], 1)


def positions(rows: int, columns: int, width: int) -> np.ndarray:
    """The fixed 2-D encoding of the positions of tokens.

    Args:
      rows: number of rows of tokens.
      columns: number of columns of tokens.
      width: features of a token, a multiple of 4.

    Returns:
      (rows * columns, width) float64: sines and cosines of the column index, then of the row index.
    """
    quarter = width // 4
    frequencies = MAX_PERIOD ** (-np.arange(quarter) / quarter)
    row, column = np.divmod(np.arange(rows * columns), columns)
    parts = []
    for coordinate in (column, row):
        angles = coordinate[:, None] * frequencies
        parts += [np.sin(angles), np.cos(angles)]
    return np.concatenate(parts, axis=-1)
