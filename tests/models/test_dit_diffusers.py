"""DiT as a network of diffusers: its keys and outputs are recorded."""

import functools

import jax
import numpy as np
import pytest
from recorded_dit import (
    MODEL,
    SETTINGS,
    SIT,
    diffusers_state,
    recorded_state,
    recording,
    template,
)

from ant_jax.interop import WeightsError, from_torch
from ant_jax.models import dit, timesteps
from ant_jax.models.dit_diffusers import transformer
from ant_jax.models.dit_weights import names

SHAPE = (8, 8, 3)


@functools.cache
def sit_params():
    state = recorded_state("sit")
    del state["pos_embed"]
    return from_torch(state, template(SIT), names(SIT, sit=True))


@functools.cache
def exported_sit():
    return transformer(sit_params(), SIT, SHAPE, flow=True)


def test_a_dit_has_the_keys_and_weights_of_diffusers():
    state = diffusers_state()
    found = transformer(from_torch(state, template(), names(MODEL)), MODEL, SHAPE, flow=False)
    assert found.config == {"_class_name": "DiTTransformer2DModel"} | SETTINGS
    assert set(found.state) == set(state)
    for name, value in state.items():
        np.testing.assert_array_equal(found.state[name], value, strict=True)
    # The recorded outputs are those of the changed frequencies.
    assert not found.exact


def test_diffusers_computes_what_a_flow_does():
    """The recorded outputs are those of the unchanged code of diffusers."""
    found, stored = exported_sit(), recording("sit_diffusers")
    assert found.exact
    t = 1 - recording("sit")["t"]
    kernel = np.float32(sit_params()["timestep_hidden"]["kernel"])
    ours = timesteps.timestep_features(t, dit.TIMESTEP_FEATURES, SIT.level_scale) @ kernel
    for i in range(SIT.depth):
        of_block = f"transformer_blocks.{i}.norm1.emb.timestep_embedder.linear_1.weight"
        theirs = stored["features"] @ found.state[of_block].T
        np.testing.assert_allclose(theirs, ours, atol=1e-5 * abs(ours).max())
    # The code of SiT has the other sign.
    expected = -recording("sit")["output"]
    assert abs(stored["output"] - expected).max() < 1e-5 * abs(expected).max()


def test_networks_without_labels_get_a_table():
    model = SIT.clone(num_classes=0)
    params = jax.tree.map(np.zeros_like, sit_params())
    del params["label_embedding"]
    found = transformer(params, model, SHAPE, flow=True)
    assert found.config["num_embeds_ada_norm"] == 1
    table = "transformer_blocks.1.norm1.emb.class_embedder.embedding_table.weight"
    np.testing.assert_array_equal(found.state[table], np.zeros((2, 16), np.float32))


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"norm": "rms"}, r"no DiT with config\.model\.norm = 'rms'$"),
        ({"routing": 0.8}, r"no DiT with config\.model\.routing = 0\.8$"),
        ({"level_scale": 200.0}, r"cannot compute .*level_scale = 200 for .*; up to 50 it can$"),
    ],
)
def test_what_diffusers_does_not_have_is_said(fields, fault):
    with pytest.raises(WeightsError, match=fault):
        transformer(sit_params(), SIT.clone(**fields), SHAPE, flow=True)


def test_scales_that_fit_and_the_frequencies_of_dit():
    assert transformer(sit_params(), SIT.clone(level_scale=50.0), SHAPE, flow=True).exact
    assert not transformer(sit_params(), SIT.clone(level_scale=1000.0), SHAPE, flow=True).exact
