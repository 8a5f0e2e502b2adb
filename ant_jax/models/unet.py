"""The UNets of ADM and of LDM: residual blocks and self-attention at several resolutions.

Dhariwal & Nichol, *Diffusion Models Beat GANs on Image Synthesis* (NeurIPS 2021, arXiv 2105.05233),
section 3; Rombach et al., *High-Resolution Image Synthesis with Latent Diffusion Models* (CVPR
2022, arXiv 2112.10752), whose unconditional UNet is the same network with other settings.

Parameters correspond one to one to those of the papers' code (openai/guided-diffusion, `unet.py`;
CompVis/latent-diffusion, `openaimodel.py`): module `input_3_1` here is `input_blocks.3.1` there,
`middle_2` is `middle_block.2` and `output_5_0` is `output_blocks.5.0`. Kernels are only transposed.
The 3 C channels of `qkv` are ordered by head, and inside a head by query, key and value, as in that
code with its default attention order. `ant_jax.models.unet_weights` has the names.
"""

import functools
from collections.abc import Callable
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ant_jax.models.attention import (
    Attention,
    Implementation,
    check_attention,
    check_attention_devices,
)
from ant_jax.models.network import check_fields
from ant_jax.models.norms import GroupNorm
from ant_jax.models.remat import Remat, rematerialised
from ant_jax.models.timesteps import timestep_features
from ant_jax.settings import Check, Integer

# Published architectures, for UNet(channels=3, **VARIANTS["LDM-4"]).
# The settings of ADM are the flags in its repository's list of checkpoints. Those of LDM are from
# its configs for FFHQ and CelebA-HQ, on latents of 64 x 64 x 3. ADM-light-256 is the network of
# Choi et al., *Perception Prioritized Training of Diffusion Models* (CVPR 2022).
VARIANTS = {
    "ADM-64": dict(
        width=192,
        channel_mult=(1, 2, 3, 4),
        num_res_blocks=3,
        attention_factors=(2, 4, 8),
        head_channels=64,
    ),
    "ADM-128": dict(
        width=256,
        channel_mult=(1, 1, 2, 3, 4),
        num_res_blocks=2,
        attention_factors=(4, 8, 16),
        head_channels=0,
        num_heads=4,
    ),
    "ADM-256": dict(
        width=256,
        channel_mult=(1, 1, 2, 2, 4, 4),
        num_res_blocks=2,
        attention_factors=(8, 16, 32),
        head_channels=64,
    ),
    "ADM-512": dict(
        width=256,
        channel_mult=(0.5, 1, 1, 2, 2, 4, 4),
        num_res_blocks=2,
        attention_factors=(16, 32, 64),
        head_channels=64,
    ),
    "ADM-light-256": dict(
        width=128,
        channel_mult=(1, 1, 2, 2, 4, 4),
        num_res_blocks=1,
        attention_factors=(16,),
        head_channels=64,
    ),
    "LDM-4": dict(
        width=224,
        channel_mult=(1, 2, 3, 4),
        num_res_blocks=2,
        attention_factors=(2, 4, 8),
        head_channels=32,
        scale_shift_norm=False,
        resblock_updown=False,
    ),
}

_GROUPS = 32

# A third of LeCun's variance: the initialisation of PyTorch, and so of the papers' code.
_kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
_Dense = functools.partial(nn.Dense, kernel_init=_kernel_init)
_ZeroDense = functools.partial(nn.Dense, kernel_init=nn.initializers.zeros)
# Explicit padding, because "SAME" with a stride of 2 would pad on one side only.
_Conv = functools.partial(nn.Conv, kernel_size=(3, 3), padding=1, kernel_init=_kernel_init)
_ZeroConv = functools.partial(_Conv, kernel_init=nn.initializers.zeros)
# Computes in float32, for all types of input and output.
_GroupNorm = functools.partial(GroupNorm, num_groups=_GROUPS, epsilon=1e-5)


_Multiples = Annotated[
    tuple[float, ...],
    Check(
        lambda values: (
            bool(values) and all(type(x) in (int, float) and 0 < x <= 64 for x in values)
        ),
        "numbers > 0 and <= 64 as '(1, 2)'",
    ),
]
_Factors = Annotated[
    tuple[int, ...],
    Check(
        lambda values: all(type(x) is int and x >= 1 for x in values), "integers >= 1 as '(2, 4)'"
    ),
]


class UNet(nn.Module):
    """The UNet of ADM (Dhariwal & Nichol 2021) or, with other settings, LDM (Rombach et al. 2022).

    It is called like `DiT`. At initialisation the output is exactly zero, and each residual block
    and each attention adds exactly zero to its input. Biases are initialised to zero; the papers'
    code initialises them at random. For every `dtype`, the parameters, the inside of group norms,
    the embedding of timestep and label, and the output layer are float32. There is no dropout.

    Attributes:
      channels: Channels C of the input.
      num_classes: Number of classes; 0 for an unconditional model, without a label table.
      learned_variance: Whether to return C more channels, which parametrise the variance.
      dtype: Type of the activations.
      width: Channels at a multiplier of 1, and features of the sinusoidal timestep encoding.
      channel_mult: Channels of each level, in multiples of `width`. Each level after the first has
        half the resolution of the level before. The channels of a level are a multiple of 32.
      num_res_blocks: Residual blocks per level on the way down; there is one more on the way up.
      attention_factors: Downsampling factors, powers of 2, at which attention follows each residual
        block. For an image of 256 x 256, factor 8 is the level of 32 x 32. There is always
        attention in the middle.
      head_channels: Channels per attention head; divides the channels of every level with
        attention. 0 if `num_heads` is set.
      num_heads: Number of attention heads, as in ADM for 128 x 128; 0 if `head_channels` is set.
      scale_shift_norm: Whether the condition scales and shifts the normalised activations, as in
        ADM; otherwise it is added before the norm, as in LDM.
      resblock_updown: Whether residual blocks change the resolution, as in ADM; otherwise
        convolutions change it, as in LDM.
      remat: Which activations of each residual block and each attention are kept for the backward
        pass. Keeping fewer saves memory, costs time, and changes no value: see
        `ant_jax.models.remat.rematerialised`.
      attention: "xla" or "cudnn": see `ant_jax.models.attention.Attention`.

    Raises:
      ValueError: On construction, if a field is not as above.
    """

    channels: int
    num_classes: int = 0
    learned_variance: bool = False
    dtype: Any = jnp.float32
    width: Annotated[int, Integer(4, 2**16)] = 64
    channel_mult: _Multiples = (1, 2)
    num_res_blocks: Annotated[int, Integer(1, 64)] = 2
    attention_factors: _Factors = (2,)
    head_channels: Annotated[int, Integer(0)] = 32
    num_heads: Annotated[int, Integer(0)] = 0
    scale_shift_norm: bool = True
    resblock_updown: bool = True
    remat: Remat = "none"
    attention: Attention = "xla"

    def __post_init__(self):
        check_fields(self)
        if self.width % 2:
            raise ValueError(f"width must be even, not {self.width}.")
        heads, value = max(
            ("head_channels", self.head_channels), ("num_heads", self.num_heads), key=lambda x: x[1]
        )
        if value < 1 or min(self.head_channels, self.num_heads) != 0:
            raise ValueError(
                "one of head_channels and num_heads must be positive and the other 0, not "
                f"{self.head_channels} and {self.num_heads}."
            )
        factors = [2**level for level in range(len(self.channel_mult))]
        for factor in self.attention_factors:
            if factor not in factors:
                raise ValueError(f"attention_factors must be among {factors}, not {factor}.")
        for factor, mult in zip(factors, self.channel_mult, strict=True):
            channels = self.width * mult
            if channels % _GROUPS:
                raise ValueError(
                    f"width * channel_mult must be a multiple of {_GROUPS}, the groups of a group "
                    f"norm, not {self.width} * {mult}."
                )
            attends = factor in self.attention_factors or factor == factors[-1]
            if attends and channels % value:
                raise ValueError(
                    f"{heads} must divide the {channels} channels at the downsampling factor "
                    f"{factor}, where attention is, not {value}."
                )
            if attends:
                head = int(channels // self.num_heads) if self.num_heads else self.head_channels
                check_attention(self.attention, head, self.dtype)
        super().__post_init__()

    @property
    def input_multiple(self) -> int:
        """What H and W must be multiples of."""
        return 2 ** (len(self.channel_mult) - 1)

    def check_devices(self) -> None:
        """Raises a ValueError if the devices that are there can't compute its attention."""
        check_attention_devices(self.attention)

    @nn.compact
    def __call__(self, x: jax.Array, t: jax.Array, y: jax.Array | None = None) -> jax.Array:
        """Predicts the noise, and the variance parameters if the model learns them.

        Args:
          x: Noisy input (B, H, W, C), with H and W multiples of `input_multiple`.
          t: Noise levels (B,), integers or floats in [0, 1].
          y: Labels (B,), integers in `[0, num_classes]`, where `num_classes` is the null class of
            classifier-free guidance, or None for an unconditional model. The caller drops labels.

        Returns:
          Float32 array (B, H, W, C), or (B, H, W, 2C) with the noise in the first C channels and
          the variance in the last C.

        Raises:
          ValueError: If the shape of `x` doesn't match `channel_mult` and `channels`, if a
            conditional model gets no labels, or if an unconditional model gets labels.
        """
        levels = len(self.channel_mult)
        multiple = self.input_multiple
        if x.shape[1] % multiple or x.shape[2] % multiple or x.shape[3] != self.channels:
            raise ValueError(
                f"x must have shape (B, H, W, {self.channels}) with H and W multiples of "
                f"{multiple}, for {levels} levels, not {x.shape}."
            )
        if (y is None) != (self.num_classes == 0):
            raise ValueError(
                f"y must be {'given' if self.num_classes else 'None'} for {self.num_classes} "
                "classes."
            )

        condition = timestep_features(t, self.width)
        condition = _Dense(4 * self.width, name="timestep_hidden")(condition)
        condition = _Dense(4 * self.width, name="timestep_embedding")(nn.silu(condition))
        if y is not None:
            condition += nn.Embed(
                self.num_classes + 1,
                4 * self.width,
                embedding_init=nn.initializers.normal(1.0),
                name="label_embedding",
            )(y)
        # Every residual block uses this SiLU of the condition, so it is computed only once.
        condition = nn.silu(condition).astype(self.dtype)

        block = functools.partial(
            rematerialised(_ResidualBlock, self.remat),
            scale_shift_norm=self.scale_shift_norm,
            dtype=self.dtype,
        )
        attention = functools.partial(
            rematerialised(_Attention, self.remat),
            num_heads=self.num_heads,
            head_channels=self.head_channels,
            dtype=self.dtype,
            attention=self.attention,
        )
        channels = [int(self.width * mult) for mult in self.channel_mult]
        attends = [2**level in self.attention_factors for level in range(levels)]

        x = _Conv(channels[0], dtype=self.dtype, name="input_0_0")(x)
        skips = [x]
        for level in range(levels):
            for _ in range(self.num_res_blocks):
                name = f"input_{len(skips)}"
                x = block(channels[level], name=f"{name}_0")(x, condition)
                if attends[level]:
                    x = attention(name=f"{name}_1")(x)
                skips.append(x)
            if level < levels - 1:
                name = f"input_{len(skips)}_0"
                if self.resblock_updown:
                    x = block(channels[level], resample=_halve, name=name)(x, condition)
                else:
                    x = _Conv(channels[level], strides=2, dtype=self.dtype, name=name)(x)
                skips.append(x)

        x = block(channels[-1], name="middle_0")(x, condition)
        x = attention(name="middle_1")(x)
        x = block(channels[-1], name="middle_2")(x, condition)

        num_skips = len(skips)
        for level in reversed(range(levels)):
            for _ in range(self.num_res_blocks + 1):
                name = f"output_{num_skips - len(skips)}"
                x = jnp.concatenate([x, skips.pop()], axis=-1)
                x = block(channels[level], name=f"{name}_0")(x, condition)
                if attends[level]:
                    x = attention(name=f"{name}_1")(x)
            if level > 0:
                name = f"output_{num_skips - len(skips) - 1}_{1 + attends[level]}"
                if self.resblock_updown:
                    x = block(channels[level], resample=_double, name=name)(x, condition)
                else:
                    x = _Conv(channels[level], dtype=self.dtype, name=name)(_double(x))

        x = nn.silu(_GroupNorm(dtype=jnp.float32, name="output_norm")(x))
        outputs = self.channels * (2 if self.learned_variance else 1)
        return _ZeroConv(outputs, dtype=jnp.float32, name="output")(x)


class _ResidualBlock(nn.Module):
    """Maps (B, H, W, C) and a condition (B, D) to `features` channels, and resamples if set."""

    features: int
    scale_shift_norm: bool
    dtype: Any
    resample: Callable[[jax.Array], jax.Array] | None = None

    @nn.compact
    def __call__(self, x: jax.Array, condition: jax.Array) -> jax.Array:
        h = nn.silu(_GroupNorm(dtype=self.dtype, name="norm_1")(x))
        if self.resample:
            h, x = self.resample(h), self.resample(x)
        h = _Conv(self.features, dtype=self.dtype, name="conv_1")(h)

        norm = _GroupNorm(dtype=self.dtype, name="norm_2")
        outputs = self.features * (2 if self.scale_shift_norm else 1)
        modulation = _Dense(outputs, dtype=self.dtype, name="modulation")(condition)
        modulation = modulation[:, None, None]
        if self.scale_shift_norm:
            scale, shift = jnp.split(modulation, 2, axis=-1)
            h = norm(h) * (1 + scale) + shift
        else:
            h = norm(h + modulation)
        h = _ZeroConv(self.features, dtype=self.dtype, name="conv_2")(nn.silu(h))

        if x.shape[-1] != self.features:
            x = _Dense(self.features, dtype=self.dtype, name="skip")(x)
        return x + h


class _Attention(nn.Module):
    """Self-attention over all positions of (B, H, W, C), added to the input."""

    num_heads: int
    head_channels: int
    dtype: Any
    attention: Implementation

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, height, width, channels = x.shape
        heads = self.num_heads or channels // self.head_channels
        h = _GroupNorm(dtype=self.dtype, name="norm")(x)
        h = _Dense(3 * channels, dtype=self.dtype, name="qkv")(h)
        h = h.reshape(batch, height * width, heads, 3, channels // heads)
        h = jax.nn.dot_product_attention(*jnp.unstack(h, axis=3), implementation=self.attention)
        return x + _ZeroDense(channels, dtype=self.dtype, name="output")(h.reshape(x.shape))


def _halve(x: jax.Array) -> jax.Array:
    """Halves the resolution, by means of 2 x 2 positions."""
    return nn.avg_pool(x, (2, 2), (2, 2))


def _double(x: jax.Array) -> jax.Array:
    """Doubles the resolution, by nearest neighbours."""
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
