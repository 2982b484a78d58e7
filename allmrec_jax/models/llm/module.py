"""What every language model here is: a table of token embeddings, blocks in between, logits over the table's rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from allmrec_jax.models import params
from allmrec_jax.models.llm import attention, cache, quantize
from allmrec_jax.models.llm.cache import Cache
from allmrec_jax.models.llm.quantize import FLOAT32, Precision
from allmrec_jax.models.params import Parameter, constant, normal

INIT = normal(0.02)
See = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # (q, k, v) -> what each query sees
Block = Callable[[jax.Array, dict[str, Any], See], jax.Array]  # (x, a layer's weights, see) -> x


class Config(Protocol):
    """What callers ask of any model's config."""

    vocab_size: int
    num_attention_heads: int

    @property
    def width(self) -> int:
        """h, the width of the token embedding, where O_u and O_i are injected."""

    @property
    def context(self) -> int:
        """The longest sequence the model reads."""


class LanguageModel(nnx.Module):
    """A frozen LLM: token embedding, blocks and output are separate so that embeddings can be injected in between.

    A subclass gives `describe` (every parameter, layers stacked on axis 0; the tables are called `embed` and, where it
    is not the same, `output`) and what stands before, in and after its layers: `enter`, `block` and `leave`.
    """

    window: int | None = None
    """Tokens that attention looks back, itself counted; None sees all."""

    describe: ClassVar[Callable[[Any], dict[str, Any]]]

    def __init__(self, config: Any, key: jax.Array, precision: Precision = FLOAT32):
        self.config = config
        description = type(self).describe(config)
        tree = quantize.tree(description, params.init(key, description), precision)
        self.weights = nnx.data(jax.tree.map(nnx.Param, tree))

    def enter(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """What the first layer gets, from embeddings."""
        return x

    def block(self, positions: jax.Array) -> Block:
        """A layer for tokens at these positions."""
        raise NotImplementedError

    def leave(self, x: jax.Array) -> jax.Array:
        """What `logits` gets, from the last layer."""
        return x

    def __call__(
        self,
        embeddings: Float[Array, "batch time h"],
        branch: Int[Array, "batch time"],
        *,
        remat: Callable | None = None,
        columns: int | None = None,
    ) -> Any:
        """Hidden states after the last norm, of the width of the embeddings.

        Args:
          embeddings: token embeddings with whatever was injected.
          branch: 0 prompt, 1.. branches, -1 padding (see `attention.branch_mask`).
          remat: a `jax.checkpoint` policy for the backward pass of each layer; None keeps all activations.
          columns: also give the `Cache` of these tokens, with so many columns.
        """
        mask, positions = attention.branch_mask(branch), attention.branch_positions(branch)
        if self.window is not None and self.window < branch.shape[1]:
            mask = mask & attention.window_mask(positions, self.window)
        block = self.block(positions)

        def layer(x: jax.Array, w: dict[str, Any]) -> tuple[jax.Array, Any]:
            kept = []

            def see(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
                kept.extend((k, v))
                return attention.attend(q, k, v, mask)

            x = block(x, w, see)
            return x, None if columns is None else kept

        if remat is not None:
            layer = jax.checkpoint(layer, policy=remat)
        with jax.named_scope("llm"):
            x, kept = jax.lax.scan(layer, self.enter(embeddings, positions), nnx.as_pure(self.weights)["layers"])
        if columns is None:
            return self.leave(x)
        at = jnp.where(branch == attention.PAD, cache.NOTHING, positions)
        return self.leave(x), cache.with_room(*kept, at, columns)

    def extend(
        self,
        embeddings: Float[Array, "batch new h"],
        positions: Int[Array, "batch new"],
        seen: Bool[Array, "batch new columns"],
        before: Cache,
        at: Int[Array, ""] | int,
    ) -> tuple[Float[Array, "batch new h"], Cache]:
        """Hidden states of more tokens, and the cache with them in its columns from `at` on.

        Args:
          seen: the columns that each of them sees, its own among them.
        """
        where = jax.lax.dynamic_update_slice(before.positions, positions, (0, at))
        if self.window is not None:
            seen = seen & (positions[:, :, None] - where[:, None, :] < self.window)
        block, layers = self.block(positions), nnx.as_pure(self.weights)["layers"]

        def layer(carry: tuple[jax.Array, ...], inputs: tuple[Any, jax.Array]) -> tuple[tuple[jax.Array, ...], None]:
            x, keys, values = carry
            w, number = inputs

            def see(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
                nonlocal keys, values
                keys, k = cache.put(keys, k, number, at)
                values, v = cache.put(values, v, number, at)
                return jax.nn.dot_product_attention(q, k, v, mask=seen[:, None])

            x = block(x, w, see)
            return (x, keys, values), None

        with jax.named_scope("llm"):
            carry = self.enter(embeddings, positions), before.keys, before.values
            numbers = jnp.arange(before.keys.shape[0])
            (x, keys, values), _ = jax.lax.scan(layer, carry, (layers, numbers))
        return self.leave(x), Cache(keys, values, where)

    def embed(self, tokens: Int[Array, "batch time"]) -> Float[Array, "batch time h"]:
        """Token embeddings; ids outside the vocabulary are clipped, so injection slots may hold any id."""
        return jnp.take(nnx.as_pure(self.weights)["embed"], tokens, axis=0, mode="clip")

    def logits(self, hidden: Float[Array, "*batch h"], rows: int | None = None) -> Float[Array, "*batch vocab"]:
        """Logits in float32 over the first `rows` entries of the vocabulary (all of them by default)."""
        weights = nnx.as_pure(self.weights)
        table = weights.get("output", weights["embed"])[:rows]
        return jnp.einsum("...h,vh->...v", hidden, table, preferred_element_type=jnp.float32)


class Stack:
    """Describes the stacked parameters of `layers` blocks whose tensors are called `prefix.{layer}.NAME`."""

    def __init__(self, layers: int, prefix: str):
        self.layers, self.prefix = layers, f"{prefix}.{{layer}}"

    def vector(self, name: str, size: int, axis: str = "embed", value: float = 0.0) -> Parameter:
        """A bias, or (`value=1`) a scale."""
        return Parameter((self.layers, size), ("layer", axis), constant(value), f"{self.prefix}.{name}")

    def matrix(self, name: str, shape: tuple[int, int], axes: tuple[str, str]) -> Parameter:
        """in -> out."""
        name = f"{self.prefix}.{name}.weight"
        return Parameter((self.layers, *shape), ("layer", *axes), INIT, name, "o i -> i o", inputs=(1,))

    def to_heads(self, name: str, width: int, heads: int, head_dim: int, axis: str) -> Parameter:
        """h -> heads of `head_dim`."""
        return Parameter(
            (self.layers, width, heads, head_dim),
            ("layer", "embed", axis, None),
            INIT,
            f"{self.prefix}.{name}.weight",
            "(n k) h -> h n k",
            {"n": heads, "k": head_dim},
            inputs=(1,),
        )

    def head_bias(self, name: str, heads: int, head_dim: int, axis: str) -> Parameter:
        return Parameter(
            (self.layers, heads, head_dim),
            ("layer", axis, None),
            constant(0.0),
            f"{self.prefix}.{name}.bias",
            "(n k) -> n k",
            {"n": heads, "k": head_dim},
        )

    def from_heads(self, name: str, width: int, heads: int, head_dim: int) -> Parameter:
        """Heads of `head_dim` -> h."""
        return Parameter(
            (self.layers, heads, head_dim, width),
            ("layer", "heads", None, "embed"),
            INIT,
            f"{self.prefix}.{name}.weight",
            "h (n k) -> n k h",
            {"n": heads, "k": head_dim},
            inputs=(1, 2),
        )


def bias(x: jax.Array, weights: dict[str, Any], name: str) -> jax.Array:
    """x plus the bias of this name, if the model has it."""
    if name not in weights:
        return x
    own = weights[name]
    return x + jnp.expand_dims(own, tuple(range(x.ndim - own.ndim)))
