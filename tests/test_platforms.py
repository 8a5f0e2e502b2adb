"""The kind of device that a program is made for."""

import jax

from ant_jax.platforms import making_for, platform


def test_platform():
    assert platform() == "cpu"
    with jax.default_device("tpu"):
        assert platform() == "tpu"
        with making_for("gpu"):
            assert platform() == "gpu"
    with jax.default_device(jax.devices()[1]):
        assert platform() == "cpu"
