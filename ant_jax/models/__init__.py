'''Denoising networks: one file each, or your own Flax module.

A network is a Flax Linen module ``NAME`` in ``models/NAME.py``, or your own, named
``package.module:Class``. It is called as ``(x, t, y) -> output``:

  x: (B, H, W, C) float32, noisy images or latents.
  t: (B,) noise levels, integers or floats, depending on the noise process.
  y: (B,) int32 labels in [0, num_classes]; the label num_classes is the null class of
    classifier-free guidance. None for an unconditional network. The caller drops labels.
  output: (B, H, W, C) float32, or (B, H, W, 2 C) with the parameters of the variance in the last C
    channels. It is zero, or close to zero, at initialisation.

A complete network::

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

**Settings.** The fields of a network are its settings, with types and marks as in
`ant_jax.settings`. A setting affects `Affects.MEANING` unless its annotation says otherwise. The
types `remat.Remat` and `attention.Attention` are for settings that change how a network is
computed, but not its output.

**Fields that the trainer sets**, if the network has a field of this name:

  channels: int, C.
  num_classes: int, 0 for an unconditional network.
  learned_variance: bool, whether to return 2 C channels.
  dtype: the `jnp.dtype` of the activations. Parameters stay float32.

**Optional members of a network:**

  input_multiple: a property; H and W must be multiples of it. The default is 1.
  __post_init__: first calls `check_fields`, which raises a ValueError for a field whose value
    contradicts its type and marks; then raises a ValueError for fields that contradict each other;
    last calls ``super().__post_init__()``.
  check_devices: a method without arguments that raises a ValueError if the current devices can't
    compute the network; called before anything is compiled.

**Published weights.** An optional module ``NAME_weights.py`` beside ``NAME.py`` describes the
weights of the published code, for reading and for exports:

  exported(model, image_shape, process) -> Names: how the published code names and lays out the
    parameters of a network. Its arguments are the network, (H, W, C), and the settings of the noise
    process that decide what the network computes, such as
    ``{"name": "flow", "prediction": "velocity"}``.
  FACTS: tuple of facts that a file of weights may not contain and that the user can state, such as
    ``"no_null_row"`` or, with a number, ``"heads=N"``.
  recognise(state, params, model, image_shape, facts) -> Recognised: how to read a state dict of the
    published code. Its arguments are the state dict, the parameters of the network as shapes, the
    network, (H, W, C), and the facts that the user states, such as
    ``{"heads": "4", "no_null_row": ""}``. It raises a ValueError if the state dict doesn't match
    the network, or if it is not known whether the network here computes the same outputs.

`ant_jax.published_weights` has these types. A network without such a module is exported and read
with its own names of parameters.
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
