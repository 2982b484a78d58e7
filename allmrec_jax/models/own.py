"""A model that somebody brings as a Python file: read, filled in and checked before anything is made of it.

The protocol is that of `models.collaborative`. The checks trace each function as it will be called, on shapes alone, so
they cost no memory and next to no time; a mistake is a line that names the file and the function, not a traceback.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from allmrec_jax.errors import UserError
from allmrec_jax.models import params
from allmrec_jax.models.params import Parameter


def configure(path: Path, values: Mapping[str, Any]) -> Any:
    """The file's `Config`, its fields filled from `values` by name; others keep their defaults.

    Raises:
      UserError: if the file cannot be read, or lacks or breaks something that the protocol asks for.
    """
    module = _load(path)
    c = _filled(path, module, values)
    _check(path, module, c, values["n_users"])
    return c


def _try(path: Path, what: str, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Calls what somebody else has written; what it raises becomes one line."""
    try:
        return function(*arguments, **named)
    except (Exception, SystemExit) as error:
        reason = str(error).strip().partition("\n")[0][:200]
        raise UserError(f"the model {path}: {what} fails: {type(error).__name__}: {reason}") from error


def _load(path: Path) -> ModuleType:
    """The file as a module that is named by its content, so that an edited file is another module."""
    content = path.read_bytes()
    name = f"allmrec_model_{hashlib.sha256(content).hexdigest()}"
    if name in sys.modules:
        return sys.modules[name]
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location(name, path))
    sys.modules[name] = module  # dataclasses look their module up, and so does `collaborative.module_of`
    try:
        _try(path, "the file", lambda: exec(compile(content, path, "exec"), vars(module)))
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _filled(path: Path, module: ModuleType, values: Mapping[str, Any]) -> Any:
    if missing := [part for part in ("Config", "describe", "features") if not hasattr(module, part)]:
        raise UserError(f"the model {path} defines no {missing[0]} (docs/models.md)")
    kind = module.Config
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind) and kind.__dataclass_params__.frozen):
        raise UserError(f"the model {path}: Config must be a class with @dataclass(frozen=True)")
    if kind.__module__ != module.__name__:
        raise UserError(f"the model {path}: Config must be a class of its own (class Config({kind.__name__}): ...)")
    fields = [field for field in dataclasses.fields(kind) if field.init]
    for field in fields:
        no_default = field.default is field.default_factory is dataclasses.MISSING
        if no_default and field.name not in values:
            raise UserError(
                f"the model {path}: nothing fills Config.{field.name}; give it a default, or the name of a field of cf"
            )
    c = _try(path, "Config", kind, **{field.name: values[field.name] for field in fields if field.name in values})
    _try(path, "hash(Config(...)), which compiled functions need,", hash, c)
    if missing := [name for name in ("n_items", "width", "maxlen") if not hasattr(c, name)]:
        raise UserError(f"the model {path}: Config has no field {missing[0]}")
    return c


def _check(path: Path, module: ModuleType, c: Any, n_users: int) -> None:
    def expect(what: str, found: Any, *shape: int) -> None:
        actual = getattr(found, "shape", type(found).__name__)
        if actual != shape:
            raise UserError(f"the model {path}: {what} is {actual}, but must be {shape}")
        if not jnp.issubdtype(found.dtype, jnp.floating):
            raise UserError(f"the model {path}: {what} is {found.dtype}, but must be floats")

    def trace(what: str, shape: tuple[int, ...], function: Callable[..., Any], *inputs: Any) -> None:
        expect(what, _try(path, what, jax.eval_shape, function, *inputs), *shape)

    def floats(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    def ids(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    d, time, users = c.width, c.maxlen, 7
    few, keys = min(time, 4), jax.eval_shape(lambda: jax.random.split(jax.random.key(0), users))
    description = _try(path, "describe(c)", module.describe, c)
    _check_description(path, description)
    if "E" not in description:
        raise UserError(f'the model {path}: describe(c) gives no "E", the item table (docs/models.md)')
    tables = {"E": (c.n_items + 1, d), "P": (n_users + 1, d)}
    for name, of in params.paths(description):
        if of.shape != (shape := tables.get(name, of.shape)):
            whose = "items" if name == "E" else "users"
            raise UserError(f"the model {path}: {name}, the table of {whose}, is {of.shape}, but must be {shape}")
        trace(f"the initial {name}", of.shape, lambda of=of: of.init(jax.random.key(0), of.shape))

    tree = params.shapes(description)
    rest = {name: leaf for name, leaf in tree.items() if name != "E"}  # training looks rows of E up itself
    call = "features(params, c, windows, dropout_keys, pads, rows, users)"

    def training(p: Any, windows: Any, pads: Any, *more: Any) -> Any:
        return module.features(p, c, windows, more[0], pads, *more[1:])

    def represent(p: Any, windows: Any, pads: Any) -> Any:
        return module.features(p, c, windows, None, pads)

    for width, pads in ((time, None), (few, ids(users))):
        inputs = rest, ids(users, width), pads, keys, floats(users, width, d), ids(users)
        trace(f"{call} in training (params without E, rows instead)", (users, width, d), training, *inputs)
    stage_1 = tree, ids(users, time), keys, ids(users)
    trace(
        f"{call} in stage 1 (without pads and rows)",
        (users, time, d),
        lambda p, windows, k, who: module.features(p, c, windows, k, users=who),
        *stage_1,
    )
    window = tree, ids(users, few), ids(users)
    if hasattr(module, "last_feature"):
        what = "last_feature(params, c, windows, pads)"
        trace(what, (users, d), lambda p, windows, pads: module.last_feature(p, c, windows, pads), *window)
    elif "P" not in description:
        trace(f"{call} for x_u (windows and pads alone)", (users, few, d), represent, *window)
    for shape in ((users, few), (users, few, 2)) if hasattr(module, "score") else ():
        rows = floats(*shape, d)
        trace("score(params, c, f, rows)", shape, lambda p, f, r: module.score(p, c, f, r), rest, rows, rows)


def _check_description(path: Path, description: Any, name: str = "") -> None:
    if isinstance(description, dict):
        for key, part in description.items():
            _check_description(path, part, f"{name}/{key}".strip("/"))
    elif not isinstance(description, Parameter):
        what = f"{name} is" if name else "it gives"
        raise UserError(
            f"the model {path}: describe(c) must give a dict of Parameter, but {what} {type(description).__name__}"
        )
