"""Settings of components: their types, their ranges, and what they affect.

A component is a function or dataclass that makes a part of a run: a method, a network, a noise
process. Its settings are its typed arguments with their defaults. Its docstring documents them::

  def nash(k: int, max_norm: Annotated[float, Number(above=0)] = 1.0) -> Weighting: ...

A plain type is enough. `Annotated` adds a range, or what the setting affects if that differs from
the rest of its group.
"""

import difflib
import enum
import importlib
import inspect
import math
import numbers
import os
import pkgutil
import re
import typing
from collections.abc import Callable, Collection
from types import ModuleType
from typing import Annotated, Any, Literal, NamedTuple

# Devices count and calculate in 32 bits.
LARGEST_COUNT = 2**31 - 1
_LARGEST, _SMALLEST = 3.4e38, 1.2e-38


class Affects(enum.Flag):
    """What a setting changes."""

    NOTHING = 0  # only how a result is computed, not the result
    MEASUREMENTS = 1  # of given samples
    SAMPLES = 2  # from given parameters
    PARAMETERS = 4  # that training finds
    # What given parameters compute: with another value, a file of parameters is useless.
    MEANING = SAMPLES | PARAMETERS | 8


class Traced:
    """Marks a setting that is an argument of the compiled step.

    Runs that differ only in such settings share one compiled step.
    """


class Check(NamedTuple):
    """A condition on a value, beside its type, and the words for it."""

    holds: Callable[[Any], bool]
    allowed: str

    def __repr__(self) -> str:
        # For the signature that help() shows.
        return repr(self.allowed)


def Integer(low: int = -LARGEST_COUNT, high: float = LARGEST_COUNT) -> Check:
    """An integer in low .. high."""
    words = f"an integer >= {low}" if low > -LARGEST_COUNT else "an integer"
    return Check(
        lambda value: low <= value <= high,
        words + (f" and <= {high}" if high < LARGEST_COUNT else ""),
    )


def check_integer(name: str, value: Any, low: int, high: float = math.inf) -> None:
    """Raises a ValueError unless a value is an integer, NumPy's included, in low .. high."""
    check = Integer(low, high)
    integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not integer or not check.holds(value):
        raise ValueError(f"{name} must be {check.allowed}, got {value!r}")


def Number(low: float = -_LARGEST, high: float = _LARGEST, *, above: float | None = None) -> Check:
    """A number within the range of float32, in low .. high, or greater than ``above``."""
    words = "a number" if low == -_LARGEST else f"a number >= {low:g}"
    least = low
    if above is not None:
        words, least = f"a number > {above:g}", above + _SMALLEST
    if high < _LARGEST:
        words += f" and <= {high:g}"
    return Check(lambda value: least <= value <= high, words)


def OneOf(*values: Any) -> Check:
    """One of some values. If they are constants, `typing.Literal` does the same."""
    return Check(lambda value: value in values, "one of " + ", ".join(map(repr, values)))


def _is_path(text):
    # `~user` stays as it is if there is no such user.
    return "\0" not in text and not os.path.expanduser(text).startswith("~")


class PerProcess:
    """Marks a setting that may differ between the processes of a run, such as a path."""


Path = Annotated[
    str, Check(_is_path, "a path; ~ is your home folder, ~NAME that of user NAME"), PerProcess()
]


def _is_pattern(text):
    try:
        re.compile(text)
    except re.error:
        return False
    return True


Pattern = Annotated[str, Check(_is_pattern, "a regular expression, or '' for none")]


REQUIRED = inspect.Parameter.empty
# An error with a hint lists at most so many names.
_MANY = 10


class Setting(NamedTuple):
    """One setting of a component.

    Attributes:
      kinds: types that a value may have.
      check: condition on the value.
      default: its default; `REQUIRED` if there is none.
      affects: what the setting changes.
      traced: whether it is an argument of the compiled step.
      per_process: whether it may differ between the processes of a run.
    """

    kinds: tuple[type, ...]
    check: Check
    default: Any
    affects: Affects
    traced: bool = False
    per_process: bool = False

    def problem(self, value: Any) -> str | None:
        """What the value must be, in words, if it is wrong; None if it is right."""
        # bool is a subclass of int, but True is not a number of steps.
        of_kind = isinstance(value, self.kinds) and (bool in self.kinds) == isinstance(value, bool)
        return None if of_kind and self.check.holds(value) else self.check.allowed


_KINDS = {
    bool: ((bool,), "True or False"),
    int: ((int,), "an integer"),
    float: ((int, float), "a number"),
    str: ((str,), "a string"),
    tuple: ((tuple,), "a tuple"),
}


def settings_of(
    component: Callable, given: Collection[str] = (), affects: Affects = Affects.PARAMETERS
) -> dict[str, Setting]:
    """The settings of a component: its typed arguments, except those that the program gives.

    Args:
      component: a function, a dataclass or a Flax module.
      given: names of the arguments that the program gives; they are not settings.
      affects: what a setting affects if it has no mark of its own.

    Raises:
      TypeError: naming the argument, if its type is not one of those that settings can have.
    """
    hints = typing.get_type_hints(
        component.__init__ if inspect.isclass(component) else component, include_extras=True
    )
    found = {}
    for name, parameter in inspect.signature(component).parameters.items():
        if name in given or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        default = parameter.default
        hint = hints.get(name, type(default))
        try:
            found[name] = _setting(hint, default, affects)
        except TypeError as error:
            raise TypeError(
                f"argument {name} of {component.__module__}.{component.__qualname__}: {error}"
            ) from None
    return found


def _setting(hint, default, affects):
    marks = ()
    if typing.get_origin(hint) is Annotated:
        hint, *marks = typing.get_args(hint)
    checks = [mark for mark in marks if isinstance(mark, Check)]
    if typing.get_origin(hint) is Literal:
        values = typing.get_args(hint)
        hint = type(values[0])
        checks = [OneOf(*values)]
    hint = typing.get_origin(hint) or hint
    if hint not in _KINDS:
        names = ", ".join(kind.__name__ for kind in _KINDS)
        raise TypeError(f"a setting is one of {names}, or a Literal of them, not {hint!r}")
    kinds, words = _KINDS[hint]
    # Every number must be within the range of float32.
    plain = Number() if hint is float else Integer() if hint is int else Check(_anything, words)
    for mark in marks:
        affects = mark if isinstance(mark, Affects) else affects
    has = lambda kind: any(isinstance(mark, kind) for mark in marks)
    return Setting(
        kinds, checks[0] if checks else plain, default, affects, has(Traced), has(PerProcess)
    )


def _anything(value):
    return True


def names_in(folder: ModuleType, makes: type) -> list[str]:
    """Names of the components of a folder: the modules with a function that returns ``makes``."""
    names = sorted(module.name for module in pkgutil.iter_modules(folder.__path__))
    return [name for name in names if _component(folder, name, makes) is not None]


def resolve(folder: ModuleType, name: str, makes: type) -> Callable:
    """The component with a name: ``NAME`` in a folder, or the user's ``package.module:attribute``.

    The module ``NAME.py`` defines a component of the same name. Case and underscores do not count:
    ``dit.py`` defines the class ``DiT``, ``nash.py`` the function ``nash``.

    Args:
      folder: a package such as `ant_jax.mtl`.
      name: of the component.
      makes: what a component of the folder returns, or is a subclass of.

    Raises:
      ValueError: with the nearest known name, or with the reason why the import failed.
    """
    if ":" in name:
        return _imported(name)
    if re.fullmatch("[a-z][a-z0-9_]*", name):
        component = _component(folder, name, makes)
        if component is not None:
            return component
    known = names_in(folder, makes)
    near = difflib.get_close_matches(name, known, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    # Such as an aggregator of `ant_jax.mtl`.
    if name in getattr(folder, "__all__", ()):
        hint = f"; a config cannot name {folder.__name__}.{name}"
    names = ", ".join(map(repr, known))
    if hint and len(known) > _MANY:
        names = f"{len(known)} names, all in docs/settings.md"
    raise ValueError(
        f"must be one of {names}, or your own 'package.module:attribute', got {name!r}{hint}"
    )


def _component(folder, name, makes):
    try:
        module = importlib.import_module(f"{folder.__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"{folder.__name__}.{name}":
            raise
        return None
    plain = lambda text: text.replace("_", "").lower()
    # The very name first: `squares.py` may hold the class `Squares` that its function returns.
    for attribute in sorted(vars(module), key=lambda each: each != name):
        value = getattr(module, attribute)
        defined_here = getattr(value, "__module__", None) == module.__name__
        if plain(attribute) == plain(name) and defined_here and _makes(value, makes):
            return value
    return None


def _makes(value, makes):
    if inspect.isclass(value):
        return value is not makes and issubclass(value, makes)
    if not callable(value):
        return False
    result = typing.get_type_hints(value).get("return")
    # Of `optax.Schedule`, `Callable`.
    result = typing.get_origin(result) or result
    return inspect.isclass(result) and issubclass(result, makes)


def _imported(name):
    module_name, _, attribute = name.partition(":")
    try:
        component = importlib.import_module(module_name)
        for part in attribute.split("."):
            component = getattr(component, part)
    # Any error here is a mistake in that module.
    except Exception as error:
        kind = (
            "" if isinstance(error, ImportError | AttributeError) else f"{type(error).__name__}: "
        )
        missing = isinstance(error, ModuleNotFoundError) and error.name == module_name
        place = "; run in its folder, or add that to PYTHONPATH" if missing else ""
        raise ValueError(f"{name!r} can't be imported: {kind}{error}{place}") from error
    if not callable(component):
        raise ValueError(f"{name!r} is not callable")
    return component
