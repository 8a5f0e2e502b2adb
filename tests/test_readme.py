import re
from pathlib import Path

import numpy as np

from ant_jax import mtl

README = (Path(__file__).parent.parent / "README.md").read_text()


def test_the_transforms_in_ones_own_loop():
    """The README's Python blocks run as they stand and do what the text beside them says."""
    section = README.partition("## In your own training loop")[2].partition("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(blocks) == 4
    scope = {}
    for block in blocks:
        assert len([line for line in block.splitlines() if line.strip()]) <= 16
        exec(block, scope)
    assert scope["found"].gradient.shape == (3, 2)
    assert scope["at_features"].gradient["heads"].shape == (3, 2)
    assert (np.asarray(scope["at_features"].state.weights) > 0).all()
    np.testing.assert_allclose(
        scope["method"][0].gram, mtl.gramian(scope["stacked"]["trunk"]), rtol=1e-5
    )
    assert scope["updates"]["heads"].any()
    combined = scope["state"][0]
    # Nash's solution alpha = k w, up to the ridge on these nearly opposed gradients.
    alpha, gram = 2 * np.asarray(combined.weights), np.asarray(combined.gram)
    np.testing.assert_allclose(alpha * (gram @ alpha), 1, rtol=0.02)
    start = np.sum((scope["targets"] - np.zeros(2)) ** 2, 1)
    assert (np.asarray(scope["losses"]) < start).all()


def test_files_and_commands_exist():
    root = Path(__file__).parent.parent
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (root / target).exists(), target
    for module in re.findall(r"python -m ([a-z_.]+)", README):
        assert (root / (module.replace(".", "/") + ".py")).exists(), module
    for config in re.findall(r"configs/[a-z0-9_]+\.py", README):
        assert (root / config).exists(), config
