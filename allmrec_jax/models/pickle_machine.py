"""Runs a pickle as the program that it is, on a machine that can do nothing but make plain data.

Python's own unpickler may call any function of any module. This one knows numbers, strings, lists, tuples and dicts,
and looks globals up in an allow-list of names, each with a function of ours that stands in for it. Nothing is
imported, no name is resolved, and nothing that the file brings along is called.

A pickle may also use one thing again and again, and so ask for far more than its size. What could cost more than an
instruction is therefore bounded: numbers by their bits, keys by their length, and what goes into calls and states by
the instructions that were needed to write it down.
"""

from __future__ import annotations

import pickletools
import types
from collections.abc import Callable, Mapping
from typing import Any

Maker = Callable[..., Any]

SCALARS = (str, bytes, int, float, bool, type(None))
MOST_BITS = 128  # of a number; torch's own magic number has 77


class Refused(Exception):
    """The file asks for something that is not allowed."""


class Damaged(Exception):
    """The file is not what it should be."""


class Global:
    """A name of the allow-list, on the stack: never the thing itself."""

    def __init__(self, name: str, maker: Maker | None):
        self.name, self.maker = name, maker


def table(pairs: Any = ()) -> dict[Any, Any]:
    """A dict of pairs, with plain keys only.

    As an OrderedDict it is called without arguments in what Python 3 writes, and with a list of pairs in Python 2's.
    """
    made: dict[Any, Any] = {}
    for key, value in pairs:
        made[_key(key)] = value
    return made


def _key(key: Any) -> Any:
    """A key that is fast to hash and to compare, unlike a tuple of tuples of tuples, and that has a hash of its own."""
    if type(key) not in SCALARS:
        raise Refused(f"a {type(key).__name__} as the key of a table")
    if (type(key) is int and key.bit_length() > 60) or (type(key) in (str, bytes) and len(key) > 4096):
        raise Damaged("a key too long for a table")
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
_NEW = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple, "MARK": lambda: _MARK}


class _Machine:
    """What the instructions act on."""

    def __init__(self, allowed: Mapping[str, Maker | None]):
        self.allowed = allowed
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.done = self.spent = 0  # instructions; entries that went into calls and states

    def spend(self, entries: int) -> None:
        """In what a pickler writes, each entry has an instruction of its own."""
        self.spent += entries
        if self.spent > self.done:
            raise Damaged("the same entries used over and over")

    def since_mark(self) -> list[Any]:
        items: list[Any] = []
        while (item := self.stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def look_up(self, name: str) -> None:
        if name not in self.allowed:
            raise Refused(f"the global {name if name.isprintable() else ascii(name)}")
        self.stack.append(Global(name, self.allowed[name]))

    def make(self, what: Any, arguments: Any) -> None:
        if not isinstance(what, Global) or what.maker is None or type(arguments) is not tuple:
            raise Refused(f"a call of {what.name if isinstance(what, Global) else type(what).__name__}")
        self.spend(len(arguments))
        self.spend(sum(len(argument) for argument in arguments if type(argument) in (list, tuple, dict)))
        self.stack.append(what.maker(*arguments))

    def put_pairs(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise Refused(f"items put into a {type(target).__name__}")
        target.update(table(zip(items[::2], items[1::2], strict=True)))

    def append(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise Refused(f"items appended to a {type(self.stack[-1]).__name__}")
        self.stack[-1].extend(items)

    def set_state(self, state: Any) -> None:
        """The attributes of a namespace; an ordered dict's own (`_metadata`) are of no use here."""
        target = self.stack[-1]
        if type(state) is not dict or type(target) not in (dict, types.SimpleNamespace):
            raise Refused(f"the state of a {type(target).__name__} set")
        if type(target) is types.SimpleNamespace:
            self.spend(len(state))
            if not all(type(name) is str and not name.startswith("__") for name in state):
                raise Refused("special attributes set")
            vars(target).update(state)


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
    machine = _Machine(allowed)
    stack, memo = machine.stack, machine.memo
    for machine.done, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        op = opcode.name
        if op in _LITERAL:
            if isinstance(argument, int) and argument.bit_length() > MOST_BITS:
                raise Damaged(f"a number of {argument.bit_length()} bits")
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
        elif op == "TUPLE":
            stack.append(tuple(machine.since_mark()))
        elif op == "LIST":
            stack.append(machine.since_mark())
        elif op == "DICT":
            items = machine.since_mark()
            stack.append({})
            machine.put_pairs(items)
        elif op == "APPEND":
            item = stack.pop()
            machine.append([item])
        elif op == "APPENDS":
            machine.append(machine.since_mark())
        elif op == "SETITEM":
            value, key = stack.pop(), stack.pop()
            machine.put_pairs([key, value])
        elif op == "SETITEMS":
            machine.put_pairs(machine.since_mark())
        elif op == "GLOBAL":
            machine.look_up(argument.replace(" ", "."))
        elif op == "STACK_GLOBAL":
            name, module = stack.pop(), stack.pop()
            if type(name) is not str or type(module) is not str:
                raise Refused("a global without name")
            machine.look_up(f"{module}.{name}")
        elif op in ("REDUCE", "NEWOBJ"):
            arguments, what = stack.pop(), stack.pop()
            machine.make(what, arguments)
        elif op == "BUILD":
            machine.set_state(stack.pop())
        elif op == "BINPERSID":
            if persistent is None:
                raise Refused("something kept outside of it")
            stack.append(persistent(stack.pop()))
        elif op == "STOP":
            result = stack.pop()
            if stack or result is _MARK:
                raise Damaged("a pickle with something left over")
            return result
        else:  # INST, OBJ, EXT1, NEWOBJ_EX, PERSID, NEXT_BUFFER, ...; sets; POP and DUP, for what contains itself
            raise Refused(f"the instruction {op}")
    raise Damaged("a pickle without end")
