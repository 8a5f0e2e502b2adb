"""InceptionV3 as the FID uses it: the network of TensorFlow's image classifier of 2015-12-05.

Szegedy et al., *Rethinking the Inception Architecture for Computer Vision* (CVPR 2016), in the form
of the graph `classify_image_graph_def.pb` by which Heusel et al. 2017 defined the FID and with
which Dhariwal & Nichol, *Diffusion Models Beat GANs*, 2021, measure. Blocks have the names of
pytorch-fid, which converted the weights of that graph.
"""

import functools
from collections.abc import Callable, Mapping, Set
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ant_jax.published_weights import Names, Place

SIZE = 299  # pixels, of what the network sees

# A FID must not depend on the device: TF32 and bfloat16 products move the features by 1e-3.
_PRECISION = jax.lax.Precision.HIGHEST


class Features(NamedTuple):
    """The network's outputs, float32.

    Attributes:
      pool: (B, 2048), the last layer's mean over its positions.
      spatial: (B, 2023), the first 7 channels of the graph's `mixed_6/conv` at 17 x 17 positions,
        in the order height, width, channel (Nash et al., *Generating Images with Sparse
        Representations*, 2021).
      logits: (B, 1008), the pool features times the weights of the last layer without its bias, as
        published inception scores use them.
    """

    pool: jax.Array
    spatial: jax.Array
    logits: jax.Array


class InceptionV3(nn.Module):
    """The network. All its arrays are in the collection "params", also the norms' statistics."""

    @nn.compact
    def __call__(self, images: jax.Array) -> Features:
        """Features of uint8 images (B, H, W, 3) of any size."""
        # The graph's own numbers. Scaling to [-1, 1] by 127.5 would shift by half a grey level.
        x = (resize(images) - 128) / 128
        x = _Conv(32, (3, 3), 2, name="Conv2d_1a_3x3")(x)
        x = _Conv(32, (3, 3), padding="VALID", name="Conv2d_2a_3x3")(x)
        x = _Conv(64, (3, 3), name="Conv2d_2b_3x3")(x)
        x = _halved(x)
        x = _Conv(80, (1, 1), name="Conv2d_3b_1x1")(x)
        x = _Conv(192, (3, 3), padding="VALID", name="Conv2d_4a_3x3")(x)
        x = _halved(x)
        x = _A(32, name="Mixed_5b")(x)
        x = _A(64, name="Mixed_5c")(x)
        x = _A(64, name="Mixed_5d")(x)
        x = _B(name="Mixed_6a")(x)
        x = _C(128, name="Mixed_6b")(x)
        x = _C(160, name="Mixed_6c")(x)
        x = _C(160, name="Mixed_6d")(x)
        # A block's output begins with its 1 x 1 branch.
        spatial = x[..., :7].reshape(len(x), -1)
        x = _C(192, name="Mixed_6e")(x)
        x = _D(name="Mixed_7a")(x)
        x = _E(_average, name="Mixed_7b")(x)
        x = _E(_largest, name="Mixed_7c")(x)
        pool = x.mean((1, 2))
        return Features(pool, spatial, _Logits(name="fc")(pool))


def resize(images: jax.Array) -> jax.Array:
    """Resizes images to 299 x 299 pixels as TensorFlow 1 does.

    Bilinear interpolation between the two nearest pixels in each direction, whether the image grows
    or shrinks. Pixel i of the result lies at i * H / 299 of the original, so neither corners nor
    centres coincide (`tf.image.resize_bilinear` with `align_corners=False`, in float32, in
    tensorflow/core/kernels/resize_bilinear_op.cc).

    Args:
      images: (B, H, W, C) of any type.

    Returns:
      float32 (B, 299, 299, C).
    """
    return _lines(_lines(images, 2), 1)


def _lines(images, axis):
    length = images.shape[axis]
    place = np.arange(SIZE, dtype=np.float32) * (np.float32(length) / np.float32(SIZE))
    before = place.astype(int)
    after = np.minimum(before + 1, length - 1)
    share = np.expand_dims(place - before.astype(np.float32), tuple(range(1, 4 - axis)))
    low, high = (jnp.take(images, i, axis).astype(jnp.float32) for i in (before, after))
    return low + (high - low) * share


class _Conv(nn.Module):
    """A convolution, a norm with fixed statistics, and a ReLU."""

    features: int
    kernel: tuple[int, int]
    strides: int = 1
    padding: str = ""

    @nn.compact
    def __call__(self, x):
        # Convolutions keep the size, except those with stride 2.
        padding = self.padding or ("SAME" if self.strides == 1 else "VALID")
        conv = functools.partial(nn.Conv, use_bias=False, precision=_PRECISION, name="conv")
        return nn.relu(_Norm(name="bn")(conv(self.features, self.kernel, self.strides, padding)(x)))


class _Norm(nn.Module):
    """Batch norm whose mean and variance are parameters."""

    @nn.compact
    def __call__(self, x):
        shape = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        mean = self.param("mean", nn.initializers.zeros, shape)
        var = self.param("var", nn.initializers.ones, shape)
        return (x - mean) * (scale * jax.lax.rsqrt(var + 1e-3)) + bias


class _Logits(nn.Module):
    """The last layer. Its bias is a parameter, but is not added."""

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], 1008))
        self.param("bias", nn.initializers.zeros, (1008,))
        return jnp.matmul(x, kernel, precision=_PRECISION)


class _A(nn.Module):
    pool_features: int

    @nn.compact
    def __call__(self, x):
        a = _Conv(64, (1, 1), name="branch1x1")(x)
        b = _Conv(48, (1, 1), name="branch5x5_1")(x)
        b = _Conv(64, (5, 5), name="branch5x5_2")(b)
        c = _Conv(64, (1, 1), name="branch3x3dbl_1")(x)
        c = _Conv(96, (3, 3), name="branch3x3dbl_2")(c)
        c = _Conv(96, (3, 3), name="branch3x3dbl_3")(c)
        d = _Conv(self.pool_features, (1, 1), name="branch_pool")(_average(x))
        return _join(a, b, c, d)


class _B(nn.Module):
    @nn.compact
    def __call__(self, x):
        a = _Conv(384, (3, 3), 2, name="branch3x3")(x)
        b = _Conv(64, (1, 1), name="branch3x3dbl_1")(x)
        b = _Conv(96, (3, 3), name="branch3x3dbl_2")(b)
        b = _Conv(96, (3, 3), 2, name="branch3x3dbl_3")(b)
        return _join(a, b, _halved(x))


class _C(nn.Module):
    inner: int

    @nn.compact
    def __call__(self, x):
        a = _Conv(192, (1, 1), name="branch1x1")(x)
        b = _Conv(self.inner, (1, 1), name="branch7x7_1")(x)
        b = _Conv(self.inner, (1, 7), name="branch7x7_2")(b)
        b = _Conv(192, (7, 1), name="branch7x7_3")(b)
        c = _Conv(self.inner, (1, 1), name="branch7x7dbl_1")(x)
        c = _Conv(self.inner, (7, 1), name="branch7x7dbl_2")(c)
        c = _Conv(self.inner, (1, 7), name="branch7x7dbl_3")(c)
        c = _Conv(self.inner, (7, 1), name="branch7x7dbl_4")(c)
        c = _Conv(192, (1, 7), name="branch7x7dbl_5")(c)
        d = _Conv(192, (1, 1), name="branch_pool")(_average(x))
        return _join(a, b, c, d)


class _D(nn.Module):
    @nn.compact
    def __call__(self, x):
        a = _Conv(192, (1, 1), name="branch3x3_1")(x)
        a = _Conv(320, (3, 3), 2, name="branch3x3_2")(a)
        b = _Conv(192, (1, 1), name="branch7x7x3_1")(x)
        b = _Conv(192, (1, 7), name="branch7x7x3_2")(b)
        b = _Conv(192, (7, 1), name="branch7x7x3_3")(b)
        b = _Conv(192, (3, 3), 2, name="branch7x7x3_4")(b)
        return _join(a, b, _halved(x))


class _E(nn.Module):
    pool: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, x):
        a = _Conv(320, (1, 1), name="branch1x1")(x)
        b = _Conv(384, (1, 1), name="branch3x3_1")(x)
        b1 = _Conv(384, (1, 3), name="branch3x3_2a")(b)
        b2 = _Conv(384, (3, 1), name="branch3x3_2b")(b)
        c = _Conv(448, (1, 1), name="branch3x3dbl_1")(x)
        c = _Conv(384, (3, 3), name="branch3x3dbl_2")(c)
        c1 = _Conv(384, (1, 3), name="branch3x3dbl_3a")(c)
        c2 = _Conv(384, (3, 1), name="branch3x3dbl_3b")(c)
        d = _Conv(192, (1, 1), name="branch_pool")(self.pool(x))
        return _join(a, b1, b2, c1, c2, d)


def _join(*branches):
    return jnp.concatenate(branches, axis=-1)


def _halved(x):
    return nn.max_pool(x, (3, 3), (2, 2))


def _average(x):
    # The mean of the positions inside the image, as in TensorFlow.
    return nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False)


def _largest(x):
    return nn.max_pool(x, (3, 3), padding="SAME")


def _select(state: Mapping[str, np.ndarray], _: Set[str]) -> dict[str, np.ndarray]:
    return {
        name: value
        for name, value in state.items()
        if not name.startswith("AuxLogits.") and not name.endswith(".num_batches_tracked")
    }


INCEPTION = Names("Inception", Place, _select)
"""The names of the weights in mseitzer/pytorch-fid, `inception.py`, which are the modules' names.

What only training uses is left out: the auxiliary classifier and the counts of batches.
"""
