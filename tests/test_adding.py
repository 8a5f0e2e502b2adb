"""docs/adding.md: every example runs and keeps the contract that the page states."""

import re
from collections.abc import Callable
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ant_jax import (
    config,
    data,
    diffusion,
    evaluation,
    experiment,
    models,
    mtl,
    optimizers,
    schedules,
    settings,
)
from ant_jax.diffusion import loss_weights, samplers
from ant_jax.evaluation import features, metrics
from ant_jax.tasks import clusterings

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "adding.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
EXAMPLES = [block for block in BLOCKS if re.search("^(class|def) ", block, re.M)]


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


def test_optimizer_and_schedule(component):
    makes = (("momentum", optimizers, optimizers.Optimizer), ("inverse_root", schedules, Callable))
    momentum, inverse_root = (component(*each) for each in makes)
    assert momentum.__name__ == "momentum" and inverse_root.__name__ == "inverse_root"
    trained = config.default_config(
        optimizer="adding_momentum:momentum", schedule="adding_inverse_root:inverse_root"
    )
    changes = {
        **{"optimizer.decay": 0.5, "optimizer.weight_decay": 0.1},
        **{"optimizer.warmup_steps": 0, "schedule.constant_steps": 1},
    }
    config.update(trained, changes)
    config.validate(trained)
    assert "num_steps" in config.may_change(trained)
    transformation = experiment.build_optimizer(trained, 0.5).transformation
    params = {"a": jnp.array([2.0])}
    state = transformation.init(params)
    for momentum, rate in ((1.0, 0.5), (1.5, 0.5), (1.75, 0.5 / 2**0.5)):
        updates, state = transformation.update({"a": jnp.ones(1)}, state, params)
        np.testing.assert_allclose(updates["a"], -rate * (momentum + 0.1 * 2.0), rtol=1e-6)


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
    squares = component("squares", data, data.Source)
    source = squares(num_images=6)
    assert len(squares("test")) == 10
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


def test_process_and_loss_weight(component):
    process = component("data_prediction", diffusion, diffusion.Process)
    sigmoid = component("Sigmoid", loss_weights, loss_weights.LossWeight)
    assert list(settings.settings_of(sigmoid)) == ["bias"]
    assert (
        process(20, sigmoid()) == process(20, sigmoid(bias=2.0)) != process(20, sigmoid(bias=1.0))
    )
    x0, noise = np.random.default_rng(0).normal(size=(2, 3, 4, 4, 1))
    t = np.array([0, 7, 19])
    ours, theirs = (make(20, loss_weight=sigmoid()) for make in (process, diffusion.gaussian))
    # Half of the data, as a network of the data or of the noise that this leaves.
    x_t = theirs.noised(x0, t, noise)
    found = ours.predict(lambda *_: 0.5 * x0, x_t, t)
    np.testing.assert_allclose(
        ours.losses(lambda *_: 0.5 * x0, x0, t, noise),
        theirs.losses(lambda *_: found.noise, x0, t, noise),
        rtol=1e-3,
    )
    np.testing.assert_allclose(
        theirs.predict(lambda *_: found.noise, x_t, t).x0, 0.5 * x0, atol=1e-3
    )


def test_clusters(component):
    equal_snr = component("equal_snr", clusterings, clusterings.Clusters)
    log_snr = diffusion.gaussian(1000, "linear").log_snr(np.arange(1000))
    bounds = equal_snr(log_snr, 5).boundaries
    assert bounds[0] == 0 and bounds[-1] == 1000 and (np.diff(bounds) > 0).all()
    ranges = np.diff(log_snr[np.minimum(bounds, 999)])
    np.testing.assert_allclose(ranges, ranges.mean(), rtol=0.2)


def test_every_example_is_tested():
    assert len(EXAMPLES) == 11


def test_the_table_names_the_settings_and_the_arguments_that_the_program_gives():
    for group in config.GROUPS:
        if group.folder:
            given = [each for each in group.given if each not in ("parent", "name")]
            words = ", ".join(f"`{each}`" for each in given)
            file, key = f"{group.folder.replace('.', '/')}/NAME.py", f"{group.name}.{group.key}"
            assert re.search(rf"\| `{file}` \| `{key}` \| {words} ?\|", PAGE), key
