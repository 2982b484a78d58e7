"""Frozen weights in 32 or 16 bits, in int8 (a scale for each output channel) or in int4 (one for each 128 inputs).

A weight that a matrix product sums over (`Parameter.inputs`) becomes a pair of arrays:

    int8    integers (.., in, out)      scales (.., out)             W ~ integers * scales
    int4    integers (.., in, out)      scales (.., in / 128, out)   W ~ integers * (scales, each 128 times)

The scale of int8 leaves the product: y = (x @ integers) * scales. That of int4 cannot; there the weight is written out
as the product's operand, which XLA fuses into it or, where it cannot, makes for one layer of the scan at a time.
Norms, biases and the token embeddings (and the output's table) stay in the precision of the activations.

Reference for the pairing of integers and scales: Dettmers et al. 2022 (LLM.int8), Frantar et al. 2023 (groups).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from allmrec_jax.errors import UserError
from allmrec_jax.models import params
from allmrec_jax.models.params import AXIS_RULES, Parameter, Tree

GROUP = 128
QUANTISED = ("int8", "int4")
FLOATS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Precision:
    """How weights are kept (`weights`: a float, or int8, int4), and in which float everything else is computed."""

    weights: str = "float32"
    compute: str = "float32"

    def __call__(self, value: jax.Array, parameter: Parameter) -> Any:
        """What is kept of a parameter (of one layer)."""
        if self.weights not in QUANTISED or not parameter.inputs:
            return value.astype(self.compute)
        return quantise(value, parameter, self)


FLOAT32 = Precision()


def precision(dtype: Any) -> Precision:
    """Of a config's `llm.dtype`, or a dtype. Beside integers: bfloat16 on accelerators, float32 on CPU.

    Raises:
      UserError: for a dtype that is not known, with the list.
    """
    name = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
    fast = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    name = fast if name == "auto" else name
    if name not in QUANTISED + FLOATS:
        raise UserError(f"llm.dtype {name} is not known; choose auto, {', '.join(FLOATS + QUANTISED)}")
    return Precision(name, fast if name in QUANTISED else name)


def group(size: int, axis: str | None) -> int:
    """Inputs that share a scale of int4: at most 128, and a divisor of the axis's size.

    An axis that is cut over devices is divided into eighths first, so that no group lies on two of up to 8 devices.
    """
    part = size // math.gcd(size, 8) if axis in AXIS_RULES else size
    return next(n for n in range(min(GROUP, part), 0, -1) if part % n == 0)


def describe(description: Tree, how: Precision) -> Tree:
    """The description of what is kept: a dict of `integers` and `scales` in place of each parameter quantised."""

    def kept(parameter: Parameter) -> Any:
        if how.weights not in QUANTISED or not parameter.inputs:
            return replace(parameter, dtype=jnp.dtype(how.compute))
        integers = replace(parameter, dtype=jnp.dtype(how.weights), torch=None, inputs=())
        shape, axes = list(parameter.shape), list(parameter.axes)
        if how.weights == "int4":
            last = parameter.inputs[-1]
            shape[last] //= group(shape[last], axes[last])
        else:
            shape, axes = ([x for i, x in enumerate(y) if i not in parameter.inputs] for y in (shape, axes))
        scales = Parameter(tuple(shape), tuple(axes), parameter.init, dtype=jnp.dtype(how.compute))
        return {"integers": integers, "scales": scales}

    return params.rebuild(description, (kept(parameter) for _, parameter in params.paths(description)))


def quantise(weight: jax.Array, parameter: Parameter, how: Precision) -> dict[str, jax.Array]:
    """The nearest integers to weight / scale, where the scale (rounded to the computing precision first)

    int8    takes the channel's largest magnitude to 127: off by half a scale at most, max |W| / 254
    int4    takes the group's largest magnitude to -8, on its own side: off by half a scale, and by one where
            an opposite number would be +8
    """
    weight = weight.astype(jnp.float32)
    if how.weights == "int8":
        extreme, lowest, highest = jnp.max(jnp.abs(weight), axis=parameter.inputs, keepdims=True), -127, 127
        at_extreme = 127.0
    else:
        last = parameter.inputs[-1]
        weight = _grouped(weight, last, group(weight.shape[last], parameter.axes[last]))
        high, low = (f(weight, axis=last + 1, keepdims=True) for f in (jnp.max, jnp.min))
        extreme, lowest, highest, at_extreme = jnp.where(high > -low, high, low), -8, 7, -8.0
    scales = (extreme / at_extreme).astype(how.compute)
    divisor = jnp.where(scales == 0, 1, scales).astype(jnp.float32)
    integers = jnp.clip(jnp.round(weight / divisor), lowest, highest).astype(how.weights)
    if how.weights == "int8":
        return {"integers": integers, "scales": jnp.squeeze(scales, parameter.inputs)}
    return {"integers": integers.reshape(parameter.shape), "scales": jnp.squeeze(scales, last + 1)}


def _grouped(x: jax.Array, axis: int, size: int) -> jax.Array:
    """`(.., n * size, ..)` as `(.., n, size, ..)`."""
    return x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])


def tree(description: Tree, weights: Tree, how: Precision) -> Tree:
    """What is kept of a whole tree of weights that are already there (stacked layers at once)."""
    leaves = jax.tree.structure(description, is_leaf=params.is_parameter).flatten_up_to(weights)
    kept = []
    for (_, parameter), weight in zip(params.paths(description), leaves, strict=True):
        kept.append(how(jnp.asarray(weight), parameter))
    return params.rebuild(description, kept)


def einsum(pattern: str, x: jax.Array, weight: jax.Array | Mapping[str, jax.Array]) -> jax.Array:
    """`jnp.einsum(pattern, x, weight)` for a weight in whichever form it is kept."""
    if not isinstance(weight, Mapping):
        return jnp.einsum(pattern, x, weight)
    # Without this the backward pass would find the float copies of all layers' weights, kept by the forward pass.
    return jax.checkpoint(functools.partial(_einsum, pattern), prevent_cse=False)(x, weight)


def _einsum(pattern: str, x: jax.Array, weight: Mapping[str, jax.Array]) -> jax.Array:
    integers, scales = weight["integers"], weight["scales"]
    if integers.ndim != scales.ndim:  # int8
        (_, of_weight), out = pattern.split("->")[0].split(","), pattern.split("->")[1]
        kept = "".join(letter for letter in of_weight if letter in out)
        return jnp.einsum(f"{out},{kept}->{out}", jnp.einsum(pattern, x, integers.astype(x.dtype)), scales)
    return jnp.einsum(pattern, x, written_out(weight, x.dtype))


def written_out(weight: Mapping[str, jax.Array], dtype: Any = jnp.float32) -> jax.Array:
    """int4's weight in float: integers * scales."""
    integers, scales = weight["integers"], weight["scales"]
    sizes = zip(integers.shape, scales.shape, strict=True)
    axis = next((i for i, (a, b) in enumerate(sizes) if a != b), 0)
    grouped = _grouped(integers, axis, integers.shape[axis] // scales.shape[axis]).astype(dtype)
    return (grouped * jnp.expand_dims(scales.astype(dtype), axis + 1)).reshape(integers.shape)
