"""Optional packages."""

import importlib
from types import ModuleType


class MissingExtraError(ImportError):
    """An optional package is not installed; the message says how to install it."""


def import_extra(module: str, extra: str) -> ModuleType:
    """Imports a module of a package that one of ant-jax's extras installs.

    Raises:
      MissingExtraError: if the package is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise MissingExtraError(
            f"{error.name} is not installed: pip install 'ant-jax[{extra}]'"
        ) from None
