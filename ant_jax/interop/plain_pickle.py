"""Reads pickles of plain containers without running any code that they name.

`pickle.Unpickler` with a list of allowed names is not enough: it still calls objects on its stack,
sets attributes, hashes any object, and allocates as much memory as the file demands. This reader
imports nothing that the file names, so there is nothing to call.
"""

import dataclasses
import pickletools
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO


@dataclasses.dataclass(frozen=True)
class Global:
    """A class or function that a pickle refers to, by its name only.

    Attributes:
      name: Module and name, such as "torch.float32".
    """

    name: str


@dataclasses.dataclass(frozen=True)
class Unread:
    """Stands for an object of another class, whose content is not read.

    Attributes:
      name: Module and name of the class or function that would have created the object.
    """

    name: str


# Python hashes nested tuples recursively in C. Deeply nested keys would overflow the stack.
_KEYS = (str, int, float, bool, bytes, type(None), Global)
_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE"),
    *("BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def load(
    stream: BinaryIO,
    builders: Mapping[str, Callable[..., Any]],
    set_state: Callable[[Any, Any], None],
    persistent: Callable[[Any], Any],
) -> Any:
    """Reads one pickle of plain containers, of any protocol.

    Args:
      stream: The pickle, with `read`, `readline` and `tell`. Afterwards it is at the end of the
        pickle. `read(n)` must not allocate more memory than the stream has bytes.
      builders: The replacements of known functions and classes, by module and name. A builder gets
        the arguments in the file, and raises ValueError or TypeError if they don't fit. Objects of
        all other functions and classes become `Unread`.
      set_state: Gets an object and its state from the file; raises ValueError if such an object
        has no state.
      persistent: Returns the object of a persistent id, or raises ValueError.

    Returns:
      Nested dict, list, tuple, set, str, int, float, bool, None and bytes; the results of
      `builders` and `persistent`; a `Global` for each class or function that the pickle names but
      does not call; an `Unread` for each object of another class. Entries of dicts and sets whose
      key is an `Unread` are left out.

    Raises:
      ValueError: If the pickle is damaged, or has instructions that no plain object needs.
    """
    stack, outer, memo = [], [], {}

    def to_mark():
        nonlocal stack
        items, stack = stack, outer.pop()
        return items

    try:
        for opcode, arg, _ in pickletools.genops(stream):
            match opcode.name:
                case "PROTO" | "FRAME":
                    pass
                case name if name in _LITERALS:
                    stack.append(arg)
                case name if name in _CONSTANTS:
                    stack.append(_CONSTANTS[name])
                case "EMPTY_DICT":
                    stack.append({})
                case "EMPTY_LIST":
                    stack.append([])
                case "EMPTY_SET":
                    stack.append(set())
                case "FROZENSET":
                    to_mark()
                    stack.append(Unread("builtins.frozenset"))
                case "BYTEARRAY8":
                    stack.append(Unread("builtins.bytearray"))
                case name if name in _TUPLES:
                    items = [stack.pop() for _ in range(_TUPLES[name])]
                    stack.append(tuple(reversed(items)))
                case "MARK":
                    outer.append(stack)
                    stack = []
                case "TUPLE":
                    items = to_mark()
                    stack.append(tuple(items))
                case "LIST":
                    items = to_mark()
                    stack.append(items)
                case "DICT":
                    items = to_mark()
                    stack.append({})
                    _update(stack[-1], items)
                case "APPEND":
                    items = [stack.pop()]
                    _extend(stack[-1], items)
                case "APPENDS":
                    items = to_mark()
                    _extend(stack[-1], items)
                case "ADDITEMS":
                    items = to_mark()
                    _add(stack[-1], items)
                case "SETITEM":
                    value, key = stack.pop(), stack.pop()
                    _update(stack[-1], [key, value])
                case "SETITEMS":
                    items = to_mark()
                    _update(stack[-1], items)
                case "PUT" | "BINPUT" | "LONG_BINPUT":
                    memo[arg] = stack[-1]
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "GET" | "BINGET" | "LONG_BINGET":
                    stack.append(memo[arg])
                case "GLOBAL":
                    stack.append(Global(_dotted(arg)))
                case "STACK_GLOBAL":
                    name, module = stack.pop(), stack.pop()
                    if not (type(name) is type(module) is str):
                        raise ValueError("a global whose name is not a string")
                    stack.append(Global(f"{module}.{name}"))
                case "BINPERSID":
                    stack.append(persistent(stack.pop()))
                case "REDUCE" | "NEWOBJ":
                    arguments, function = stack.pop(), stack.pop()
                    stack.append(_build(builders, function, arguments))
                case "NEWOBJ_EX":
                    keywords, arguments, function = stack.pop(), stack.pop(), stack.pop()
                    if type(keywords) is not dict:
                        raise ValueError("a damaged pickle: keywords that are no dict")
                    # No builder takes keywords.
                    stack.append(_build({} if keywords else builders, function, arguments))
                case "INST":
                    to_mark()
                    stack.append(Unread(_dotted(arg)))
                case "OBJ":
                    items = to_mark()
                    stack.append(_build({}, items[0], ()))
                case "BUILD":
                    state = stack.pop()
                    if type(stack[-1]) is not Unread:
                        set_state(stack[-1], state)
                case "STOP":
                    return stack.pop()
                case name:
                    raise ValueError(f"the instruction {name}, which no plain object needs")
    except (IndexError, KeyError) as error:
        raise ValueError(f"a damaged pickle, before byte {stream.tell()}") from error
    raise AssertionError("genops ends with STOP or raises")


def is_key(value: Any) -> bool:
    """Whether a value may be a key of a dict or an element of a set."""
    return type(value) in _KEYS or (
        type(value) is tuple and all(type(element) in _KEYS for element in value)
    )


def _dotted(module_and_name):
    return module_and_name.replace(" ", ".", 1)


def _build(builders, function, arguments):
    if type(function) not in (Global, Unread):
        raise ValueError(f"a damaged pickle: a call of a {type(function).__name__}")
    if type(arguments) is not tuple:
        raise ValueError(f"arguments of {function.name} that are no tuple")
    if type(function) is Unread or function.name not in builders:
        return Unread(function.name)
    try:
        return builders[function.name](*arguments)
    except TypeError as error:
        raise ValueError(f"unfit arguments of {function.name}: {error}") from error


# A subclass of dict, list or set is followed by its content, which is ignored if the object is an
# Unread.


def _update(target, items):
    if type(target) is Unread:
        return
    if type(target) is not dict or len(items) % 2:
        raise ValueError("a damaged pickle: keys and values without a dict")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(key) is not Unread:
            _check_key(key)
            target[key] = value


def _extend(target, items):
    if type(target) is Unread:
        return
    if type(target) is not list:
        raise ValueError("a damaged pickle: elements without a list")
    target.extend(items)


def _add(target, items):
    if type(target) is Unread:
        return
    if type(target) is not set:
        raise ValueError("a damaged pickle: elements without a set")
    for item in items:
        if type(item) is not Unread:
            _check_key(item)
            target.add(item)


def _check_key(key):
    if not is_key(key):
        raise ValueError(f"a {type(key).__name__} that is not plain as a key")
