"""Config files: Python whose ``get_config`` returns the settings."""

import difflib
import os
import sys
import traceback
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

from ml_collections import ConfigDict

from ant_jax.config import ConfigError
from ant_jax.runtime.files import user_path

# Where `configs` is, on which other configs build.
_ROOT = Path(__file__).resolve().parents[1]

DEFAULT = str(_ROOT / "configs" / "digits.py")


def read(name: str) -> ConfigDict:
    """The config of ``FILE``, or of ``FILE:ARGUMENT`` where `get_config` takes one.

    The file may ``import configs`` wherever the program is started.

    Raises:
      ConfigError: if there is no such file, it can't be run, or it gives no config.
      OSError: if it can't be read.
    """
    file, *argument = name.split(":", 1)
    path = user_path(file)
    if not path.is_file():
        raise ConfigError("it is a folder" if path.is_dir() else _not_there(path))
    if str(_ROOT) not in sys.path:
        sys.path.append(str(_ROOT))
    loader = SourceFileLoader("config_file", str(path))
    module = module_from_spec(spec_from_loader(loader.name, loader))
    # Dataclasses look for it there.
    sys.modules[loader.name] = module
    try:
        loader.exec_module(module)
        if not callable(getattr(module, "get_config", None)):
            raise ConfigError("it has no function get_config")
        config = module.get_config(*argument)
    except ConfigError:
        raise
    except Exception as error:
        # Whatever a config does wrong is a mistake in that file.
        lines = [
            f"line {frame.lineno}: "
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename == str(path)
        ]
        words = " ".join(str(error).split())
        raise ConfigError(f"{''.join(lines[-1:])}{type(error).__name__}: {words}") from error
    if not isinstance(config, ConfigDict):
        raise ConfigError(
            f"get_config must return an ml_collections.ConfigDict, not a {type(config).__name__}"
        )
    return config.lock()


def _not_there(path):
    others = os.listdir(path.parent) if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, others, 1)
    return "there is no such file" + (f"; did you mean {path.parent / near[0]}?" if near else "")
