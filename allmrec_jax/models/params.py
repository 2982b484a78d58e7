"""One description per parameter, from which everything that concerns it is read.

A *description* is a nested dict whose leaves are `Parameter`. From it come the initial tree (`init`), abstract shapes
(`shapes`), shardings (`shardings`), and the conversion from and to the tensors of a PyTorch file (`from_torch`,
`to_torch`).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import parse_shape, rearrange

from allmrec_jax.errors import UserError

Initialiser = Callable[[jax.Array, tuple[int, ...]], jax.Array]
Tree = Any
AnyMesh = jax.sharding.Mesh | jax.sharding.AbstractMesh

# Logical axes of parameters and activations -> mesh axes. An axis that does not divide its mesh axis is replicated.
AXIS_RULES: dict[str, str] = {
    "batch": "data",
    "vocab": "model",
    "heads": "model",
    "kv_heads": "model",
    "mlp": "model",
    "items": "model",
}
# The same for weights that are cut over the data-parallel devices, too: each layer is gathered where it is used.
FULLY_SHARDED: dict[str, str] = AXIS_RULES | {"embed": "data"}


def normal(std: float) -> Initialiser:
    """Zero-mean normal of standard deviation `std`."""
    return lambda key, shape: std * jax.random.normal(key, shape)


def xavier_normal(fan_in: int, fan_out: int) -> Initialiser:
    """Glorot's normal, std = sqrt(2 / (fan_in + fan_out)), with the fans of the tensor as PyTorch stores it."""
    return normal(math.sqrt(2 / (fan_in + fan_out)))


def uniform(fan_in: int) -> Initialiser:
    """PyTorch's default for dense layers and their biases: U(+-1 / sqrt(fan_in))."""
    bound = 1 / math.sqrt(fan_in)
    return lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def constant(value: float) -> Initialiser:
    """Every element equal to `value`."""
    return lambda key, shape: jnp.full(shape, value)


@dataclass(frozen=True)
class Parameter:
    """One parameter.

    Attributes:
      shape: our shape; with a leading `layer` axis where the layers of a model are stacked.
      axes: a logical axis name (or None) for each dimension; `AXIS_RULES` maps them to mesh axes.
      init: `(key, shape) -> array`, applied to the whole stacked shape.
      torch: name in the PyTorch file, with `{layer}` where layers are stacked; None if it has no counterpart.
      layout: einops pattern from the PyTorch tensor (of one layer) to ours, e.g. `"o i -> i o"`.
      sizes: axis lengths that `layout` needs to split a dimension.
      inputs: the dimensions of `shape` that a matrix product sums over; a parameter that has some can be quantised.
      dtype: what it is stored in, where that is not the dtype of the whole tree.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Initialiser
    torch: str | None = None
    layout: str | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)
    inputs: tuple[int, ...] = ()
    dtype: Any = None

    def __post_init__(self) -> None:
        if len(self.axes) != len(self.shape):
            raise ValueError(f"{self.torch}: {len(self.axes)} axis names for shape {self.shape}")

    @property
    def stacked(self) -> bool:
        return self.torch is not None and "{layer}" in self.torch

    @property
    def names(self) -> list[str]:
        """Its names in the PyTorch file: one a layer, or one."""
        if self.torch is None:
            return []
        return [self.torch.format(layer=k) for k in range(self.shape[0])] if self.stacked else [self.torch]


def is_parameter(node: Any) -> bool:
    return isinstance(node, Parameter)


def paths(description: Tree) -> list[tuple[str, Parameter]]:
    """(`a/b/c`, parameter) for every leaf, in tree order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(description, is_leaf=is_parameter)
    return [("/".join(key.key for key in path), leaf) for path, leaf in leaves]


def rebuild(description: Tree, leaves: Iterable[Any]) -> Tree:
    """A tree like `description` with these leaves, given in the order of `paths`."""
    return jax.tree.unflatten(jax.tree.structure(description, is_leaf=is_parameter), list(leaves))


def init(key: jax.Array, description: Tree, dtype: Any = jnp.float32) -> Tree:
    """The initial tree. Each parameter's key depends on its own path alone, so adding one changes no other."""
    leaves = []
    for path, parameter in paths(description):
        own = jax.random.fold_in(key, zlib.crc32(path.encode()) & 0x7FFFFFFF)
        leaves.append(parameter.init(own, parameter.shape).astype(parameter.dtype or dtype))
    return rebuild(description, leaves)


def shapes(description: Tree, dtype: Any = jnp.float32) -> Tree:
    """The tree as `jax.ShapeDtypeStruct`."""
    return rebuild(description, (jax.ShapeDtypeStruct(p.shape, p.dtype or dtype) for _, p in paths(description)))


def spec(parameter: Parameter, mesh: AnyMesh, rules: Mapping[str, str] = AXIS_RULES) -> tuple:
    """The mesh axis (or None) that cuts each dimension; those that the mesh axis does not divide stay whole.

    A mesh axis cuts the first dimension that asks for it, and no other.
    """
    names: list[str | None] = []
    for size, axis in zip(parameter.shape, parameter.axes, strict=True):
        mesh_axis = rules.get(axis) if axis is not None else None
        divides = mesh_axis in mesh.shape and size % mesh.shape[mesh_axis] == 0
        names.append(mesh_axis if divides and mesh_axis not in names else None)
    return tuple(names)


def shardings(description: Tree, mesh: jax.sharding.Mesh, rules: Mapping[str, str] = AXIS_RULES) -> Tree:
    """A `NamedSharding` for every parameter; dimensions that the mesh axis does not divide stay whole."""

    def sharding(parameter: Parameter) -> jax.sharding.NamedSharding:
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec(parameter, mesh, rules)))

    return rebuild(description, (sharding(p) for _, p in paths(description)))


def bytes_per_device(description: Tree, mesh: AnyMesh, rules: Mapping[str, str] = AXIS_RULES) -> int:
    """Bytes of the described arrays (float32 where they have no dtype) on each device; int4 takes half a byte."""
    total = 0.0
    for _, parameter in paths(description):
        dtype = jnp.dtype(parameter.dtype or jnp.float32)
        size = 0.5 if dtype == jnp.int4 else dtype.itemsize
        cuts = [1 if axis is None else mesh.shape[axis] for axis in spec(parameter, mesh, rules)]
        total += math.prod(parameter.shape) / math.prod(cuts) * size
    return int(total)


def check_names(
    description: Tree,
    names: Iterable[str],
    *,
    ignore: Callable[[str], bool] = lambda name: False,
    source: str = "the weights",
) -> None:
    """That a PyTorch file holds every parameter once and nothing else.

    Raises:
      UserError: for a missing or unknown name, or one that two parameters claim, naming it.
    """
    names, used = set(names), set()
    for path, parameter in paths(description):
        if not parameter.names:
            raise UserError(f"{source}: the parameter {path!r} has no name in a PyTorch file")
        for name in parameter.names:
            if name not in names:
                raise UserError(f"{source}: the tensor {name!r} is missing; is this the right model?")
            if name in used:
                raise UserError(f"{source}: the tensor {name!r} is claimed by two parameters")
            used.add(name)
    unknown = sorted(name for name in names - used if not ignore(name))
    if unknown:
        raise UserError(f"{source}: unknown tensor {unknown[0]!r} ({len(unknown)} such); is this the right model?")


def laid_out(tensor: Any, name: str, parameter: Parameter, source: str = "the weights") -> np.ndarray:
    """The tensor of a PyTorch file (of one layer) in our layout: a view of it.

    Raises:
      UserError: for a tensor of another shape, naming it.
    """
    tensor = np.asarray(tensor)
    expected = parameter.shape[1:] if parameter.stacked else parameter.shape
    try:
        ours = rearrange(tensor, parameter.layout, **parameter.sizes) if parameter.layout else tensor
    except Exception as error:
        raise UserError(f"{source}: {name!r} has shape {tensor.shape}, which does not fit {expected}") from error
    if ours.shape != expected:
        raise UserError(f"{source}: {name!r} has shape {tensor.shape}, which does not fit {expected}")
    return ours


def from_torch(
    description: Tree,
    tensors: Mapping[str, Any],
    *,
    dtype: Any = np.float32,
    ignore: Callable[[str], bool] = lambda name: False,
    source: str = "the weights",
) -> Tree:
    """The tree that a PyTorch file holds, on the host. `tensors` may read lazily: each tensor is fetched once.

    Raises:
      UserError: for a missing, unknown or misshaped name, naming it.
    """
    check_names(description, tensors, ignore=ignore, source=source)

    def fetch(name: str, parameter: Parameter) -> np.ndarray:
        return laid_out(tensors[name], name, parameter, source).astype(dtype)

    leaves = []
    for _, parameter in paths(description):
        layers = [fetch(name, parameter) for name in parameter.names]
        leaves.append(np.stack(layers) if parameter.stacked else layers[0])
    return rebuild(description, leaves)


def to_torch(description: Tree, tree: Tree) -> dict[str, np.ndarray]:
    """The tensors of the PyTorch file, the inverse of `from_torch` to the bit.

    Raises:
      ValueError: if `tree` is not of the description's structure and shapes.
      UserError: for a parameter that has no name in a PyTorch file, or two that have the same.
    """
    if jax.tree.structure(tree) != (expected := jax.tree.structure(description, is_leaf=is_parameter)):
        raise ValueError(f"the tree {jax.tree.structure(tree)} is not the described {expected}")
    tensors: dict[str, np.ndarray] = {}
    for (path, parameter), value in zip(paths(description), jax.tree.leaves(tree), strict=True):
        if parameter.torch is None:
            raise UserError(f"the parameter {path!r} has no name in a PyTorch file")
        array = np.asarray(value)
        if array.shape != parameter.shape:
            raise ValueError(f"{path} has shape {array.shape}, not the described {parameter.shape}")
        parts = array if parameter.stacked else array[None]
        for layer, part in enumerate(parts):
            if parameter.layout:
                left, right = (side.strip() for side in parameter.layout.split("->"))
                # The inverse pattern needs the sizes of the axes that stand alone on our side.
                sizes = {k: v for k, v in parse_shape(part, _flat_axes(right)).items() if k != "_"}
                part = rearrange(part, f"{right} -> {left}", **{**sizes, **parameter.sizes})
            name = parameter.torch.format(layer=layer)
            if name in tensors:
                raise UserError(f"two parameters go by the name {name!r} in a PyTorch file")
            tensors[name] = part
    return tensors


def _flat_axes(side: str) -> str:
    """An einops side with every group replaced by `_`, as `parse_shape` wants it."""
    out, depth = [], 0
    for token in side.replace("(", " ( ").replace(")", " ) ").split():
        if token == "(":
            depth += 1
            out.append("_")
        elif token == ")":
            depth -= 1
        elif depth == 0:
            out.append("_" if token == "1" else token)
    return " ".join(out)


def count(description: Tree) -> int:
    """Number of scalars."""
    return sum(math.prod(p.shape) for _, p in paths(description))
