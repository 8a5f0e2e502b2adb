"""Autoencoders of latent diffusion: KL-regularised and vector-quantised.

Rombach et al., *High-Resolution Image Synthesis with Latent Diffusion Models* (CVPR 2022, arXiv
2112.10752), appendix G, after VQGAN (Esser et al. 2021). Names of the blocks and the order of
channels in every parameter follow the paper's code, so that its weights can be carried over.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn import dot_product_attention

from ant_jax.models.norms import GroupNorm

# Statistics in float32 whatever the activations are.
_GroupNorm = functools.partial(GroupNorm, num_groups=32, epsilon=1e-6, dtype=jnp.float32)


# The first is Stable Diffusion's, which DiT uses, the second LDM's for FFHQ and CelebA-HQ. The
# third is nobody's: small enough to try things out on a laptop.
VARIANTS = {
    "KL-f8": dict(),
    "VQ-f4": dict(multipliers=(1, 2, 4), latent_channels=3, codebook=8192),
    "KL-f4-small": dict(width=32, multipliers=(1, 2, 2), blocks=1),
}


class Latent(NamedTuple):
    """What an encoder makes of images: a normal distribution for each number of the latent.

    Attributes:
      mean: (B, h, w, c) float32.
      std: (B, h, w, c) float32; zeros where the autoencoder is vector-quantised.
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
    """An autoencoder of images whose sides are multiples of ``2 ** (len(multipliers) - 1)``.

    The defaults are the KL-f8 autoencoder of Stable Diffusion.

    Attributes:
      width: Features at full resolution, a multiple of 32.
      multipliers: Features of each level as multiples of the width; each level but the first has
        half the resolution of the one before.
      blocks: Residual blocks of each level of the encoder; the decoder has one more.
      latent_channels: Channels c of the latent.
      codebook: Number of vectors that a latent's pixels are quantised to; 0 for the KL form.
      channels: Channels C of the images.
      dtype: Type of the activations. Parameters, normalisation and results are float32.

    Raises:
      ValueError: On construction, if the width is not a multiple of 32.
    """

    width: int = 128
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    blocks: int = 2
    latent_channels: int = 4
    codebook: int = 0
    channels: int = 3
    dtype: Any = jnp.float32

    def __post_init__(self):
        if self.width % 32:
            raise ValueError(f"width must be a multiple of 32, not {self.width}.")
        super().__post_init__()

    @property
    def factor(self) -> int:
        """How many times longer the side of an image is than that of its latent."""
        return 2 ** (len(self.multipliers) - 1)

    def setup(self) -> None:
        """Makes the four parts."""
        shared = (self.width, self.multipliers, self.blocks, self.dtype)
        numbers = self.latent_channels if self.codebook else 2 * self.latent_channels
        self.encoder = _Encoder(*shared, numbers)
        self.quant_conv = nn.Dense(numbers, dtype=self.dtype)
        self.post_quant_conv = nn.Dense(self.latent_channels, dtype=self.dtype)
        self.decoder = _Decoder(*shared, self.channels)
        if self.codebook:
            scale = 1 / self.codebook
            uniform = lambda key, shape: jax.random.uniform(key, shape, minval=-scale, maxval=scale)
            self.embedding = self.param("embedding", uniform, (self.codebook, self.latent_channels))

    def encode(self, images: jax.Array) -> Latent:
        """The latent of images (B, H, W, C) in [-1, 1], with h = H / factor and w = W / factor.

        Raises:
          ValueError: If the images don't have C channels or their sides don't fit the factor.
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
        """Images (B, H, W, C) float32, about in [-1, 1], of latents (B, h, w, c).

        The vector-quantised form takes the latents to the nearest vectors of its codebook first.
        """
        if self.codebook:
            latents = self._quantise(latents)
        return self.decoder(self.post_quant_conv(latents)).astype(jnp.float32)

    def __call__(self, images: jax.Array) -> jax.Array:
        """The reconstruction of images, by the mean of their latents."""
        return self.decode(self.encode(images).mean)

    def _quantise(self, latents):
        squares = jnp.sum(self.embedding**2, axis=-1)
        products = jnp.einsum("...c,nc->...n", latents, self.embedding, precision="highest")
        return self.embedding[jnp.argmin(squares - 2 * products, axis=-1)]


class _Encoder(nn.Module):
    """Images to numbers at the resolution of the latent."""

    width: int
    multipliers: tuple[int, ...]
    blocks: int
    dtype: Any
    numbers: int

    @nn.compact
    def __call__(self, x):
        conv = functools.partial(nn.Conv, kernel_size=(3, 3), padding=1, dtype=self.dtype)
        x = conv(self.width, name="conv_in")(x)
        for level, multiplier in enumerate(self.multipliers):
            for i in range(self.blocks):
                features = multiplier * self.width
                x = _Block(features, self.dtype, name=f"down_{level}_block_{i}")(x)
            if level < len(self.multipliers) - 1:
                # Padded on one side alone, as in the paper's code.
                down = functools.partial(conv, strides=2, padding=((0, 1), (0, 1)))
                x = down(x.shape[-1], name=f"down_{level}_downsample")(x)
        x = _middle(x, self.dtype)
        x = nn.silu(_GroupNorm(name="norm_out")(x)).astype(self.dtype)
        return conv(self.numbers, name="conv_out")(x)


class _Decoder(nn.Module):
    """Latents to images."""

    width: int
    multipliers: tuple[int, ...]
    blocks: int
    dtype: Any
    channels: int

    @nn.compact
    def __call__(self, x):
        conv = functools.partial(nn.Conv, kernel_size=(3, 3), padding=1, dtype=self.dtype)
        x = conv(self.multipliers[-1] * self.width, name="conv_in")(x)
        x = _middle(x, self.dtype)
        for level in reversed(range(len(self.multipliers))):
            features = self.multipliers[level] * self.width
            for i in range(self.blocks + 1):
                x = _Block(features, self.dtype, name=f"up_{level}_block_{i}")(x)
            if level:
                x = x.repeat(2, axis=1).repeat(2, axis=2)
                x = conv(features, name=f"up_{level}_upsample")(x)
        x = nn.silu(_GroupNorm(name="norm_out")(x)).astype(self.dtype)
        return conv(self.channels, name="conv_out")(x)


def _middle(x, dtype):
    x = _Block(x.shape[-1], dtype, name="mid_block_1")(x)
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
    """Self-attention of all pixels, with one head."""

    dtype: Any

    @nn.compact
    def __call__(self, x):
        dense = functools.partial(nn.Dense, x.shape[-1], dtype=self.dtype)
        h = _GroupNorm(name="norm")(x).astype(self.dtype)
        h = h.reshape(len(h), -1, 1, h.shape[-1])
        h = dot_product_attention(*(dense(name=name)(h) for name in ("q", "k", "v")))
        return x + dense(name="output")(h).reshape(x.shape)
