"""Fields of the config on the command line: `--cf.epochs 50`, and `--help` about them."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import io
import typing
from collections.abc import Sequence
from typing import Any, Literal

from allmrec_jax.config import Experiment, check
from allmrec_jax.errors import UserError


def field_types(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every field of the config as the command line names it, such as `cf.epochs`, with its type."""
    found: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        found |= field_types(value, f"{prefix}{name}.") if dataclasses.is_dataclass(value) else {prefix + name: kind}
    return found


def fits(value: str, kind: Any) -> bool:
    """Whether the text is a value of that type."""
    if typing.get_origin(kind) is Literal:
        return value in typing.get_args(kind)
    if options := typing.get_args(kind):
        return any(fits(value, option) for option in options)
    if kind is type(None):
        return value == "None"
    try:
        kind(value)
    except ValueError:
        return False
    return True


def spoken(kind: Any) -> str:
    """The type in words."""
    if typing.get_origin(kind) is Literal:
        return f"one of {', '.join(typing.get_args(kind))}"
    if options := typing.get_args(kind):
        return " or ".join(map(spoken, options))
    return {int: "a whole number", float: "a number", str: "a text", type(None): "None"}[kind]


def check_overrides(known: dict[str, Any], arguments: list[str], prog: str) -> None:
    """Raises `UserError` for what tyro would refuse in frames: the first field or value that is not right."""
    rest = list(arguments)
    while rest:
        flag, equals, value = rest.pop(0).partition("=")
        if not flag.startswith("--"):
            raise UserError(f"{flag}: there is no config field in front of it, such as --cf.epochs 50")
        name = flag.removeprefix("--").replace("-", "_")
        switch = name if name in known else name.replace(".no_", ".")
        if name not in known and known.get(switch) is not bool:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean --{close[0].replace('_', '-')}?" if close else ""
            raise UserError(f"there is no config field {flag}{hint} (`{prog} --help` lists them)")
        if known[switch] is bool:
            if equals or (rest and not rest[0].startswith("--")):
                no = switch.replace(".", ".no_")
                raise UserError(f"{flag} takes no value; say --{switch} or --{no}".replace("_", "-"))
            continue
        if not equals and (not rest or rest[0].startswith("--")):
            raise UserError(f"{flag} needs a value: {spoken(known[name])}")
        value = value if equals else rest.pop(0)
        if not fits(value, known[name]):
            raise UserError(f"{flag}: {value!r} is not {spoken(known[name])}")


def override(experiment: Experiment, arguments: list[str], *, prog: str) -> Experiment:
    """`experiment` with `--any.field value` applied.

    Raises:
      UserError: for a field that does not exist, or a value that it cannot take.
    """
    check_overrides(field_types(experiment), arguments, prog)
    import tyro

    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            changed = tyro.cli(Experiment, default=experiment, args=arguments, prog=prog)
    except SystemExit as stop:
        raise UserError(f"{' '.join(arguments)}: not understood; `{prog} --help` lists the fields") from stop
    return check(changed)


def fields_help(experiment: Experiment, prog: str, parts: Sequence[str], where: str) -> None:
    """Prints the config fields of these parts with their meaning, and their values `where` the experiment is from."""
    import tyro

    types = typing.get_type_hints(Experiment)
    fields = [(part, types[part], dataclasses.field(default=getattr(experiment, part))) for part in parts]
    some = dataclasses.make_dataclass("Fields", fields)
    with contextlib.suppress(SystemExit):
        tyro.cli(some, args=["--help"], prog=f"{prog} ...", description=f"Config fields, and their values {where}:")
