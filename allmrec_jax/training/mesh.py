"""Devices: the data axis of stages 0 and 1, and the (data, model) mesh of stage 2."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from allmrec_jax.errors import UserError

Mapping = Literal["shard_map", "pmap"]
DATA = "data"


def make_mesh(data: int | None = None, model: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh `(data, model)` with automatic axis types; `data=None` takes all devices that `model` leaves.

    Raises:
      UserError: if the devices cannot be cut this way.
    """
    devices = list(jax.devices() if devices is None else devices)
    if data is None:
        data = max(1, len(devices) // max(1, model))
    if data < 1 or model < 1:
        raise UserError(f"a mesh of {data} x {model} devices makes no sense; both numbers are at least 1")
    if data * model > len(devices):
        raise UserError(f"a mesh of {data} x {model} needs {data * model} devices, but there are {len(devices)}")
    auto = (jax.sharding.AxisType.Auto,) * 2
    return Mesh(np.array(devices[: data * model]).reshape(data, model), ("data", "model"), axis_types=auto)


def data_parallel(devices: int, model: int, *batches: int) -> int:
    """How many data-parallel devices, of those that `model` leaves, cut all these batches evenly."""
    return math.gcd(max(1, devices // model), *batches)


def local_rows(per_device: int, axes: str | tuple[str, ...] = DATA) -> jax.Array:
    """The global rows of a batch that this device computes; call it inside a mapped function."""
    return jax.lax.axis_index(axes) * per_device + jnp.arange(per_device)


def map_over(
    function: Callable[..., Any], mesh: Mesh, in_specs: tuple[Any, ...], out_specs: Any, donate: tuple[int, ...] = ()
) -> Callable[..., Any]:
    """`shard_map` of `function` over `mesh`, under `jit`.

    Args:
      in_specs: for each argument a `PartitionSpec`, or a tree of them like it.
    """
    mapped = jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    placed = jax.tree.map(lambda spec: NamedSharding(mesh, spec), in_specs, is_leaf=lambda x: isinstance(x, P))
    jitted = jax.jit(mapped, in_shardings=placed, donate_argnums=donate)
    # Placed before the first call too, so that the second one does not compile again.
    return lambda *arguments: jitted(*map(jax.device_put, arguments, placed))


def map_over_data(
    function: Callable[..., Any],
    devices: Sequence[Any],
    *,
    batched: tuple[bool, ...],
    how: Mapping = "shard_map",
    donate: tuple[int, ...] = (),
    batched_outputs: bool = False,
) -> Callable[..., Any]:
    """Maps `function`, written for one device with collectives over the axis `data`, over `devices`.

    Args:
      batched: for each argument whether its leading axis is cut over the devices (else it is replicated).
      how: `shard_map` under `jit`, or `jax.pmap` itself.
      donate: arguments whose buffers may be reused.
      batched_outputs: whether the outputs' leading axes are cut (else they are replicated).

    Returns:
      A function of whole (global) arrays that returns whole arrays, whichever way it is mapped.
    """
    n = len(devices)
    if how == "shard_map":
        mesh = Mesh(np.array(devices), (DATA,), axis_types=(jax.sharding.AxisType.Auto,))
        specs = tuple(P(DATA) if cut else P() for cut in batched)
        return map_over(function, mesh, specs, P(DATA) if batched_outputs else P(), donate)
    if how != "pmap":
        raise UserError(f"--map {how} is unknown; choose shard_map or pmap")
    mapped = jax.pmap(
        lambda _, *arguments: function(*arguments),  # pmap wants one mapped argument at least
        axis_name=DATA,
        in_axes=(0, *(0 if cut else None for cut in batched)),
        out_axes=0 if batched_outputs else None,
        devices=list(devices),
    )

    def whole(*arguments: Any) -> Any:
        cut = [
            jax.tree.map(lambda x: rearrange(x, "(n b) ... -> n b ...", n=n), argument) if is_cut else argument
            for argument, is_cut in zip(arguments, batched, strict=True)
        ]
        out = mapped(np.arange(n), *cut)
        return jax.tree.map(lambda x: rearrange(x, "n b ... -> (n b) ..."), out) if batched_outputs else out

    return whole


def data_devices(batch: int, devices: Sequence[Any] | None = None, multiple: int = 1) -> list[Any]:
    """As many devices, a multiple of `multiple`, as divide the batch, so that each gets the same number of rows."""
    devices = list(jax.devices() if devices is None else devices)
    fitting = [n for n in range(1, len(devices) + 1) if batch % n == 0 and n % multiple == 0]
    return devices[: max(fitting, default=1)]


def replicated(tree: Any, devices: Sequence[Any]) -> Any:
    """The tree whole on each device, so that a step mapped by `shard_map` does not copy it at each call."""
    whole = NamedSharding(Mesh(np.array(devices), (DATA,), axis_types=(jax.sharding.AxisType.Auto,)), P())
    return jax.device_put(tree, whole)


def precision(name: str) -> str:
    """A config's `dtype`: `auto` is float32 on CPU, else bfloat16."""
    return name if name != "auto" else "float32" if jax.default_backend() == "cpu" else "bfloat16"
