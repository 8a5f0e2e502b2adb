"""DiT as `DiTTransformer2DModel` of diffusers (0.42)."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ant_jax.models import dit, dit_weights, timesteps
from ant_jax.published_weights import WeightsError, to_torch

# What diffusers gives a flow's network for the time 1.
_FLOW_TIMESTEPS = 1000.0
_OUTSIDE = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
# Each block has a copy.
_COPIED = {
    "t_embedder.mlp.0": "timestep_embedder.linear_1",
    "t_embedder.mlp.2": "timestep_embedder.linear_2",
    "y_embedder.embedding_table": "class_embedder.embedding_table",
}
_IN_BLOCK = {
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}


class Transformer(NamedTuple):
    """A network as diffusers stores it.

    Attributes:
      config: the content of ``config.json``.
      state: arrays by name.
      exact: whether diffusers computes the same outputs. Otherwise it does after
        ``block.norm1.emb.time_proj.downscale_freq_shift = 0`` for each of its blocks.
    """

    config: dict[str, Any]
    state: dict[str, np.ndarray]
    exact: bool


def transformer(
    params: Mapping[str, Any], model: dit.DiT, image_shape: tuple[int, int, int], flow: bool
) -> Transformer:
    """Converts a DiT into one of diffusers.

    Diffusers spaces the frequencies of the timestep encoding slightly wider, by 1/127 instead of
    1/128. Over a thousand timesteps no weights can make up for that. The features of the levels
    [0, 1] of a flow with a `level_scale` up to 50 are so smooth that they are linear functions of
    those of diffusers, with an error below float32's: then the first layer of the timestep
    embedding is changed.

    Args:
      params: the parameters of the network.
      model: the network.
      image_shape: (H, W, C) of its input, square.
      flow: whether its levels are floats. Diffusers gives the network 1000 t.

    Raises:
      WeightsError: if diffusers has no such network.
    """
    options = dit_weights.unpublished(model)
    if model.routing < 1:
        options.append(f"routing = {model.routing}")
    if options:
        raise WeightsError(f"diffusers has no DiT with config.model.{options[0]}")
    exact = flow and model.level_scale != timesteps.LEVEL_SCALE
    paper = to_torch(params, dit_weights.names(model))
    if exact:
        kernel = paper["t_embedder.mlp.0.weight"]
        paper["t_embedder.mlp.0.weight"] = (kernel @ _refit(model.level_scale)).astype(np.float32)
    table = "y_embedder.embedding_table.weight"
    # Diffusers has no network without labels: a row for the one class, and one for none.
    paper.setdefault(table, np.zeros((2, model.width), np.float32))
    config = {
        "_class_name": "DiTTransformer2DModel",
        "num_attention_heads": model.heads,
        "attention_head_dim": model.width // model.heads,
        "in_channels": model.channels,
        "out_channels": model.channels * (2 if model.learned_variance else 1),
        "num_layers": model.depth,
        "sample_size": image_shape[0],
        "patch_size": model.patch,
        "num_embeds_ada_norm": len(paper[table]) - 1,
        "norm_eps": 1e-6,
    }
    state = {}
    for name, value in paper.items():
        for new, part in _renamed(name, value, model.depth):
            state[new] = part
    return Transformer(config, state, exact)


def _renamed(name, value, depth):
    module, _, kind = name.rpartition(".")
    if module in _OUTSIDE:
        yield f"{_OUTSIDE[module]}.{kind}", value
    elif module in _COPIED:
        for i in range(depth):
            yield f"transformer_blocks.{i}.norm1.emb.{_COPIED[module]}.{kind}", value
    else:
        _, i, inside = module.split(".", 2)
        if inside == "attn.qkv":
            for letter, part in zip("qkv", np.split(value, 3), strict=True):
                yield f"transformer_blocks.{i}.attn1.to_{letter}.{kind}", part
        else:
            yield f"transformer_blocks.{i}.{_IN_BLOCK[inside]}.{kind}", value


def _refit(level_scale: float) -> np.ndarray:
    """(256, 256) float64: a kernel for the features here times this is one for diffusers' features.

    Raises:
      WeightsError: if there is no such matrix.
    """
    half = dit.TIMESTEP_FEATURES // 2
    wider = timesteps.MAX_PERIOD ** (-np.arange(half) / (half - 1))
    levels = np.linspace(0, 1, 4001)[:, None]
    features = lambda angles: np.concatenate([np.cos(angles), np.sin(angles)], 1)
    theirs = features(_FLOW_TIMESTEPS * levels * wider)
    ours = features(level_scale * levels * np.float64(timesteps.frequencies(2 * half)))
    # Singular values below would need large weights, which float32 and smaller types cannot add up.
    found = np.linalg.lstsq(theirs, ours, rcond=1e-10)[0]
    if np.abs(found).max() > 1 or np.abs(theirs @ found - ours).max() > 1e-6:
        raise WeightsError(
            f"diffusers' DiT cannot compute the timestep features of config.model.level_scale = "
            f"{level_scale:g} for the levels of a flow; up to 50 it can"
        )
    return found.T
