"""Installs ant-jax in a notebook: `colab.ipynb` runs this file before anything is installed.

The JAX of the runtime stays if it is new enough, because it fits the accelerator. Otherwise JAX and
its plugin for the accelerator are installed together: their versions must match.
"""

import glob
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple


class Runtime(NamedTuple):
    """What decides the installation.

    Attributes:
      accelerator: the extra of ant-jax for the machine: "cuda12", "cuda13", "tpu" or "" for none.
      installed: versions of the installed packages by name.
    """

    accelerator: str
    installed: Mapping[str, str]


def this_runtime() -> Runtime:
    """The runtime of this process."""
    return Runtime(_accelerator(), _installed())


def _accelerator():
    try:
        said = subprocess.run(["nvidia-smi"], capture_output=True, text=True).stdout
    except OSError:
        said = ""
    # The newest CUDA that the driver supports.
    if found := re.search(r"CUDA Version: *(\d+)", said):
        return "cuda13" if int(found[1]) >= 13 else "cuda12"
    return "tpu" if glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*") else ""


def _installed():
    # Folders without metadata have no name.
    every = importlib.metadata.distributions()
    return {_plain(each.name): each.version for each in every if each.name}


def _plain(name):
    return re.sub("[-_.]+", "-", name).lower()


def requirements(runtime: Runtime, folder: Path) -> list[str]:
    """What pip is told to install.

    Args:
      runtime: where.
      folder: with the code of ant-jax.
    """
    (needed,) = re.findall(r"^ *jax>=(.+)$", (folder / "setup.cfg").read_text(), re.M)
    numbers = lambda version: [int(each) for each in re.findall(r"\d+", version)[:3]]
    jax = runtime.installed.get("jax")
    kept = jax is not None and numbers(jax) >= numbers(needed)
    extras = ["experiments"]
    if runtime.accelerator and not (kept and _has_plugin(runtime)):
        extras.append(runtime.accelerator)
    # pip takes the name of a relative folder for that of a package. The pin keeps other packages
    # from asking for a newer JAX, which the plugin would not fit.
    return [f"{folder.absolute()}[{','.join(extras)}]", *([f"jax=={jax}"] if kept else [])]


def _has_plugin(runtime):
    """Whether the installed JAX can use the accelerator."""
    if runtime.accelerator == "tpu":
        return "libtpu" in runtime.installed
    # A driver for CUDA 13 runs CUDA 12 too.
    plugins = ["jax-cuda12-plugin"]
    plugins += ["jax-cuda13-plugin"] * (runtime.accelerator == "cuda13")
    return any(runtime.installed.get(each) == runtime.installed["jax"] for each in plugins)


def outdated(
    before: Mapping[str, str], after: Mapping[str, str], loaded: Collection[str]
) -> list[str]:
    """The loaded packages that pip has replaced; they need a restart.

    Args:
      before: versions of the installed packages by name.
      after: the same, after the installation.
      loaded: the modules that are imported.
    """
    modules = importlib.metadata.packages_distributions()
    of_loaded = {
        _plain(name)
        for module in {each.partition(".")[0] for each in loaded}
        for name in modules.get(module, ())
    }
    return sorted(name for name in of_loaded & before.keys() if before[name] != after.get(name))


def install(folder: str) -> None:
    """Installs ant-jax with all that the notebook needs.

    Raises:
      SystemExit: if pip fails, or if the runtime must be restarted.
    """
    runtime = this_runtime()
    wanted = requirements(runtime, Path(folder))
    print(f"accelerator: {runtime.accelerator or 'none'}; pip install {' '.join(wanted)}")
    pip = [sys.executable, "-m", "pip", "install", "-q", *wanted]
    ended = subprocess.run(pip, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if ended.returncode:
        sys.exit(ended.stdout)
    importlib.invalidate_caches()
    if names := outdated(runtime.installed, _installed(), sys.modules):
        sys.exit(
            f"{', '.join(names)} changed while in use: choose Runtime > Restart session, and run "
            "all cells again"
        )
