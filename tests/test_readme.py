import re
from pathlib import Path

import numpy as np
import pytest

from ant_jax import mtl

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
OWN_LOOP = (ROOT / "docs" / "own_loop.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "experiments/RESULTS.md"]


def test_the_transforms_in_ones_own_loop():
    """The Python blocks run as they stand and do what the text beside them says."""
    blocks = re.findall(r"```python\n(.*?)```", OWN_LOOP, re.DOTALL)
    assert len(blocks) == 4
    assert re.findall(r"```python\n(.*?)```", README, re.DOTALL) == blocks[:1]
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_commands_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), target
    for module in re.findall(r"python -m ((?:ant_jax|experiments|benchmarks)\.[a-z_.]+)", text):
        path = ROOT / module.rstrip(".").replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
    for config in re.findall(r"configs/[a-z0-9_]+\.py", text):
        assert (ROOT / config).exists(), config


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 120
