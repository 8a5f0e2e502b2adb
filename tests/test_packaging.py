"""What is installed, away from the clone."""

import ast
import configparser
import functools
import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import configs
from ant_jax.runtime.extras import MODULES

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder of the packages, as a wheel has it."""
    folder = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=60)
    return folder


def test_what_is_installed(installed):
    assert os.listdir(installed) == ["ant_jax"]
    there = {str(path.relative_to(installed)) for path in installed.rglob("*") if path.is_file()}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "ant_jax").rglob("*.py")}
    modules |= {f"ant_jax/configs/{path.name}" for path in Path(configs.__file__).parent.glob("*")}
    modules.discard("ant_jax/configs/__pycache__")
    page = {f"ant_jax/report/page.{kind}" for kind in ("css", "html", "js")}
    assert there == modules | page | {"ant_jax/py.typed", "ant_jax/data/digits.npz"}
    assert sum((installed / name).stat().st_size for name in there) < 2**21


def packages_of(lines):
    found = {re.match(r"[\w-]+", line)[0].lower() for line in lines.split("\n") if line}
    return found - {"ant-jax"}


def imported(folder):
    """The packages that files import, wherever in them."""
    names = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module)
    names = {name.partition(".")[0] for name in names} - sys.stdlib_module_names
    return distributions(names - {"ant_jax", "configs", "experiments"})


@functools.cache
def packages():
    return importlib.metadata.packages_distributions()


def distributions(modules):
    return {packages().get(name, [name])[0].replace("_", "-").lower() for name in modules}


def test_extras_hold_what_is_imported_and_what_is_asked_for():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    core = packages_of(setup["options"]["install_requires"])
    in_extra = {name: packages_of(lines) for name, lines in setup["options.extras_require"].items()}
    # array_record and tensorstore are what grain and orbax give to read and write.
    used = imported("ant_jax") - {"array-record", "tensorstore"}
    optional = (in_extra[name] for name in ("tfds", "report", "wandb"))
    assert used == core.union(in_extra["training"], *optional)
    assert imported("experiments") - used <= in_extra["experiments"]
    for extra, modules in MODULES.items():
        # One module of each is enough; orbax has several packages.
        assert distributions(set(modules) - {"orbax"}) == in_extra[extra] - {"orbax-checkpoint"}


WITHOUT_EXTRAS = """
import runpy, sys
from ant_jax.runtime.extras import MODULES

hidden = {module for each in MODULES.values() for module in each}
hidden -= {"absl", "ml_dtypes", "orbax", "yaml"}
sys.modules.update(dict.fromkeys(hidden))
for name in "train", "evaluate", "data", "report", "load_run":
    try:
        exec(f"from ant_jax import {name}")
    except ImportError as error:
        print(error)
for name in "ant_jax.main", "experiments.demo":
    try:
        runpy.run_module(name, run_name="__main__")
    except SystemExit as error:
        print(error)
sys.argv = ["ant-jax", "--help"]
runpy.run_module("ant_jax.main", run_name="__main__")
"""


def test_without_the_packages_of_an_extra_one_line_names_it():
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTRAS],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    *lines, helped = result.stdout.split("\n", 7)
    line = lines[0]
    assert line.startswith(f"clu is not installed: pip install -e '{ROOT}[training]'")
    assert lines == [line] * 5 + [f"error: {line}"] * 2, result.stderr
    assert helped.startswith("Trains, samples, evaluates,") and line in helped
    assert "ant_jax.mtl" in helped
    assert not result.stderr


def test_make_says_that_it_installs_before_pip_is_silent():
    command = ["make", "--dry-run", "--always-make", "demo"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60).stdout
    line = "installing '.[experiments]' into .venv; half a minute"
    assert 0 < said.index(line) < said.index("pip")


PROGRAM = """
import importlib, os, sys
import ant_jax.config.file as file, ant_jax.configs.digits

others = sys.path[1:]
print(file.__file__, file.read(APART).data.name)
for folder, module in CASES:
    os.chdir(folder)
    sys.path[:] = [folder, *others]
    for name in [name for name in sys.modules if name.partition(".")[0] == "configs"]:
        del sys.modules[name]
    print(*(file.read(name).data.name for name in ["mine.py", file.DEFAULT, *NAMES]))
    print(importlib.import_module(module).MINE if module else 0)
"""


def test_configs_are_found_in_any_folder(installed, tmp_path):
    """Also in one with a package of the user's named `configs`, and in none is that hidden."""
    names = [f"configs/{path.name}" for path in Path(configs.__file__).parent.glob("[a-z]*.py")]
    assert len(names) > 5
    # A config that inherits from one beside it.
    apart = tmp_path / "apart"
    apart.mkdir()
    (apart / "parent.py").write_text("from configs.folder64 import get_config")
    (apart / "child.py").write_text("from parent import get_config")
    cases = []
    for i, own in enumerate(["", "configs/__init__.py", "configs/other.py", "configs.py"]):
        folder = tmp_path / str(i)
        (folder / own).parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(exist_ok=True)
        (folder / "mine.py").write_text("from configs.digits import get_config")
        if own:
            (folder / own).write_text("MINE = 1")
        module = own.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        cases.append((str(folder), module))
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            f"CASES, NAMES, APART = {cases}, {names}, {str(apart / 'child.py')!r}\n{PROGRAM}",
        ],
        env={**os.environ, "PYTHONPATH": str(installed)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert result.returncode == 0, result.stderr
    where, *lines = result.stdout.splitlines()
    assert where.startswith(str(installed)) and where.endswith(" folder")
    assert [int(line) for line in lines[1::2]] == [0, 1, 1, 1]
    for line in lines[::2]:
        mine, default, *others = line.split()
        assert mine == default == others[names.index("configs/digits.py")] == "digits"
        assert others[names.index("configs/folder64.py")] == "folder"
