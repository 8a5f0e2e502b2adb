"""Weights of the Inception network by their names in pytorch-fid."""

import functools

import jax
import numpy as np
import pytest

from ant_jax.evaluation.features.inception_network import INCEPTION
from ant_jax.interop import WeightsError, from_torch, read_state, to_torch, write_state


def test_inception(tmp_path):
    rng = np.random.default_rng(0)
    normal = lambda *shape: np.float32(rng.normal(size=shape))
    norm = lambda n: {kind: normal(n) for kind in ("scale", "bias", "mean", "var")}
    params = {
        "Conv2d_1a_3x3": {"conv": {"kernel": normal(3, 3, 3, 4)}, "bn": norm(4)},
        "Mixed_5b": {
            "branch1x1": {"conv": {"kernel": normal(1, 1, 4, 2)}, "bn": norm(2)},
            "branch5x5_1": {"conv": {"kernel": normal(1, 7, 4, 2)}, "bn": norm(2)},
        },
        "fc": {"kernel": normal(2, 5), "bias": normal(5)},
    }
    state = to_torch(params, INCEPTION)
    bn, mixed = params["Conv2d_1a_3x3"]["bn"], params["Mixed_5b"]
    expected = {
        "Conv2d_1a_3x3.conv.weight": params["Conv2d_1a_3x3"]["conv"]["kernel"].transpose(
            3, 2, 0, 1
        ),
        "Conv2d_1a_3x3.bn.weight": bn["scale"],
        "Conv2d_1a_3x3.bn.bias": bn["bias"],
        "Conv2d_1a_3x3.bn.running_mean": bn["mean"],
        "Conv2d_1a_3x3.bn.running_var": bn["var"],
        "Mixed_5b.branch1x1.conv.weight": mixed["branch1x1"]["conv"]["kernel"].transpose(
            3, 2, 0, 1
        ),
        "fc.weight": params["fc"]["kernel"].T,
        "fc.bias": params["fc"]["bias"],
    }
    for name, value in expected.items():
        np.testing.assert_array_equal(state[name], value, strict=True)
    assert len(state) == 3 * 5 + 2 and state["Mixed_5b.branch5x5_1.conv.weight"].shape == (
        2,
        4,
        1,
        7,
    )
    state["Conv2d_1a_3x3.bn.num_batches_tracked"] = np.array(3)
    state["AuxLogits.fc.weight"] = np.zeros((2, 3))
    write_state(tmp_path / "x.safetensors", state)
    state = read_state(tmp_path / "x.safetensors")
    equal = functools.partial(np.testing.assert_array_equal, strict=True)
    jax.tree.map(equal, from_torch(state, params, INCEPTION), params)
    with pytest.raises(WeightsError, match=r"1 unexpected: Mixed_5c\.bn\.bias"):
        from_torch({**state, "Mixed_5c.bn.bias": np.zeros(3)}, params, INCEPTION)
