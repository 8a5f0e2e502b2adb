"""Converts weights of published networks into parameters of the networks here, and back.

Each family of networks has one table, `Names`, which maps a module here to its place in the
published code. The names that a network needs follow from its parameters. So the same table serves
for reading and writing, and missing or unexpected weights are found.

A state dict is a dict of NumPy arrays by name, as `ant_jax.interop` reads it from a file.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Set
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np


class WeightsError(ValueError):
    """Weights are missing, unexpected or damaged; the message names them."""


class Place(NamedTuple):
    """Where the published code keeps the weights of a module.

    Attributes:
      module: Its name there, such as "blocks.0.attn.qkv".
      spatial: The kernel size there of a two-dimensional kernel here: (1, 1) for a convolution of
        1 x 1, (p, p) for patches of p x p pixels, () for a linear layer.
      heads: (number of attention heads, channels of a head), one of them -1 if it follows from the
        other. Given if the outputs are ordered by query, key and value first there, but by head
        first here; None if the order is the same.
      null_row: Whether the table there may lack the last row here, that of the null class.
    """

    module: str
    spatial: tuple[int, ...] = ()
    heads: tuple[int, int] | None = None
    null_row: bool = False


class Names(NamedTuple):
    """How the published code of a family of networks names and lays out its weights.

    Attributes:
      network: The name of the family, for messages.
      place: Gets the name of a module here, its path joined by "."; returns its place, or None if
        the family has no such module. None for networks without published code, whose parameters
        keep the names and the layout that they have here.
      select: Gets a state dict and the published names that a network needs; returns the weights of
        this network by their published names, also those that the network doesn't need. It leaves
        out other networks of the same file and entries that are not weights.
      convert: Converts weights with the published names and layout, but the meaning that they have
        here, into those of the published code.
      constants: Arrays that the published code stores beside the weights, by name.
    """

    network: str
    place: Callable[[str], Place | None] | None
    select: Callable[[Mapping[str, np.ndarray], Set[str]], dict[str, np.ndarray]]
    convert: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] = dict
    constants: Mapping[str, np.ndarray] = MappingProxyType({})


class Recognised(NamedTuple):
    """What a network's ``recognise`` finds out about a published state dict; see `ant_jax.models`.

    Attributes:
      names: How it names and lays out the weights.
      fields: The fields of the network, by name, that are known for this file and do not follow
        from shapes.
      untrained: The parameter whose last row, that of the null class, is missing in the file, such
        as "label_embedding/embedding"; "" if none is missing.
      latent_scale: The factor in the file by which its latents are scaled; None if it has none.
      remark: A message for the user; "" for none.
      process: The settings of the noise process, by name, that are known for this file.
    """

    names: Names
    fields: Mapping[str, Any]
    untrained: str = ""
    latent_scale: float | None = None
    remark: str = ""
    process: Mapping[str, Any] = MappingProxyType({})


OWN_NAMES = Names("network", None, lambda state, _: dict(state))
"""For networks without published code: the names here, such as "block_0.qkv.kernel"."""


# Names of parameters in Flax and in PyTorch.
_KINDS = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
_TYPES = ("float16", "bfloat16", "float32", "float64")
_LISTED = 5


class _Leaf(NamedTuple):
    """A parameter: its path here, its name and place there, and its shapes here and there."""

    path: tuple[str, ...]
    name: str
    place: Place | None
    here: tuple[int, ...]
    there: tuple[int, ...]
    value: Any


def check_fit(state: Mapping[str, np.ndarray], template: Mapping[str, Any], names: Names) -> None:
    """Raises the WeightsErrors of `from_torch`, except those about values and their types."""
    _fitting(state, template, names)


def from_torch(
    state: Mapping[str, np.ndarray], template: Mapping[str, Any], names: Names
) -> dict[str, Any]:
    """Parameters of a network from a published state dict.

    Args:
      state: arrays by name, as `read_state` returns them, of any floating-point type.
      template: the parameters of the network: a nested dict of objects with a `shape`, such as
        `jax.eval_shape(model.init, ...)["params"]`.
      names: the names of the network's family.

    Returns:
      A nested dict of float32 arrays with the keys and shapes of the template. They may be
      read-only and share memory with the state dict.

    Raises:
      WeightsError: If a weight is missing, unexpected or of another shape, if its type is not a
        floating-point one, if a value is NaN or infinite, or if the template is not of the family.
    """
    params: dict[str, Any] = {}
    for leaf, value in _fitting(state, template, names):
        *modules, kind = leaf.path
        node = params
        for module in modules:
            node = node.setdefault(module, {})
        node[kind] = _here(_numbers(value, leaf.name), leaf)
    return params


def _fitting(state, template, names):
    """Each leaf of the template with its weight in the published layout."""
    leaves = {leaf.name: leaf for leaf in _leaves(template, names)}
    found = names.select(state, leaves.keys())
    missing = [name for name in leaves if name not in found]
    unexpected = [name for name in found if name not in leaves]
    misshapen = [
        f"{name} is {_text(found[name].shape)} there and {_text(leaf.there)} here"
        for name, leaf in leaves.items()
        if name in found and not _fits(tuple(found[name].shape), leaf)
    ]
    faults = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    if any(faults.values()):
        lists = "; ".join(
            f"{len(items)} {fault}: {', '.join(items[:_LISTED])}{', ...' * (len(items) > _LISTED)}"
            for fault, items in faults.items()
            if items
        )
        raise WeightsError(
            f"the state dict does not fit this {names.network}: {lists}. Is it of another network, "
            "or was it trained with other fields than this one has?"
        )
    return [(leaf, found[name]) for name, leaf in leaves.items()]


def _numbers(value: np.ndarray, name: str) -> np.ndarray:
    # Integers are usually weights of a quantized network, whose scales are stored elsewhere.
    if value.dtype.name not in _TYPES:
        raise WeightsError(
            f"{name} is of the type {value.dtype.name}, not of a floating-point type."
        )
    with np.errstate(over="ignore"):
        numbers = np.asarray(value, np.float32)
    bad = numbers.size - np.count_nonzero(np.isfinite(numbers))
    if bad:
        raise WeightsError(
            f"{bad} of the {numbers.size} values of {name} are NaN, infinite or beyond float32: "
            "the weights are damaged."
        )
    return numbers


def to_torch(params: Mapping[str, Any], names: Names) -> dict[str, np.ndarray]:
    """Converts parameters into a state dict of the published code, with its constants.

    The label table of a conditional network includes the row of the null class, the last one. An
    unconditional network has no label table.

    Args:
      params: the parameters of a network: a nested dict of arrays.
      names: the names of the network's family.

    Returns:
      Float32 arrays by name, for `write_state`, or as tensors for `load_state_dict`.

    Raises:
      WeightsError: If the parameters are not of a network of the family.
    """
    weights = {leaf.name: _there(leaf) for leaf in _leaves(params, names)}
    return names.convert(weights) | dict(names.constants)


def _leaves(tree: Mapping[str, Any], names: Names) -> Iterator[_Leaf]:
    for path, value in _flat(tree):
        if names.place is None:
            shape = tuple(value.shape)
            yield _Leaf(path, ".".join(path), None, shape, shape, value)
            continue
        *modules, kind = path
        place = names.place(".".join(modules))
        if place is None or kind not in _KINDS:
            raise WeightsError(f"{'.'.join(path)} is no parameter of a {names.network}.")
        shape = tuple(value.shape)
        name = f"{place.module}.{_KINDS[kind]}"
        yield _Leaf(path, name, place, shape, _shape_there(shape, kind, place), value)


def _flat(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, (*path, key))
        else:
            yield (*path, key), value


def _shape_there(shape: tuple[int, ...], kind: str, place: Place) -> tuple[int, ...]:
    if place.heads and shape[-1] % (3 * max(place.heads)):
        number, channels = place.heads
        heads = f"heads of {channels} channels" if number < 0 else f"{number} heads"
        raise WeightsError(
            f"the {shape[-1]} channels of {place.module} are not three times those of {heads}."
        )
    if kind != "kernel":
        return shape
    spatial = _spatial(shape, place)
    inputs, outputs = math.prod(shape[:-1]), shape[-1]
    if inputs % math.prod(spatial):
        raise WeightsError(
            f"the {inputs} inputs of {place.module} are not those of patches of {_text(spatial)}."
        )
    return (outputs, inputs // math.prod(spatial), *spatial)


def _spatial(shape: tuple[int, ...], place: Place) -> tuple[int, ...]:
    return shape[:-2] or place.spatial


def _fits(shape: tuple[int, ...], leaf: _Leaf) -> bool:
    if leaf.place is None:
        return shape == leaf.there
    if leaf.place.null_row and shape[:1] == (leaf.there[0] - 1,):
        shape = leaf.there[:1] + shape[1:]
    return _pointwise(shape) == _pointwise(leaf.there)


def _pointwise(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a 1 x 1 convolution as a linear layer; published codes use either."""
    return shape[:2] if set(shape[2:]) == {1} else shape


def _here(value: np.ndarray, leaf: _Leaf) -> np.ndarray:
    if leaf.place is None:
        return value
    if leaf.place.heads:
        value = _reordered(value, (3, *leaf.place.heads))
    if leaf.path[-1] == "kernel":
        value = np.moveaxis(value, (1, 0), (-2, -1))
    elif leaf.place.null_row:
        value = np.pad(value, ((0, leaf.here[0] - len(value)), (0, 0)))
    return value.reshape(leaf.here)


def _there(leaf: _Leaf) -> np.ndarray:
    value = np.asarray(leaf.value, np.float32)
    if leaf.place is None:
        return value
    if leaf.path[-1] == "kernel":
        value = value.reshape(*_spatial(leaf.here, leaf.place), -1, leaf.here[-1])
        value = np.moveaxis(value, (-1, -2), (0, 1))
    if leaf.place.heads:
        number, channels = leaf.place.heads
        value = _reordered(value, (number, 3, channels))
    return value


def _reordered(value: np.ndarray, split: tuple[int, int, int]) -> np.ndarray:
    return value.reshape(*split, *value.shape[1:]).swapaxes(0, 1).reshape(value.shape)


def _text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a scalar"
