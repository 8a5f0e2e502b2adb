"""Reads and writes state dicts: files of safetensors, and of PyTorch for reading."""

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

# Registers bfloat16 with NumPy; safetensors needs it.
import ml_dtypes  # noqa: F401
import numpy as np
import safetensors
import safetensors.numpy

from ant_jax.interop.plain_pickle import Unread
from ant_jax.interop.torch_file import read
from ant_jax.published_weights import WeightsError
from ant_jax.runtime import files

# The keys of state dicts in checkpoints, the preferred first: DiT's have the moving average beside
# the network; those of PyTorch Lightning have one state dict with everything.
_CONTAINERS = ("ema", "state_dict", "model_state_dict", "model")
# PyTorch's wrappers add prefixes to names: torch.compile and FSDP anywhere in a name, DataParallel
# and similar ones before all names. Modules of PyTorch Lightning call their network "model".
_WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_PREFIXES = ("module.", "model.")
# Modules of the functions that create other tensors of PyTorch, and arrays of NumPy 1 and 2.
_MAKE_TENSORS = ("torch.", "numpy.core.", "numpy._core.")


def read_state(path: str | Path) -> dict[str, np.ndarray]:
    """Reads the state dict of a safetensors file or of a file of PyTorch.

    The content decides which kind of file it is. In a checkpoint, the state dict is the entry
    "ema", "state_dict", "model_state_dict" or "model", in this order. Entries that are not tensors,
    such as numbers, are left out. The prefixes of torch.compile and of parallel networks are
    removed from the names, and "module." and "model." if all names start with them.

    Args:
      path: The file. No code in it is run (see `read`).

    Returns:
      Arrays by name, with the stored types; bfloat16 is that of ml_dtypes.

    Raises:
      FileNotFoundError: If the file does not exist.
      WeightsError: If the file has no state dict, if two weights would get the same name, if a
        tensor is of an unknown kind, or if it is a damaged safetensors file.
      ValueError: If it is neither kind of file, or a damaged file of PyTorch.
    """
    path = Path(path)
    tree = _read_safetensors(path) if _is_safetensors(path) else read(path)
    within = [tree.get(key) for key in _CONTAINERS] if isinstance(tree, dict) else []
    for state in (*within, tree):
        if isinstance(state, Unread):
            raise WeightsError(
                f"{path} holds its weights as an object of {state.name}, which can't be read: save "
                "only its state_dict"
            )
        if _is_state(state):
            _check_tensors(state, path)
            arrays = {name: value for name, value in state.items() if type(value) is np.ndarray}
            return _unwrapped(arrays, path)
    held = f"a dict with the keys {list(tree)[:5]}" if isinstance(tree, dict) else type(tree)
    raise WeightsError(f"{path} has no state dict, a dict of arrays by name. It holds {held}")


def read_metadata(path: str | Path) -> dict[str, str]:
    """Reads the metadata of a safetensors file, see `write_state`; {} for other files.

    Raises:
      FileNotFoundError: If the file does not exist.
      WeightsError: If it is a damaged safetensors file.
    """
    path = Path(path)
    if not _is_safetensors(path):
        return {}
    with _opened(path) as file:
        return file.metadata() or {}


def write_state(
    path: str | Path,
    state: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a state dict as a safetensors file, atomically.

    Args:
      path: The file; the folders above it are created.
      state: Arrays by name, such as `to_torch` returns.
      metadata: Strings by name, stored beside the arrays.
    """
    # safetensors takes the memory of every array as C-ordered.
    arrays = {name: np.asarray(value, order="C") for name, value in state.items()}
    content = safetensors.numpy.save(arrays, None if metadata is None else dict(metadata))
    files.write_bytes(Path(path), content)


def _is_safetensors(path: Path) -> bool:
    if path.is_dir():
        return False
    with path.open("rb") as file:
        head = file.read(9)
    # A safetensors file starts with the length of a JSON object, 8 bytes, and the object.
    return head[8:] == b"{" and not head.startswith(b"PK")


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safetensors.safe_open(path, framework="np") as file:
            yield file
    # AttributeError and TypeError come from types that NumPy doesn't have.
    except (safetensors.SafetensorError, AttributeError, TypeError) as error:
        raise WeightsError(f"cannot read {path}: {error}") from error


def _is_state(value: Any) -> TypeGuard[dict[str, Any]]:
    """Whether a value is a dict of arrays by name, without arrays in nested containers."""
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        return False
    arrays = [array for array in value.values() if isinstance(array, np.ndarray)]
    others = [other for other in value.values() if not isinstance(other, np.ndarray)]
    return bool(arrays) and not _holds_arrays(others)


def _check_tensors(state: dict[str, Any], path: Path) -> None:
    """Raises a WeightsError if a tensor was not read: it could be a part of the network."""
    for name, value in state.items():
        if isinstance(value, Unread) and value.name.startswith(_MAKE_TENSORS):
            raise WeightsError(f"{path}: {name} is created by {value.name}, which can't be read")


def _holds_arrays(values: list) -> bool:
    # Not recursive, and visits each container once: a file may nest them deeply, or in a circle.
    seen, left = set(), [values]
    while left:
        value = left.pop()
        if isinstance(value, np.ndarray):
            return True
        if isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            left.extend(value.values() if isinstance(value, dict) else value)
    return False


def _unwrapped(state: dict[str, np.ndarray], path: Path) -> dict[str, np.ndarray]:
    unwrapped: dict[str, np.ndarray] = {}
    for name, value in state.items():
        bare = _WRAPPERS.sub("", name)
        if bare in unwrapped:
            raise WeightsError(f"{path} has two weights of the name {bare}, one of them wrapped")
        unwrapped[bare] = value
    for prefix in (*_PREFIXES, *_PREFIXES):
        if all(name.startswith(prefix) for name in unwrapped):
            unwrapped = {name.removeprefix(prefix): value for name, value in unwrapped.items()}
    return unwrapped
