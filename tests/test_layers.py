"""Which module may import what (DESIGN.md, section 4)."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ant_jax"
CORE = {"jax", "flax", "optax", "numpy", "ant_jax.settings", "ant_jax.pixels"}
# A layer imports from those named, and from itself.
LAYERS = {
    "settings": set(),
    "pixels": {"jax", "numpy"},
    "mtl": CORE,
    "diffusion": CORE,
    "published_weights": {"numpy"},
    "models": CORE | {"ant_jax.settings", "ant_jax.published_weights"},
    "interop": {
        *("numpy", "ml_dtypes", "safetensors"),
        *("ant_jax.runtime", "ant_jax.published_weights"),
    },
    "tasks": CORE | {"ant_jax.diffusion"},
    "train_step": CORE | {"ant_jax.mtl", "ant_jax.diffusion", "ant_jax.tasks"},
}
# Not absl and scipy, which jax and optax import themselves.
EDGES = [
    *("tensorflow", "tensorflow_datasets", "tensorboard", "clu", "grain", "orbax"),
    *("ml_collections", "matplotlib", "sklearn", "PIL"),
]


def layer_files(layer):
    folder = PACKAGE / layer
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{layer}.py"]


def imports(path):
    """Names of the modules that a file imports, wherever in it; of ours with the first level."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in {path}"
            # "from ant_jax import mtl" is an import of ant_jax.mtl.
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    for name in names:
        parts = name.split(".")
        yield ".".join(parts[:2]) if parts[0] == "ant_jax" else parts[0]


@pytest.mark.parametrize(
    "path",
    [path for layer in LAYERS for path in layer_files(layer) if path.exists()],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_a_module_imports_from_the_layers_below_alone(path):
    layer = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    allowed = LAYERS[layer] | {f"ant_jax.{layer}"} | sys.stdlib_module_names
    assert set(imports(path)) <= allowed


def run(program):
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_core_runs_where_the_libraries_of_the_edges_are_not_installed():
    modules = [f"ant_jax.{layer}" for layer in LAYERS if layer_files(layer)[0].exists()]
    assert len(modules) >= 5
    run(
        "import importlib, sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {EDGES}:\n"
        "            raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Missing())\n"
        f"for name in {modules}:\n"
        "    importlib.import_module(name)\n"
    )


def test_the_loop_starts_without_what_is_slow_to_import():
    program = "import sys, ant_jax.main, ant_jax.train; ant_jax.train.data.digits('train')"
    loaded = run(f"{program}; print(*sys.modules)").split()
    slow = {"tensorflow", "tensorflow_datasets", "matplotlib", "sklearn", "pandas"}
    # These are imported while the step compiles, or after it.
    slow |= {"grain", "orbax.checkpoint", "scipy.linalg"}
    assert not slow & set(loaded)
    assert "ant_jax.train" in loaded
