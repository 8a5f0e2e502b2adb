"""Weights of published networks as parameters of the networks here, and back.

Each family of networks has one table, `Names`, from a module here to its place in the published
code. The names that a network needs follow from its own parameters, so that the same table reads
and writes, and whatever a file has too little or too much is found.

A state dict is a dict of NumPy arrays by name, as `ant_jax.interop` reads it from a file.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Set
from typing import Any, NamedTuple

import numpy as np


class WeightsError(ValueError):
    """Weights that a network has no place for, or too few of them; the message names them."""


class Place(NamedTuple):
    """Where the published code keeps the weights of a module.

    Attributes:
      module: Its name there, such as "blocks.0.attn.qkv".
      spatial: The positions that a kernel of two dimensions here sees there: (1, 1) for a
        convolution of 1 x 1, (p, p) for patches of p x p pixels, () for a linear layer.
      heads: Number of attention heads and channels of one, -1 for whichever follows, if the outputs
        are ordered by query, key and value first there, and by head first here; None if the order
        is the same.
      null_row: Whether a table may have one row less there: that of the null class.
    """

    module: str
    spatial: tuple[int, ...] = ()
    heads: tuple[int, int] | None = None
    null_row: bool = False


class Names(NamedTuple):
    """How the published code of a family of networks names and lays out its weights.

    Attributes:
      network: What it is, for messages.
      place: The place of a module, whose name here is its path joined by "."; returns None if the
        family has no such module. None for a network of which no other code is known: parameters
        have the names and the layout that they have here.
      select: Gets a state dict and the official names that a network needs; returns the weights
        that are meant for it by official names, those that it doesn't need among them. Other
        networks of the same file, and what is no weight, are left out.
    """

    network: str
    place: Callable[[str], Place | None] | None
    select: Callable[[Mapping[str, np.ndarray], Set[str]], dict[str, np.ndarray]]


class Recognised(NamedTuple):
    """What a network's ``recognise`` finds a state dict of others to be; see `ant_jax.models`.

    Attributes:
      names: How it names and lays out the weights.
      fields: Those fields of the network that shapes don't tell and that are known of the file, by
        name.
      untrained: The parameter whose last row, of the null class, the file doesn't have, such as
        "label_embedding/embedding"; "" if it has all.
      latent_scale: The factor by which it says that its latents are scaled; None if it says none.
      remark: What the user should hear of it.
    """

    names: Names
    fields: Mapping[str, Any]
    untrained: str = ""
    latent_scale: float | None = None
    remark: str = ""


OWN_NAMES = Names("network", None, lambda state, _: dict(state))
"""The names that parameters have here, such as "block_0.qkv.kernel"."""


# Flax's names of parameters, and PyTorch's.
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
    """A parameter: its path here, name and place there, and its shape in both layouts."""

    path: tuple[str, ...]
    name: str
    place: Place | None
    here: tuple[int, ...]
    there: tuple[int, ...]
    value: Any


def check_fit(state: Mapping[str, np.ndarray], template: Mapping[str, Any], names: Names) -> None:
    """Raises a WeightsError if `from_torch` would, but for values that are no numbers."""
    _fitting(state, template, names)


def from_torch(
    state: Mapping[str, np.ndarray], template: Mapping[str, Any], names: Names
) -> dict[str, Any]:
    """Parameters of a network from a published state dict.

    Args:
      state: arrays by name, as `read_state` returns them, in any floating type.
      template: the parameters that the network has: a nested dict of anything with a `shape`, such
        as `jax.eval_shape(model.init, ...)["params"]`.
      names: of the family of the network.

    Returns:
      A nested dict of float32 arrays with the keys and shapes of the template. They may be
      read-only and share memory with the state dict.

    Raises:
      WeightsError: If a weight is missing, of another shape, or not of this network, if it is no
        floating-point number, NaN or infinite, or if the template is not of the family.
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
    """Each leaf of the template and its weight, as it is there."""
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
            f"the state dict does not fit this {names.network}: {lists}. Is it that of another "
            "network, or are the fields of this one others than it was trained with?"
        )
    return [(leaf, found[name]) for name, leaf in leaves.items()]


def _numbers(value: np.ndarray, name: str) -> np.ndarray:
    # Integers are most often a quantised network's, whose scales are elsewhere.
    if value.dtype.name not in _TYPES:
        raise WeightsError(f"{name} is of the type {value.dtype.name}, not of a floating one.")
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
    """A state dict by the names and in the layout of the published code.

    Of an unconditional network it has no label table, and of a conditional one the table with the
    row of the null class, which is the last.

    Args:
      params: the parameters of a network: a nested dict of arrays.
      names: its family, as of `from_torch`.

    Returns:
      Float32 arrays by name, for `write_state`, or for `load_state_dict` as tensors.

    Raises:
      WeightsError: If the parameters are not of a network of the family.
    """
    return {leaf.name: _there(leaf) for leaf in _leaves(params, names)}


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
    """A convolution of 1 x 1 as the linear layer that it is; codes differ in which they use."""
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
