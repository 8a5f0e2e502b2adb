"""State dicts in files, of safetensors or PyTorch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Teaches NumPy what bfloat16 is, which safetensors asks it.
import ml_dtypes  # noqa: F401
import numpy as np
import safetensors
import safetensors.numpy

from ant_jax import files
from ant_jax.interop.torch_file import read
from ant_jax.interop.weights import WeightsError

# Where checkpoints keep a state dict, the best first: DiT's have the moving average beside the
# network, those of PyTorch Lightning have one state dict with everything.
_CONTAINERS = ("ema", "state_dict", "model")
_PARALLEL = "module."


def read_state(path: str | Path) -> dict[str, np.ndarray]:
    """Reads the state dict of a safetensors file or of a file of PyTorch.

    The kind of file is seen from its content. A state dict within a checkpoint is found under
    "ema", "state_dict" or "model", in this order; the prefix "module.", which PyTorch's parallel
    networks put before all names, is cut off.

    Args:
      path: The file. Nothing in it is run (see `read`).

    Returns:
      Arrays by name, as they were stored; bfloat16 is that of ml_dtypes.

    Raises:
      FileNotFoundError: If there is no such file.
      WeightsError: If the file has no state dict, or is a damaged safetensors file.
      ValueError: If it is no file of either kind, or a damaged one of PyTorch.
    """
    path = Path(path)
    tree = _read_safetensors(path) if _is_safetensors(path) else read(path)
    within = [tree.get(key) for key in _CONTAINERS] if isinstance(tree, dict) else []
    for state in (*within, tree):
        if _is_state(state):
            parallel = all(name.startswith(_PARALLEL) for name in state)
            return {name.removeprefix(_PARALLEL * parallel): state[name] for name in state}
    held = f"a dict with the keys {list(tree)[:5]}" if isinstance(tree, dict) else type(tree)
    raise WeightsError(f"{path} has no state dict, a dict of arrays by name. It holds {held}")


def write_state(path: str | Path, state: Mapping[str, np.ndarray]) -> None:
    """Writes a state dict as a safetensors file, which is whole or not there.

    Args:
      path: The file; the folders above it are made.
      state: Arrays by name, such as `to_torch` returns.
    """
    # The package takes the memory of an array for that of one in C's order.
    arrays = {name: np.asarray(value, order="C") for name, value in state.items()}
    files.write_bytes(Path(path), safetensors.numpy.save(arrays))


def _is_safetensors(path: Path) -> bool:
    if path.is_dir():
        return False
    with path.open("rb") as file:
        head = file.read(9)
    # The length of a JSON object, and its beginning.
    return head[8:] == b"{" and not head.startswith(b"PK")


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        with safetensors.safe_open(path, framework="np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    # The last two for types that NumPy doesn't have.
    except (safetensors.SafetensorError, AttributeError, TypeError) as error:
        raise WeightsError(f"cannot read {path}: {error}") from error


def _is_state(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and len(value) > 0
        and all(isinstance(name, str) for name in value)
        and all(isinstance(array, np.ndarray) for array in value.values())
    )
