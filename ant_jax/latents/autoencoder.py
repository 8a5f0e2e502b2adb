"""Autoencoders of latent diffusion: KL-regularised and vector-quantised.

Rombach et al., *High-Resolution Image Synthesis with Latent Diffusion Models* (CVPR 2022, arXiv
2112.10752), appendix G, after VQGAN (Esser et al. 2021). The names of the blocks and the order of
channels in every parameter follow the paper's code, so that its weights can be used here.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn import dot_product_attention

from ant_jax.models.norms import GroupNorm

# Statistics are float32 for all types of activations.
_GroupNorm = functools.partial(GroupNorm, num_groups=32, epsilon=1e-6, dtype=jnp.float32)


# From the model zoo of CompVis/latent-diffusion (models/first_stage_models). KL-f8 is also the
# autoencoder of Stable Diffusion, which DiT uses, and VQ-f4 that of LDM for FFHQ and CelebA-HQ.
# KL-f4-small is not published: it is for experiments on a laptop.
VARIANTS = {
    "KL-f4": dict(multipliers=(1, 2, 4), latent_channels=3),
    "KL-f8": dict(),
    "KL-f16": dict(multipliers=(1, 1, 2, 2, 4), attention_factors=(16,), latent_channels=16),
    "KL-f32": dict(multipliers=(1, 1, 2, 2, 4, 4), attention_factors=(16, 32), latent_channels=64),
    "VQ-f4": dict(multipliers=(1, 2, 4), latent_channels=3, codebook=8192),
    "VQ-f4-noattn": dict(
        multipliers=(1, 2, 4), latent_channels=3, codebook=8192, middle_attention=False
    ),
    "VQ-f8": dict(
        multipliers=(1, 2, 2, 4), attention_factors=(8,), latent_channels=4, codebook=16384
    ),
    "VQ-f8-n256": dict(
        multipliers=(1, 2, 2, 4), attention_factors=(8,), latent_channels=4, codebook=256
    ),
    "VQ-f16": dict(
        multipliers=(1, 1, 2, 2, 4), attention_factors=(16,), latent_channels=8, codebook=16384
    ),
    "KL-f4-small": dict(width=32, multipliers=(1, 2, 2), blocks=1),
}


class Latent(NamedTuple):
    """The output of an encoder: an independent normal distribution for each number of the latents.

    Attributes:
      mean: (B, h, w, c) float32.
      std: (B, h, w, c) float32; zeros if the autoencoder is vector-quantised.
    """

    mean: jax.Array
    std: jax.Array


def autoencoder(variant: str) -> "Autoencoder":
    """Builds an autoencoder of `VARIANTS`.

    Raises:
      ValueError: If the variant is unknown.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, not {variant!r}.")
    return Autoencoder(**VARIANTS[variant])


class Autoencoder(nn.Module):
    """An autoencoder for images whose sides are multiples of ``2 ** (len(multipliers) - 1)``.

    The defaults are the KL-f8 autoencoder of Stable Diffusion.

    Attributes:
      width: Features at full resolution, a multiple of 32.
      multipliers: Features of each level as multiples of the width. Each level after the first has
        half the resolution of the level before.
      blocks: Residual blocks of each level of the encoder; the decoder has one more.
      attention_factors: Downsampling factors, powers of 2, at which attention follows each
        residual block. For an image of 256 x 256, factor 16 is the level of 16 x 16.
      middle_attention: Whether there is also attention in the middle of the encoder and decoder.
      latent_channels: Channels c of the latent.
      inner_channels: Channels of the encoder's output, twice as many in the KL form, and of the
        decoder's input; 0 for `latent_channels`.
      codebook: Number of vectors to which the pixels of a latent are quantised; 0 for the KL form.
      channels: Channels C of the images.
      dtype: Type of the activations. Parameters, normalisation and results are float32.

    Raises:
      ValueError: On construction, if the width is not a multiple of 32, or if no level has one of
        the attention factors.
    """

    width: int = 128
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    blocks: int = 2
    latent_channels: int = 4
    codebook: int = 0
    channels: int = 3
    dtype: Any = jnp.float32
    attention_factors: tuple[int, ...] = ()
    middle_attention: bool = True
    inner_channels: int = 0

    def __post_init__(self):
        if self.width % 32:
            raise ValueError(f"width must be a multiple of 32, not {self.width}.")
        factors = [2**level for level in range(len(self.multipliers))]
        for factor in self.attention_factors:
            if factor not in factors:
                raise ValueError(f"attention_factors must be among {factors}, not {factor}.")
        super().__post_init__()

    @property
    def factor(self) -> int:
        """The downsampling factor: side of an image / side of its latent."""
        return 2 ** (len(self.multipliers) - 1)

    def setup(self) -> None:
        """Makes the encoder, the decoder, the two layers between them and the codebook."""
        attends = tuple(2**i in self.attention_factors for i in range(len(self.multipliers)))
        half: dict[str, Any] = dict(
            width=self.width,
            multipliers=self.multipliers,
            blocks=self.blocks,
            dtype=self.dtype,
            attends=attends,
            middle_attention=self.middle_attention,
        )
        inner = self.inner_channels or self.latent_channels
        # The KL form has means and log-variances.
        kinds = 1 if self.codebook else 2
        self.encoder = _Encoder(**half, outputs=kinds * inner)
        self.quant_conv = nn.Dense(kinds * self.latent_channels, dtype=self.dtype)
        self.post_quant_conv = nn.Dense(inner, dtype=self.dtype)
        self.decoder = _Decoder(**half, outputs=self.channels)
        if self.codebook:
            scale = 1 / self.codebook
            uniform = lambda key, shape: jax.random.uniform(key, shape, minval=-scale, maxval=scale)
            self.embedding = self.param("embedding", uniform, (self.codebook, self.latent_channels))

    def encode(self, images: jax.Array) -> Latent:
        """The latents of images (B, H, W, C) in [-1, 1], with h = H / factor and w = W / factor.

        Raises:
          ValueError: If the images don't have C channels, or their sides are not multiples of the
            factor.
        """
        height, width, channels = images.shape[1:]
        if channels != self.channels or height % self.factor or width % self.factor:
            raise ValueError(
                f"images must have shape (B, H, W, {self.channels}) with H and W multiples of "
                f"{self.factor}, not {images.shape}."
            )
        numbers = self.quant_conv(self.encoder(images)).astype(jnp.float32)
        if self.codebook:
            return Latent(numbers, jnp.zeros_like(numbers))
        mean, log_variance = jnp.split(numbers, 2, axis=-1)
        return Latent(mean, jnp.exp(0.5 * jnp.clip(log_variance, -30, 20)))

    def decode(self, latents: jax.Array) -> jax.Array:
        """The images (B, H, W, C) float32, about in [-1, 1], of latents (B, h, w, c).

        The vector-quantised form first replaces each pixel of the latents by the nearest vector of
        the codebook.
        """
        if self.codebook:
            latents = self._quantise(latents)
        return self.decoder(self.post_quant_conv(latents)).astype(jnp.float32)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Reconstructs images from the means of their latents."""
        return self.decode(self.encode(images).mean)

    def _quantise(self, latents):
        squares = jnp.sum(self.embedding**2, axis=-1)
        products = jnp.einsum("...c,nc->...n", latents, self.embedding, precision="highest")
        return self.embedding[jnp.argmin(squares - 2 * products, axis=-1)]


class _Half(nn.Module):
    """The fields of an encoder or a decoder; `outputs` is its number of output channels."""

    width: int
    multipliers: tuple[int, ...]
    blocks: int
    dtype: Any
    attends: tuple[bool, ...]
    middle_attention: bool
    outputs: int


class _Encoder(_Half):
    """Maps images to features at the resolution of the latent."""

    @nn.compact
    def __call__(self, x):
        conv = functools.partial(nn.Conv, kernel_size=(3, 3), padding=1, dtype=self.dtype)
        x = conv(self.width, name="conv_in")(x)
        for level, multiplier in enumerate(self.multipliers):
            for i in range(self.blocks):
                features = multiplier * self.width
                x = _Block(features, self.dtype, name=f"down_{level}_block_{i}")(x)
                if self.attends[level]:
                    x = _Attention(self.dtype, name=f"down_{level}_attention_{i}")(x)
            if level < len(self.multipliers) - 1:
                # Padded on one side only, as in the paper's code.
                down = functools.partial(conv, strides=2, padding=((0, 1), (0, 1)))
                x = down(x.shape[-1], name=f"down_{level}_downsample")(x)
        x = _middle(x, self.dtype, self.middle_attention)
        x = nn.silu(_GroupNorm(name="norm_out")(x)).astype(self.dtype)
        return conv(self.outputs, name="conv_out")(x)


class _Decoder(_Half):
    """Maps features at the resolution of the latent to images."""

    @nn.compact
    def __call__(self, x):
        conv = functools.partial(nn.Conv, kernel_size=(3, 3), padding=1, dtype=self.dtype)
        x = conv(self.multipliers[-1] * self.width, name="conv_in")(x)
        x = _middle(x, self.dtype, self.middle_attention)
        for level in reversed(range(len(self.multipliers))):
            features = self.multipliers[level] * self.width
            for i in range(self.blocks + 1):
                x = _Block(features, self.dtype, name=f"up_{level}_block_{i}")(x)
                if self.attends[level]:
                    x = _Attention(self.dtype, name=f"up_{level}_attention_{i}")(x)
            if level:
                x = x.repeat(2, axis=1).repeat(2, axis=2)
                x = conv(features, name=f"up_{level}_upsample")(x)
        x = nn.silu(_GroupNorm(name="norm_out")(x)).astype(self.dtype)
        return conv(self.outputs, name="conv_out")(x)


def _middle(x, dtype, attends):
    x = _Block(x.shape[-1], dtype, name="mid_block_1")(x)
    if attends:
        x = _Attention(dtype, name="mid_attention")(x)
    return _Block(x.shape[-1], dtype, name="mid_block_2")(x)


class _Block(nn.Module):
    """A residual block of two convolutions."""

    features: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        conv = functools.partial(
            nn.Conv, self.features, kernel_size=(3, 3), padding=1, dtype=self.dtype
        )
        h = nn.silu(_GroupNorm(name="norm1")(x)).astype(self.dtype)
        h = conv(name="conv1")(h)
        h = nn.silu(_GroupNorm(name="norm2")(h)).astype(self.dtype)
        h = conv(name="conv2")(h)
        if x.shape[-1] != self.features:
            x = nn.Dense(self.features, dtype=self.dtype, name="shortcut")(x)
        return x + h


class _Attention(nn.Module):
    """Self-attention over all pixels, with one head."""

    dtype: Any

    @nn.compact
    def __call__(self, x):
        dense = functools.partial(nn.Dense, x.shape[-1], dtype=self.dtype)
        h = _GroupNorm(name="norm")(x).astype(self.dtype)
        h = h.reshape(len(h), -1, 1, h.shape[-1])
        h = dot_product_attention(*(dense(name=name)(h) for name in ("q", "k", "v")))
        return x + dense(name="output")(h).reshape(x.shape)
