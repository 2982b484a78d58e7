"""Accelerators by their published figures, and the devices of a topology that is compiled for without being there.

Peaks are dense bfloat16; `link` is what one chip sends to its neighbours in one direction. Sources: for TPUs the pages
cloud.google.com/tpu/docs/v4, /v5e, /v5p and /v6e (interconnect there in Gbit/s a chip: 2400, 1600, 4800 and 3200, an
eighth of that here); for GPUs NVIDIA's data sheets of the SXM modules of A100 80 GB, H100 and H200 (half of NVLink's
two-way bandwidth; half of the rates with sparsity).
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from allmrec_jax.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One accelerator. `kinds` are the beginnings of JAX's `device_kind`s."""

    name: str
    flops: float
    """A second, bfloat16, dense."""
    memory: int
    """Bytes."""
    bandwidth: float
    """Bytes a second, of that memory."""
    link: float
    """Bytes a second, to other chips."""
    usable: float
    """Share of the memory that arrays can have: what the TPU compiler leaves; what JAX preallocates on a GPU."""
    kinds: tuple[str, ...]
    platform: str = "tpu"


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, 32 * GIB, 1200e9, 300e9, 0.984, ("TPU v4",)),
        Chip("v5e", 197e12, 16 * GIB, 819e9, 200e9, 0.984, ("TPU v5 lite", "TPU v5e")),
        Chip("v5p", 459e12, 95 * GIB, 2765e9, 600e9, 0.984, ("TPU v5p", "TPU v5")),
        Chip("v6e", 918e12, 32 * GIB, 1600e9, 400e9, 0.984, ("TPU v6 lite", "TPU v6e")),
        Chip("a100", 312e12, 80 * GIB, 2039e9, 300e9, 0.75, ("NVIDIA A100",), "gpu"),
        Chip("h100", 989e12, 80 * GIB, 3350e9, 450e9, 0.75, ("NVIDIA H100",), "gpu"),
        Chip("h200", 989e12, int(141e9), 4800e9, 450e9, 0.75, ("NVIDIA H200",), "gpu"),
    )
}

# What libtpu asks of its surroundings where there is no TPU; any valid accelerator type will do.
SURROUNDINGS = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


@dataclass(frozen=True)
class Hardware:
    """What is planned for. `devices` is empty where there is no compiler for it here."""

    name: str
    count: int
    devices: Sequence[Any]
    chip: Chip | None
    memory: int | None
    """Bytes a chip has."""
    usable: int | None
    """Bytes of those that arrays can have."""
    platform: str


def usable_share(chip: Chip) -> float:
    """Of a chip's memory; on GPUs `XLA_PYTHON_CLIENT_MEM_FRACTION` decides, .75 by default."""
    chosen = os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION")
    return float(chosen) if chosen and chip.platform == "gpu" else chip.usable


def hardware(topology: str) -> Hardware:
    """The hardware of `--topology`: `v5e:2x4`, `h100:8`, `cpu:4` or `local`.

    Call it before anything else starts JAX: it says which platform JAX is to use.

    Raises:
      UserError: if it is not known, or libtpu is not installed.
    """
    name, _, shape = topology.lower().partition(":")
    if name == "local":
        return _of_devices(topology, jax.devices())
    if name not in (*CHIPS, "cpu") or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        raise UserError(
            f"--topology {topology} is not known; say v5e:2x4 (chips {', '.join(CHIPS)}), h100:8, cpu:4 or local"
        )
    os.environ["JAX_PLATFORMS"] = "cpu"
    jax.config.update("jax_platforms", "cpu")
    if name == "cpu":
        return _of_devices(topology, _cpus(math.prod(map(int, shape.split("x")))))
    chip = CHIPS[name]
    usable = int(chip.memory * usable_share(chip))
    if chip.platform == "gpu":
        count = math.prod(map(int, shape.split("x")))
        return Hardware(topology, count, [], chip, chip.memory, usable, chip.platform)
    devices = _tpus(topology, chip)
    return Hardware(topology, len(devices), devices, chip, chip.memory, usable, chip.platform)


def _tpus(topology: str, chip: Chip) -> Sequence[Any]:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"--topology {topology} needs the TPU compiler: pip install 'allmrec-jax[tpu]' (Linux on x86)")
    for variable, value in SURROUNDINGS.items():
        os.environ.setdefault(variable, value)
    from jax.experimental import topologies

    # A v4 chip has two cores that programs see as one device.
    more = {"chip_config_name": "megacore"} if chip.name == "v4" else {}
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology.lower(), **more).devices
    except Exception as error:
        raise UserError(
            f"--topology {topology} is refused by the TPU compiler: {str(error).splitlines()[0]}"
        ) from error


def _cpus(count: int) -> Sequence[Any]:
    with contextlib.suppress(RuntimeError):  # JAX runs already: what there is must do
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise UserError(f"--topology cpu:{count}: this process has {len(devices)} CPU devices; ask for fewer")
    return devices[:count]


def _of_devices(topology: str, devices: Sequence[Any]) -> Hardware:
    kind = devices[0].device_kind
    chip = next((c for c in CHIPS.values() if any(kind.startswith(k) for k in c.kinds)), None)
    platform = devices[0].platform
    if platform == "cpu":  # all devices share the machine's memory
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(devices)
        return Hardware(topology, len(devices), devices, chip, memory, memory, platform)
    usable = (devices[0].memory_stats() or {}).get("bytes_limit")
    memory = chip.memory if chip else usable
    return Hardware(topology, len(devices), devices, chip, memory, usable or memory, platform)
