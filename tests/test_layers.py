"""Which module may import what (DESIGN.md, section 4)."""

import ast
import graphlib
import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from ant_jax.runtime.extras import MODULES

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ant_jax"
CORE = {"jax", "flax", "optax", "numpy"}
CORE |= {"ant_jax.settings", "ant_jax.platforms", "ant_jax.pixels"}
# A layer imports from those named, and from itself.
LAYERS = {
    "settings": set(),
    "platforms": {"jax"},
    "pixels": {"jax", "numpy"},
    "npz": {"numpy"},
    "mtl": CORE,
    # SciPy for the densities of levels; jax itself needs it.
    "diffusion": CORE | {"scipy"},
    "published_weights": {"numpy"},
    "models": CORE | {"ant_jax.published_weights"},
    "interop": {
        *("numpy", "ml_dtypes", "safetensors"),
        *("ant_jax.runtime", "ant_jax.published_weights"),
    },
    "tasks": CORE | {"ant_jax.diffusion", "ant_jax.npz"},
    "optimizers": CORE | {"ant_jax.mtl"},
    "schedules": CORE,
    "train_step": CORE | {"ant_jax.mtl", "ant_jax.diffusion", "ant_jax.tasks"},
}
# What the extras install, but what jax, flax and optax import themselves.
EDGES = {"tensorflow", "tensorboard", *itertools.chain(*MODULES.values())}
EDGES -= {"absl", "ml_dtypes", "yaml"}


# A module imports from its own room and from those before it.
ROOMS = [
    *("settings", "platforms", "pixels", "npz", "published_weights", "runtime"),
    *("mtl", "diffusion", "tasks", "models", "optimizers", "schedules", "train_step"),
    *("interop", "data", "latents", "sampling", "evaluation"),
    *(
        "config",
        "dataset",
        "setup_checks",
        "experiment",
        "state_layout",
        "compiled_step",
        "workdir",
    ),
    *("init_from", "hooks", "results", "measuring"),
    *("sample", "evaluate", "evaluation_in_training"),
    *("train", "encode", "model_card", "export", "cli", "report", "main", "command"),
]
# These take plain values and objects.
WITHOUT_CONFIG = ROOMS[: ROOMS.index("config")]


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def package_files():
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def layer_files(layer):
    files = [path for path in package_files() if room_of(path) == layer]
    assert files, f"DESIGN.md names a layer {layer}, which is not there"
    return files


def imported(nodes):
    """Names of the modules that statements import; ``from a import b`` is one of a.b."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import of {node.module}"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports(path):
    """What a file imports, wherever in it: packages, and rooms of ours as ``ant_jax.ROOM``."""
    for name in imported(ast.walk(ast.parse(path.read_text()))):
        parts = name.split(".")
        yield ".".join(parts[:2]) if parts[0] == "ant_jax" else parts[0]


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_imports_what_it_may_alone(layer):
    allowed = LAYERS[layer] | {f"ant_jax.{layer}"} | sys.stdlib_module_names
    for path in layer_files(layer):
        assert set(imports(path)) <= allowed, path


def test_every_room_has_its_place():
    assert sorted(ROOMS) == sorted({room_of(path) for path in package_files()})


def test_no_import_runs_up_and_no_config_is_known_below_its_room():
    found = set()
    for path in package_files():
        room = room_of(path)
        below = {f"ant_jax.{each}" for each in ROOMS[: ROOMS.index(room) + 1]}
        for name in set(imports(path)) - below:
            if name.startswith("ant_jax.") or (name == "ml_collections" and room in WITHOUT_CONFIG):
                found.add((str(path.relative_to(PACKAGE)), name.removeprefix("ant_jax.")))
    assert not found


def test_no_modules_import_each_other():
    dotted = lambda path: ".".join(path.relative_to(ROOT).with_suffix("").parts)
    modules = {dotted(path).removesuffix(".__init__"): path for path in package_files()}
    graph = {}
    for module, path in modules.items():
        # Those in functions come when all is imported.
        names = imported(ast.parse(path.read_text()).body)
        theirs = (name if name in modules else name.rpartition(".")[0] for name in names)
        graph[module] = {name for name in theirs if name in modules}
    assert "ant_jax.train_step" in graph["ant_jax.train"]
    # It raises an error that names the circle.
    graphlib.TopologicalSorter(graph).prepare()


# A loop of one's own, as in the README.
LOOP = """
import jax, jax.numpy as jnp, optax
from ant_jax import mtl

tx = optax.chain(mtl.combine(mtl.nash(2)), optax.sgd(0.1))
targets = jnp.array([[1.0, 0.0], [0.0, 3.0]])
loss = lambda params, target: jnp.sum((params - target) ** 2)
losses, grads = jax.vmap(jax.value_and_grad(loss), (None, 0))(jnp.zeros(2), targets)
updates, _ = jax.jit(tx.update)(grads, tx.init(jnp.zeros(2)), losses=losses)
assert (updates > 0).all()
"""


def run(program):
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_core_runs_where_the_libraries_of_the_edges_are_not_installed():
    # Those who read files of others have what an extra installs.
    layers = [layer for layer in LAYERS if layer_files(layer) and layer != "interop"]
    run(
        "import importlib, sys\n"
        f"sys.modules.update(dict.fromkeys({EDGES}))\n"
        f"for layer in {layers}:\n"
        "    importlib.import_module(f'ant_jax.{layer}')\n"
        f"{LOOP}"
    )


def test_the_loop_starts_without_what_is_slow_to_import():
    program = "import sys, ant_jax.main, ant_jax.train; ant_jax.train.data.digits('train')"
    loaded = run(f"{program}; print(*sys.modules)").split()
    slow = {"tensorflow", "tensorflow_datasets", "matplotlib", "sklearn", "pandas"}
    # These are imported while the step compiles, or after it.
    slow |= {"grain", "orbax.checkpoint", "scipy"}
    assert not slow & set(loaded)
    assert "ant_jax.train" in loaded


def test_no_test_imports_another():
    """What tests share is in files that hold no tests."""
    # What records the expected values is run by hand, beside the test that reads them.
    files = [file for file in (ROOT / "tests").rglob("*.py") if "data" not in file.parts]
    names = {
        (file.name, name.split(".")[0])
        for file in files
        for name in imported(ast.walk(ast.parse(file.read_text())))
    }
    assert ("test_train.py", "tiny_runs") in names
    assert not [each for each in names if each[1].startswith("test_")]
