"""Runs a pickle as the program that it is, on a machine that can do nothing but make plain data.

Python's own unpickler may call any function of any module. This one knows numbers, strings, lists, tuples, sets and
dicts, and looks globals up in an allow-list of names, each with a function of ours that stands in for it. Nothing is
imported, no name is resolved, and nothing that the file brings along is called.
"""

from __future__ import annotations

import pickletools
import types
from collections.abc import Callable, Mapping
from typing import Any

Maker = Callable[..., Any]

SCALARS = (str, bytes, int, float, bool, type(None))


class Refused(Exception):
    """The file asks for something that is not allowed."""


class Damaged(Exception):
    """The file is not what it should be."""


class Global:
    """A name of the allow-list, on the stack: never the thing itself."""

    def __init__(self, name: str, maker: Maker | None):
        self.name, self.maker = name, maker


def table(pairs: Any = ()) -> dict[Any, Any]:
    """A dict of pairs, with plain keys only: to hash a tuple of tuples of tuples may take for ever."""
    made: dict[Any, Any] = {}
    for key, value in pairs:
        made[_key(key)] = value
    return made


def _key(key: Any) -> Any:
    if type(key) not in SCALARS:
        raise Refused(f"a {type(key).__name__} as the key of a table")
    return key


_MARK = object()
_CONSTANT = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERAL = frozenset(
    (
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
        *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    )
)
_NEW = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple, "EMPTY_SET": set, "MARK": lambda: _MARK}


def run(file: Any, allowed: Mapping[str, Maker | None], persistent: Callable[[Any], Any] | None = None) -> Any:
    """The object that one pickle describes.

    Args:
      file: read with `read` and `readline`, and left behind the pickle's end.
      allowed: global names, `module.name`, and the function that is called in place of each; None if it may be named
        but not called.
      persistent: gives the object that stands outside of the pickle under an identity, which may hold `Global`s.
    Raises:
      Refused: for a global or an instruction that is not allowed.
      Damaged, ValueError, LookupError, TypeError: for what is not a pickle.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        items: list[Any] = []
        while (item := stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def look_up(name: str) -> Global:
        if name not in allowed:
            raise Refused(f"the global {name if name.isprintable() else ascii(name)}")
        return Global(name, allowed[name])

    def make(what: Any, arguments: Any) -> Any:
        if not isinstance(what, Global) or what.maker is None or type(arguments) is not tuple:
            raise Refused(f"a call of {what.name if isinstance(what, Global) else type(what).__name__}")
        return what.maker(*arguments)

    def put_pairs(items: list[Any]) -> None:
        if type(stack[-1]) is not dict or len(items) % 2:
            raise Refused(f"items put into a {type(stack[-1]).__name__}")
        stack[-1].update(table(zip(items[::2], items[1::2], strict=True)))

    def append(items: list[Any]) -> None:
        if type(stack[-1]) is not list:
            raise Refused(f"items appended to a {type(stack[-1]).__name__}")
        stack[-1].extend(items)

    def set_state(target: Any, state: Any) -> None:
        """The attributes of a namespace; an ordered dict's own (`_metadata`) are of no use here."""
        if type(state) is not dict or type(target) not in (dict, types.SimpleNamespace):
            raise Refused(f"the state of a {type(target).__name__} set")
        if type(target) is types.SimpleNamespace:
            if not all(type(name) is str and not name.startswith("__") for name in state):
                raise Refused("special attributes set")
            vars(target).update(state)

    for opcode, argument, _ in pickletools.genops(file):
        op = opcode.name
        if op in _LITERAL:
            stack.append(argument)
        elif op in _CONSTANT:
            stack.append(_CONSTANT[op])
        elif op in _NEW:
            stack.append(_NEW[op]())
        elif op in ("PROTO", "FRAME"):
            pass
        elif op in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif op == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif op in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif op in ("TUPLE1", "TUPLE2", "TUPLE3"):
            size = int(op[-1])
            if len(stack) < size:
                raise Damaged("nothing to make a tuple of")
            stack[-size:] = [tuple(stack[-size:])]
        elif op in ("TUPLE", "LIST", "DICT", "FROZENSET"):
            items = since_mark()
            if op == "DICT":
                stack.append({})
                put_pairs(items)
            else:
                kind = {"TUPLE": tuple, "LIST": list, "FROZENSET": lambda i: frozenset(map(_key, i))}[op]
                stack.append(kind(items))
        elif op == "APPEND":
            item = stack.pop()
            append([item])
        elif op == "APPENDS":
            append(since_mark())
        elif op == "SETITEM":
            items = [stack.pop(), stack.pop()][::-1]
            put_pairs(items)
        elif op == "SETITEMS":
            put_pairs(since_mark())
        elif op == "ADDITEMS":
            items = since_mark()
            if type(stack[-1]) is not set:
                raise Refused(f"items added to a {type(stack[-1]).__name__}")
            stack[-1].update(map(_key, items))
        elif op == "POP":
            stack.pop()
        elif op == "POP_MARK":
            since_mark()
        elif op == "DUP":
            stack.append(stack[-1])
        elif op == "GLOBAL":
            stack.append(look_up(argument.replace(" ", ".")))
        elif op == "STACK_GLOBAL":
            name, module = stack.pop(), stack.pop()
            if type(name) is not str or type(module) is not str:
                raise Refused("a global without name")
            stack.append(look_up(f"{module}.{name}"))
        elif op in ("REDUCE", "NEWOBJ"):
            arguments, what = stack.pop(), stack.pop()
            stack.append(make(what, arguments))
        elif op == "BUILD":
            state = stack.pop()
            set_state(stack[-1], state)
        elif op == "BINPERSID":
            if persistent is None:
                raise Refused("something kept outside of it")
            stack.append(persistent(stack.pop()))
        elif op == "STOP":
            result = stack.pop()
            if stack or result is _MARK:
                raise Damaged("a pickle with something left over")
            return result
        else:  # INST, OBJ, EXT1, NEWOBJ_EX, PERSID, NEXT_BUFFER, ...
            raise Refused(f"the instruction {op}")
    raise Damaged("a pickle without end")
