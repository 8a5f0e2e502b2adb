"""docs/adding.md: every example runs and keeps the contract that the page states."""

import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ant_jax import data, diffusion, evaluation, models, mtl, settings
from ant_jax.diffusion import samplers
from ant_jax.evaluation import features, metrics

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "adding.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def component(tmp_path, monkeypatch):
    """An example by its name: a component of a module of one's own."""
    monkeypatch.syspath_prepend(tmp_path)

    def load(name, folder, makes):
        (text,) = [each for each in EXAMPLES if re.search(rf"^(class|def) {name}\(", each, re.M)]
        (tmp_path / f"adding_{name}.py").write_text(text)
        return settings.resolve(folder, f"adding_{name}:{name}", makes)

    return load


def test_method(component):
    weighting = component("softmax", mtl, mtl.Weighting)(3, temperature=2.0)
    losses, counts = jnp.array([1.0, 2.0, 0.0]), jnp.array([4, 4, 0])
    weights, _ = weighting.weigh(mtl.TaskStats(losses, None, counts), weighting.init())
    assert weights[1] > weights[0] > weights[2] == 0


def test_network(component):
    network = component("Mlp", models, nn.Module)
    assert list(models.network_settings(network)) == ["width"]
    model = models.build_network(network, {"width": 8}, channels=3, num_classes=2)
    x, t, y = jnp.ones((2, 4, 4, 3)), jnp.ones(2), jnp.array([0, 2])
    output = model.apply(model.init(jax.random.key(0), x, t, y), x, t, y)
    assert output.shape == x.shape and not output.any()


def test_sampler(component):
    drawn = [
        sampler(
            diffusion.gaussian(timesteps=20),
            lambda x, t, y: 0.5 * x,
            (2, 4, 4, 1),
            jax.random.key(0),
            samplers.SampleOptions(num_steps=5),
        )
        for sampler in (component("euler", samplers, samplers.Sampler)(), samplers.ddim())
    ]
    np.testing.assert_allclose(*drawn, atol=1e-5)


def test_source(component):
    source = component("squares", data, data.Source)(num_images=6)
    batch = next(data.batches(source, batch_size=6, seed=0, image_size=8))
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], 255 * batch["label"])
    assert source.facts()["num_images"] == 6


def test_extractor_and_metric(component):
    extractor = component("colours", features, evaluation.Extractor)()
    metric = component("spread", metrics, evaluation.Metric)()
    with pytest.raises(ValueError, match="3 channels"):
        extractor.check(8, 8, 1)
    evaluator = evaluation.build_evaluator(extractor, [metric])
    images = np.zeros((2, 8, 8, 3), np.uint8)
    images[1] = 10
    summary = evaluation.summarise(
        [(images, None)], evaluator.network, evaluator.moments, evaluator.samples
    )
    assert metric.measure(summary, None) == {"spread": 5.0}


def test_every_example_is_tested():
    assert len(EXAMPLES) == 6
