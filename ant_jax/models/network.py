"""What the trainer needs from any network; `ant_jax.models` describes the contract."""

import functools
import importlib
import inspect
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ant_jax.settings import Affects, Setting, settings_of

# Fields that the trainer sets, and fields of every Flax module.
_GIVEN = ("channels", "num_classes", "learned_variance", "dtype")
_OF_FLAX = ("parent", "name")

Network = Callable[..., nn.Module]


@functools.cache
def network_settings(network: Network) -> Mapping[str, Setting]:
    """The settings of a network: its fields except those that the trainer sets.

    Args:
      network: a class of Flax modules, or a function that makes a module.

    Raises:
      TypeError: naming a field whose type is not allowed for a setting.
    """
    return settings_of(network, (*_GIVEN, *_OF_FLAX), Affects.MEANING)


def meaning_of(network: Network) -> list[str]:
    """Names of the settings that change what given parameters compute."""
    settings = network_settings(network).items()
    return [name for name, setting in settings if setting.affects == Affects.MEANING]


def check_fields(model: nn.Module) -> None:
    """Raises a ValueError, naming the field, if the value of a setting is not allowed."""
    for name, setting in network_settings(type(model)).items():
        value = getattr(model, name)
        allowed = setting.problem(value)
        if allowed is not None:
            raise ValueError(f"{name} must be {allowed}, not {value!r}.")


def build_network(
    network: Network,
    settings: Mapping[str, Any],
    *,
    channels: int,
    num_classes: int = 0,
    learned_variance: bool = False,
    dtype: Any = jnp.float32,
) -> nn.Module:
    """Makes a network; returns the same object for the same arguments.

    Args:
      network: a class of Flax modules, or a function that makes a module.
      settings: values of its settings by name; missing settings have their defaults.
      channels: channels C of the input.
      num_classes: number of classes; 0 for an unconditional network.
      learned_variance: whether the network returns 2 C channels.
      dtype: type of the activations.

    Raises:
      ValueError: if the settings contradict each other, if the devices don't support them, or if
        the network lacks a field for one of the other arguments.
    """
    given = {
        "channels": channels,
        "num_classes": num_classes,
        "learned_variance": learned_variance,
        "dtype": jnp.dtype(dtype),
    }
    fields = inspect.signature(network).parameters
    called = getattr(network, "__qualname__", repr(network))
    without = {
        "num_classes": (
            num_classes,
            "it can't be conditional on labels: add the field, or set conditional = False",
        ),
        "learned_variance": (learned_variance, "it can't learn a variance"),
        "dtype": (given["dtype"] != jnp.float32, "its dtype must be float32"),
    }
    for name, (asked, consequence) in without.items():
        if asked and name not in fields:
            raise ValueError(f"{called} has no field {name}, so {consequence}")
    model = _made(
        network,
        tuple(settings.items()) + tuple(item for item in given.items() if item[0] in fields),
    )
    if not isinstance(model, nn.Module):
        raise ValueError(f"{called} makes a {type(model).__name__}, not a Flax Linen module")
    if hasattr(model, "check_devices"):
        model.check_devices()
    return model


# Cached, because compiled samplers are cached by the identity of the model.
@functools.cache
def _made(network, fields):
    return network(**dict(fields))


def input_multiple(model: nn.Module) -> int:
    """The number of which the height and the width of a network's input must be multiples."""
    return getattr(model, "input_multiple", 1)


def num_classes(model: nn.Module) -> int:
    """The number of classes of a network; 0 for an unconditional one."""
    return getattr(model, "num_classes", 0)


def weights_module(network: type[nn.Module]) -> ModuleType | None:
    """The module that describes the published weights of a network, or None."""
    name = f"{network.__module__}_weights"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        return None


def facts_of(network: type[nn.Module]) -> tuple[str, ...]:
    """Facts that files of a network's published weights may not contain, such as ``"heads=N"``."""
    weights = weights_module(network)
    return () if weights is None else weights.FACTS
