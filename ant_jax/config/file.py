"""Config files: Python files whose function ``get_config`` returns a config."""

import difflib
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Mapping
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import MappingProxyType

from ml_collections import ConfigDict

from ant_jax import config as config_lib
from ant_jax.config import ConfigError
from ant_jax.runtime.files import user_path

# The configs of the package: inside it when installed, beside it in a clone.
_PACKAGE = Path(__file__).resolve().parents[1]
_CONFIGS = _PACKAGE / "configs"
if not _CONFIGS.is_dir():
    _CONFIGS = _PACKAGE.parent / "configs"

DEFAULT = str(_CONFIGS / "digits.py")


def names() -> list[str]:
    """The config files of the package, such as "configs/digits.py"; any folder has them."""
    return [f"configs/{path.name}" for path in sorted(_CONFIGS.glob("[a-z]*.py"))]


def read(file_and_argument: str, names: Mapping[str, str] = MappingProxyType({})) -> ConfigDict:
    """Reads the config of ``FILE``, or of ``FILE:ARGUMENT`` if its `get_config` takes an argument.

    If there is no ``configs/NAME.py`` here, that of the package is read. The file may ``import
    configs`` from any folder, and what lies beside it.

    Args:
      file_and_argument: ``FILE`` or ``FILE:ARGUMENT``.
      names: components by setting, such as {"model.name": "unet"}; they replace those of the file.

    Raises:
      ConfigError: if the file does not exist, raises an error, or returns no config.
      OSError: if it can't be read.
    """
    file, *argument = file_and_argument.split(":", 1)
    path = user_path(file)
    ours = _CONFIGS / path.name
    if path.parent == Path("configs") and not path.exists() and ours.is_file():
        path = ours
    if not path.is_file():
        raise ConfigError("it is a folder" if path.is_dir() else _not_there(path))
    loader = SourceFileLoader("config_file", str(path))
    module = _new_module(loader)
    # Last, so that it hides nothing; for good, because names in the config are imported later.
    sys.path.append(str(path.absolute().parent))
    try:
        _find_configs()
        loader.exec_module(module)
        if not callable(getattr(module, "get_config", None)):
            raise ConfigError("it has no function get_config")
        _check_argument(module.get_config, file, argument)
        config = module.get_config(*argument)
    except Exception as error:
        if isinstance(error, ConfigError) and not isinstance(error, config_lib.AssignmentError):
            raise
        # Any error here is a mistake in that file.
        lines = [
            f"line {frame.lineno}: "
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename == str(path)
        ]
        kind = "" if isinstance(error, ConfigError) else f"{type(error).__name__}: "
        words = " ".join(str(error).split())
        raise ConfigError(f"{''.join(lines[-1:])}{kind}{words}") from error
    if not isinstance(config, ConfigDict):
        raise ConfigError(
            f"get_config must return an ml_collections.ConfigDict, not a {type(config).__name__}"
        )
    config_lib.update(config, names)
    return config.lock()


def _new_module(loader):
    """The empty module of a file, in `sys.modules`, where dataclasses look it up."""
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None  # the loader has what it needs
    sys.modules[loader.name] = module = module_from_spec(spec)
    return module


def _check_argument(get_config, file, argument):
    try:
        inspect.signature(get_config).bind(*argument)
    except TypeError:
        if argument:
            raise ConfigError(f"its get_config takes no argument: write --config={file}") from None
        raise ConfigError(
            f"its get_config needs an argument: write --config={file}:ARGUMENT"
        ) from None


def _find_configs():
    """Lets ``import configs`` find ours, also if the user has a package of that name."""
    try:
        package = importlib.import_module("configs")
    except ModuleNotFoundError as error:
        if error.name != "configs":
            raise
        loader = SourceFileLoader("configs", str(_CONFIGS / "__init__.py"))
        package = _new_module(loader)
        loader.exec_module(package)
    places = getattr(package, "__path__", ())
    if str(_CONFIGS) not in places:
        package.__path__ = [*places, str(_CONFIGS)]


def _not_there(path):
    others = os.listdir(path.parent) if path.parent.is_dir() else []
    beside = {other: str(path.parent / other) for other in others}
    ours = {Path(name).name: name for name in names()}
    written = path.with_suffix(".py").name
    for near in (beside, ours):
        if found := difflib.get_close_matches(written, near, 1):
            return f"there is no such file; did you mean {near[found[0]]}?"
    return "there is no such file"
