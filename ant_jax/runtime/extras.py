"""Packages that only some users need."""

import importlib
from types import ModuleType


class MissingExtraError(ImportError):
    """A package that is not installed; the message says how to install it."""


def import_extra(module: str, extra: str) -> ModuleType:
    """Imports a module of a package that is installed with an extra of this one.

    Raises:
      MissingExtraError: naming the extra, if the module is not there.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise MissingExtraError(
            f"{error.name} is not installed: pip install 'ant-jax[{extra}]'"
        ) from None
