"""Rotary position embedding (Su et al. 2021), with the two ways of stretching it to longer contexts that we know."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from allmrec_jax.errors import UserError

KINDS = ("default", "linear", "llama3")


@dataclass(frozen=True)
class Scaling:
    """How the frequencies are slowed down.

    linear   all divided by `factor`
    llama3   divided by `factor` where a turn takes more than `original / low` tokens, kept where it takes less than
             `original / high`, and between the two in between (Llama 3.1)
    given    divided by `divisors`, one for each pair of dimensions (how GGUF files store `llama3`)
    """

    kind: str
    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    original: int = 8192
    divisors: tuple[float, ...] = ()


def read_scaling(raw: Mapping[str, Any], source: str) -> tuple[float, Scaling | None]:
    """(base, scaling) of a `config.json`, as any version of transformers wrote it.

    Raises:
      UserError: for a kind of scaling that is not known, or settings that are missing.
    """
    rope = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    base = float(raw.get("rope_theta") or rope.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in KINDS:
        raise UserError(f"{source}: rotary scaling {kind!r} is not supported (known: {', '.join(KINDS)})")
    if rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0)) != 1.0:
        raise UserError(f"{source}: rotary positions on a part of each head are not supported")
    if kind == "default":
        return base, None
    if kind == "linear":
        return base, Scaling("linear", float(rope["factor"]))
    low, high, original = (rope[k] for k in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"))
    return base, Scaling("llama3", float(rope["factor"]), float(low), float(high), int(original))


def frequencies(width: int, base: float, scaling: Scaling | None = None) -> Float[np.ndarray, " half"]:
    """Radians a token for each pair of dimensions: `base ** (-2 k / width)`, slowed down as `scaling` says."""
    turn = base ** (-np.arange(0, width, 2, dtype=np.float64) / width)
    if scaling is None:
        return turn.astype(np.float32)
    if scaling.kind == "given":
        return (turn / np.array(scaling.divisors)).astype(np.float32)
    if scaling.kind == "linear":
        return (turn / scaling.factor).astype(np.float32)
    turns = scaling.original * turn / (2 * math.pi)  # within the original context
    kept = np.clip((turns - scaling.low) / (scaling.high - scaling.low), 0, 1)
    return (kept * turn + (1 - kept) * turn / scaling.factor).astype(np.float32)


def rotate(
    x: Float[Array, "batch time heads width"],
    positions: Int[Array, "batch time"],
    frequency: Float[np.ndarray, " half"],
) -> Float[Array, "batch time heads width"]:
    """Dimension k, paired with k + width/2 (the order of the Hugging Face weights), turned by position * frequency."""
    angle = (positions[..., None].astype(jnp.float32) * jnp.asarray(frequency)[None, None, :])[:, :, None, :]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
