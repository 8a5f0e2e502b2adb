'''Denoising networks: each is one file, or a Flax module of one's own.

A network is a Flax Linen module ``NAME`` in ``models/NAME.py``, or anybody's, named as
``package.module:Class``. It is called as ``(x, t, y) -> output``:

  x: (B, H, W, C) float32, noisy images or latents.
  t: (B,) noise levels, integers or floats as the noise process has them.
  y: (B,) int32 labels in [0, num_classes], of which the last is the null class of classifier-free
    guidance; None for an unconditional network. Labels are dropped by the caller.
  output: (B, H, W, C) float32, or (B, H, W, 2 C) with the variance's parameters in the last C
    channels. Zero, or nearly so, at initialisation.

A whole network::

  class Mlp(nn.Module):
      """One hidden layer for each pixel, of width features."""

      num_classes: int = 0
      width: Annotated[int, Integer(1)] = 64

      @nn.compact
      def __call__(self, x, t, y=None):
          h = nn.Dense(self.width)(x)
          h += nn.Dense(self.width)(timestep_features(t, 64))[:, None, None]
          if y is not None:
              h += nn.Embed(self.num_classes + 1, self.width)(y)[:, None, None]
          return nn.Dense(x.shape[-1], kernel_init=nn.initializers.zeros)(nn.silu(h))

**Settings.** The fields of a network are its settings: types and marks as in `ant_jax.settings`,
and what they affect is `Affects.MEANING` unless they say otherwise. `remat.Remat` and
`attention.Attention` are types of settings that change how a network is computed, not what.

**What the trainer gives**, to those networks that have a field of the name:

  channels: int, C.
  num_classes: int, 0 for an unconditional network.
  learned_variance: bool, whether to return 2 C channels.
  dtype: the `jnp.dtype` of the activations. Parameters stay float32.

**What a network may have besides:**

  input_multiple: a property, what H and W must be multiples of; 1 where there is none.
  __post_init__: raises a ValueError for fields that don't fit each other, after `check_fields`,
    which raises one for a field that is not what its type and marks say; ends with
    ``super().__post_init__()``.
  check_devices: a method without arguments that raises a ValueError for what the devices that are
    there can't compute; called before anything is compiled.

**Weights of others.** Where a module ``NAME_weights.py`` lies beside ``NAME.py``, it says how the
published code names a network's weights, for exports, and what a file of them does not tell:

  names(model) -> Names: how the published code names and lays out the parameters of a network.
  FACTS: tuple of what a file may leave open and the user may say, such as ``"no_null_row"`` or,
    with a number, ``"heads=N"``.
  recognise(state, params, model, image_shape, facts) -> Recognised: what a state dict of others is.
    It gets the parameters that the network has, as shapes, the network, (H, W, C), and the facts
    that the user has said, such as ``{"heads": "4", "no_null_row": ""}``. It raises a ValueError
    if the state dict doesn't fit the network, or if it can't be known to compute what this network
    does.

`ant_jax.published_weights` has these types. A network without such a module is exported and read by
its own names of parameters.
'''

from ant_jax.models.network import (
    build_network,
    check_fields,
    facts_of,
    input_multiple,
    meaning_of,
    network_settings,
    num_classes,
    weights_module,
)

__all__ = [
    "build_network",
    "check_fields",
    "facts_of",
    "input_multiple",
    "meaning_of",
    "network_settings",
    "num_classes",
    "weights_module",
]
