"""Optional packages, which ``pip install 'ant-jax[EXTRA]'`` installs."""

import importlib.util
import sys
from pathlib import Path

# What each extra makes importable. To look for a module is quicker than to import it.
MODULES = {
    "training": (
        *("absl", "clu", "cloudpickle", "grain", "ml_collections", "ml_dtypes", "orbax", "PIL"),
        *("safetensors", "threadpoolctl", "yaml"),
    ),
    "experiments": ("matplotlib", "sklearn", "tqdm"),
    "tfds": ("tensorflow_datasets",),
    "report": ("plotly",),
    "wandb": ("wandb",),
}


class MissingExtraError(ImportError):
    """A package of an extra is not installed; the message says how to install it."""


def missing(extra: str) -> MissingExtraError | None:
    """The error to raise if a package of an extra is not installed."""
    for module in MODULES[extra]:
        if importlib.util.find_spec(module) is None:
            return MissingExtraError(f"{module} is not installed: {_way_out(extra)}")
    return None


def _way_out(extra):
    clone = Path(__file__).resolve().parents[2]
    if not (clone / "setup.cfg").exists():
        return f"pip install 'ant-jax[{extra}]'"
    # The name alone would be looked up in an index of packages.
    way = f"pip install -e '{clone}[{extra}]'"
    environment = clone / ".venv"
    if not environment.exists() or environment == Path(sys.prefix):
        return way
    return f"{way}, or use the environment of make demo: . {environment}/bin/activate"
