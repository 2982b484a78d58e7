"""The tensors of a file as placed device arrays, one tensor at a time: the host never holds more than one.

A parameter whose layers are stacked is made as zeros where it will stay, each device its own part, and is filled layer
by layer; its old buffer is given away at each step, so that a device holds the parameter and one layer of it:

    file        layer 0 | layer 1 | layer 2        (read: the slices that this process's devices hold)
    device a    [ ..... | ..      |        ]
    device b    [ ..... | ..      |        ]
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from allmrec_jax.models import params
from allmrec_jax.models.params import Parameter, Tree

Store = Callable[[jax.Array, Parameter], Any]
"""What is kept of a parameter (of one layer, without the layer axis): its value at another precision, or a tree."""


def load(
    description: Tree,
    tensors: Mapping[str, Any],
    kept: Tree,
    store: Store,
    *,
    mesh: Mesh | None = None,
    rules: Mapping[str, str] = params.AXIS_RULES,
    ignore: Callable[[str], bool] = lambda name: False,
    source: str = "the weights",
) -> Tree:
    """The tree that a PyTorch file holds, on its devices.

    Args:
      description: of the parameters as the file has them.
      tensors: by name, each fetched once a layer; what is lazy (a view of a mapped file) is read in slices.
      kept: of what is to be kept: as `description`, with a dict of parameters in place of one that `store` takes apart.
      store: applied on the devices, to each layer; hashable, for it is compiled once for each kind of parameter.
      mesh: cuts everything by its logical axes; None leaves it on the default device.
      rules: which mesh axis cuts which logical axis.

    Raises:
      UserError: for a missing, unknown or misshaped name, naming it; names are checked before anything is read.
    """
    params.check_names(description, tensors, ignore=ignore, source=source)
    wanted = jax.tree.structure(description, is_leaf=params.is_parameter).flatten_up_to(kept)
    leaves = []
    for (_, parameter), shape in zip(params.paths(description), wanted, strict=True):
        leaves.append(_place(parameter, tensors, shape, store, mesh, rules, source))
    return params.rebuild(description, leaves)


def _place(
    parameter: Parameter,
    tensors: Mapping[str, Any],
    kept: Tree,
    store: Store,
    mesh: Mesh | None,
    rules: Mapping[str, str],
    source: str,
) -> Any:
    """One parameter, whole or layer by layer."""
    dropped = 1 if parameter.stacked else 0
    spec = None if mesh is None else params.spec(parameter, mesh, rules)[dropped:]
    placed = None if mesh is None else tuple(jax.tree.leaves(params.shardings(kept, mesh, rules)))
    inputs = tuple(axis - dropped for axis in parameter.inputs)
    one = Parameter(parameter.shape[dropped:], parameter.axes[dropped:], parameter.init, inputs=inputs)
    write = _writer(store, one.shape, one.axes, one.inputs, placed, parameter.stacked)
    shapes = params.shapes(kept)
    buffers = _zeros(shapes, placed) if parameter.stacked else None
    for layer, name in enumerate(parameter.names):
        ours = params.laid_out(tensors[name], name, parameter, source)
        value = _to_devices(ours, mesh, spec)
        # Waiting keeps the host from running ahead of the devices with layers that they have not taken yet.
        buffers = jax.block_until_ready(write(buffers, value, layer) if parameter.stacked else write(value))
    if parameter.stacked:
        return jax.tree.map(lambda x, shape: x if x.dtype == shape.dtype else _narrow(x, shape.dtype), buffers, shapes)
    return buffers


def _to_devices(view: np.ndarray, mesh: Mesh | None, spec: tuple | None) -> jax.Array:
    """The array on its devices, each given a copy of its slice (never the mapped file itself)."""
    narrow = np.float32 if view.dtype == np.float64 else view.dtype
    if mesh is None:
        return jnp.asarray(np.array(view, narrow, order="C"))
    slices: dict[tuple, np.ndarray] = {}

    def read(index: tuple[slice, ...]) -> np.ndarray:
        key = tuple((part.start, part.stop) for part in index)
        if key not in slices:
            slices[key] = np.array(view[index], narrow, order="C")
        return slices[key]

    return jax.make_array_from_callback(view.shape, NamedSharding(mesh, P(*spec)), read)


def _zeros(shapes: Tree, placed: tuple | None) -> Tree:
    """Where layers are written; int4 as int8, because writing to a part of packed numbers may unpack all of them."""
    leaves, structure = jax.tree.flatten(shapes)
    places = placed or (None,) * len(leaves)
    wide = [jnp.dtype(jnp.int8) if s.dtype == jnp.int4 else s.dtype for s in leaves]
    return structure.unflatten(
        [jnp.zeros(s.shape, d, device=place) for s, d, place in zip(leaves, wide, places, strict=True)]
    )


@functools.partial(jax.jit, static_argnums=1)
def _narrow(x: jax.Array, dtype: Any) -> jax.Array:
    return x.astype(dtype)


@functools.lru_cache(maxsize=256)
def _writer(
    store: Store, shape: tuple, axes: tuple, inputs: tuple, placed: tuple | None, stacked: bool
) -> Callable[..., Any]:
    """The compiled `(buffers, value, layer) -> buffers`, which takes `buffers` over; or `value -> kept`."""
    parameter = Parameter(shape, axes, params.constant(0.0), inputs=inputs)

    def pinned(tree: Tree) -> Tree:
        if placed is None:
            return tree
        leaves, structure = jax.tree.flatten(tree)
        return structure.unflatten(map(jax.lax.with_sharding_constraint, leaves, placed))

    def whole(value: jax.Array) -> Tree:
        return pinned(store(value, parameter))

    def one_layer(buffers: Tree, value: jax.Array, layer: jax.Array) -> Tree:
        def put(buffer: jax.Array, part: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_index_in_dim(buffer, part.astype(buffer.dtype), layer, axis=0)

        return pinned(jax.tree.map(put, buffers, store(value, parameter)))

    return jax.jit(one_layer, donate_argnums=0) if stacked else jax.jit(whole)
