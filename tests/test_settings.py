import dataclasses
import inspect
import sys
import types
from typing import Annotated, Literal

import numpy as np
import pytest

from ant_jax import data, mtl, settings
from ant_jax.mtl import Weighting
from ant_jax.settings import Affects, Integer, Number, OneOf, Path, Traced


def component(
    k: int,
    count: Annotated[int, Integer(1, 9)],
    rate: Annotated[float, Number(above=0), Traced()] = 0.5,
    kind: Literal["a", "b"] = "a",
    place: Annotated[Path, Affects.NOTHING] = "",
    sizes: tuple = (1, 2),
    on: bool = False,
    plain=3,
) -> Weighting:
    """A component."""


def test_typed_arguments_are_settings():
    found = settings.settings_of(component, ("k",), Affects.SAMPLES)
    assert list(found) == ["count", "rate", "kind", "place", "sizes", "on", "plain"]
    assert found["count"].default is settings.REQUIRED
    assert found["rate"].traced and not found["count"].traced
    assert found["place"].affects is Affects.NOTHING and found["place"].per_process
    assert found["kind"].affects is Affects.SAMPLES
    assert found["plain"].kinds == (int,)


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("count", [1, 9], [0, 10, True, 1.0, "1", None]),
        ("rate", [1, 1e-30, 3e38], [0, -1.0, float("nan"), float("inf"), 1e39, True, "1"]),
        ("kind", ["a", "b"], ["c", "", None, 1]),
        ("place", ["", "~/x", "x"], ["~nobody-of-that-name/x", "a\0b", None]),
        ("sizes", [(), (1,)], [[1], 1]),
        ("on", [True, False], [0, 1, "True"]),
        ("plain", [-(2**31) + 1, 0, 2**31 - 1], [2**31, 0.5]),
    ],
)
def test_values_are_checked_by_type_and_range(name, good, bad):
    setting = settings.settings_of(component, ("k",))[name]
    assert [setting.problem(value) for value in good] == [None] * len(good)
    assert all(setting.problem(value) == setting.check.allowed for value in bad)


def test_what_is_allowed_is_said():
    found = settings.settings_of(component, ("k",))
    assert found["count"].check.allowed == "an integer >= 1 and <= 9"
    assert found["rate"].check.allowed == "a number > 0"
    assert found["kind"].check.allowed == "one of 'a', 'b'"
    assert OneOf(1, 2).allowed == "one of 1, 2"


def test_fields_of_a_dataclass_are_settings():
    @dataclasses.dataclass
    class Network:
        width: Annotated[int, Integer(4)] = 8
        channels: int = 3

    assert list(settings.settings_of(Network, ("channels",))) == ["width"]


def test_an_argument_that_no_setting_can_be_is_named():
    def component(k: int, table: dict | None = None): ...

    with pytest.raises(TypeError, match=r"argument table of .*component.*: a setting is one of"):
        settings.settings_of(component, ("k",))


def test_every_module_of_a_folder_that_makes_such_a_thing_is_one():
    names = settings.names_in(mtl, Weighting)
    assert {"linear", "nash", "pcgrad", "uncertainty"} <= set(names)
    assert not {"combine", "gramian", "weighting"} & set(names)
    for name in names:
        assert settings.resolve(mtl, name, Weighting) is getattr(mtl, name)


def test_a_name_of_ones_own_is_imported(monkeypatch):
    module = types.ModuleType("mine")
    module.component = component
    monkeypatch.setitem(sys.modules, "mine", module)
    assert settings.resolve(mtl, "mine:component", Weighting) is component


def test_a_function_may_return_an_object_of_a_class_of_nearly_its_name(monkeypatch):
    class Squares(data.Source): ...

    def squares(split: str, num: int = 3) -> data.Source: ...

    folder, module = types.ModuleType("folder"), types.ModuleType("folder.squares")
    for each in (Squares, squares):
        each.__module__ = module.__name__
        setattr(module, each.__name__, each)
    monkeypatch.setitem(sys.modules, "folder.squares", module)
    assert settings.resolve(folder, "squares", data.Source) is squares
    del module.squares
    assert settings.resolve(folder, "squares", data.Source) is Squares


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nahs", "got 'nahs'; did you mean 'nash'?"),
        ("combine", "must be one of"),
        ("slgrad", "names, all in docs/settings.md, or your own"),
        ("slgrad", "got 'slgrad'; a config cannot name ant_jax.mtl.slgrad"),
        ("../nash", "must be one of"),
        ("nothing_there:f", "'nothing_there:f' can't be imported: No module named"),
        ("ant_jax.mtl:nothing", "has no attribute 'nothing'"),
        ("ant_jax.mtl:__name__", "is not callable"),
        (":f", "can't be imported"),
    ],
)
def test_a_name_that_means_nothing_is_refused(name, words):
    with pytest.raises(ValueError) as error:
        settings.resolve(mtl, name, Weighting)
    assert words in str(error.value)


def test_a_signature_shows_the_range_of_a_setting():
    hint = inspect.signature(mtl.cagrad).parameters["c"].annotation
    assert str(hint) == "typing.Annotated[float, 'a number >= 0']"


def test_an_integer_may_be_of_numpy_and_is_within_its_range():
    settings.check_integer("n", np.int64(3), 1, 3)
    for value in (0, 4, 2.0, True, "2"):
        with pytest.raises(ValueError, match=r"n must be an integer >= 1 and <= 3, got "):
            settings.check_integer("n", value, 1, 3)
