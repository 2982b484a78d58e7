"""The sentence encoder as a Flax NNX module: BERT, DistilBERT and MPNet, from token ids to Q.

All three are post-norm blocks with exact GELU; they differ in what stands below and beside them:

| | BERT | DistilBERT | MPNet |
|---|---|---|---|
| token types | yes (all 0 here) | no | no |
| first position | 0 | 0 | 2 |
| relative attention bias, shared by the layers | no | no | yes |
| dropout after the attention's output | yes | no | yes |

The sentence embedding is the mean of the last hidden states over the attention mask, or the first of them (CLS), and
then L2-normalised or not. Devlin et al. 2019; Sanh et al. 2019; Song et al. 2020; Reimers and Gurevych 2019 (SBERT).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from allmrec_jax.models import params
from allmrec_jax.models.params import Parameter, constant, normal

BUCKETS, FARTHEST = 32, 128  # of MPNet's relative positions


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes by BERT's names; `pooling`, `normalize` and `max_seq_length` as in the sentence-transformers files.

    `attention_dropout` is `dropout` where it is None.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    dropout: float = 0.1
    normalize: bool = False
    max_seq_length: int = 256
    architecture: Literal["bert", "distilbert", "mpnet"] = "bert"
    pooling: Literal["mean", "cls"] = "mean"
    attention_dropout: float | None = None

    @property
    def first_position(self) -> int:
        """MPNet's positions count from the index of its padding token plus one."""
        return 2 if self.architecture == "mpnet" else 0

    @property
    def longest(self) -> int:
        """The greatest number of tokens that have a position."""
        return self.max_position_embeddings - self.first_position


# Names in the PyTorch files, by part of a layer.
_PARTS = ("layer", "q", "k", "v", "o", "attention_norm", "up", "down", "mlp_norm")
_NAMES = {
    "bert": (
        "encoder.layer.{layer}",
        *(f"attention.self.{name}" for name in ("query", "key", "value")),
        *("attention.output.dense", "attention.output.LayerNorm"),
        *("intermediate.dense", "output.dense", "output.LayerNorm"),
    ),
    "distilbert": (
        "transformer.layer.{layer}",
        *(f"attention.{name}_lin" for name in ("q", "k", "v", "out")),
        *("sa_layer_norm", "ffn.lin1", "ffn.lin2", "output_layer_norm"),
    ),
    "mpnet": (
        "encoder.layer.{layer}",
        *(f"attention.attn.{name}" for name in ("q", "k", "v", "o")),
        *("attention.LayerNorm", "intermediate.dense", "output.dense", "output.LayerNorm"),
    ),
}
ARCHITECTURES = tuple(_NAMES)


def describe(c: EncoderConfig) -> dict[str, Any]:
    """Every parameter, layers stacked on axis 0."""
    L, h, f, n = c.num_hidden_layers, c.hidden_size, c.intermediate_size, c.num_attention_heads
    k, init = h // n, normal(0.02)
    names = dict(zip(_PARTS, _NAMES[c.architecture], strict=True))

    def in_layer(part: str) -> str:
        return f"{names['layer']}.{names[part]}"

    def norm(name: str, stacked: bool = True) -> dict[str, Parameter]:
        shape, axes = ((L, h), ("layer", "embed")) if stacked else ((h,), ("embed",))
        return {
            "scale": Parameter(shape, axes, constant(1.0), f"{name}.weight"),
            "bias": Parameter(shape, axes, constant(0.0), f"{name}.bias"),
        }

    def heads(name: str) -> dict[str, Parameter]:
        sizes, axes = {"n": n}, ("layer", "embed", "heads", None)
        return {
            "kernel": Parameter((L, h, n, k), axes, init, f"{name}.weight", "(n k) h -> h n k", sizes),
            "bias": Parameter(
                (L, n, k), ("layer", "heads", None), constant(0.0), f"{name}.bias", "(n k) -> n k", sizes
            ),
        }

    def output(name: str) -> dict[str, Parameter]:
        axes = ("layer", "heads", None, "embed")
        return {
            "kernel": Parameter((L, n, k, h), axes, init, f"{name}.weight", "h (n k) -> n k h", {"n": n}),
            "bias": Parameter((L, h), ("layer", "embed"), constant(0.0), f"{name}.bias"),
        }

    def dense(name: str, i: int, o: int, axes: tuple[str, str]) -> dict[str, Parameter]:
        return {
            "kernel": Parameter((L, i, o), ("layer", *axes), init, f"{name}.weight", "o i -> i o"),
            "bias": Parameter((L, o), ("layer", axes[1]), constant(0.0), f"{name}.bias"),
        }

    def table(rows: int, name: str, axis: str | None = None) -> Parameter:
        return Parameter((rows, h), (axis, "embed"), init, f"embeddings.{name}_embeddings.weight")

    description: dict[str, Any] = {
        "embeddings": {
            "word": table(c.vocab_size, "word", "vocab"),
            "position": table(c.max_position_embeddings, "position"),
            "norm": norm("embeddings.LayerNorm", stacked=False),
        },
        "layers": {
            **{part: heads(in_layer(part)) for part in "qkv"},
            "o": output(in_layer("o")),
            "attention_norm": norm(in_layer("attention_norm")),
            "up": dense(in_layer("up"), h, f, ("embed", "mlp")),
            "down": dense(in_layer("down"), f, h, ("mlp", "embed")),
            "mlp_norm": norm(in_layer("mlp_norm")),
        },
    }
    if c.architecture == "bert":
        description["embeddings"]["type"] = table(c.type_vocab_size, "token_type")
    if c.architecture == "mpnet":
        name = "encoder.relative_attention_bias.weight"
        description["relative"] = Parameter((BUCKETS, n), (None, "heads"), init, name)
    return description


def relative_buckets(time: int) -> Int[np.ndarray, "query key"]:
    """MPNet's bucket of each pair of positions, after T5: near ones exactly, far ones by the logarithm.

    With d = query - key, b = BUCKETS / 2 buckets for each sign, and half of them, m = b / 2, exact:
    bucket = b [d < 0] + (|d| if |d| < m else min(b - 1, m + floor((b - m) log(|d| / m) / log(FARTHEST / m)))).
    """
    d = np.arange(time)[:, None] - np.arange(time)[None, :]
    half, exact = BUCKETS // 2, BUCKETS // 4
    distance = np.abs(d)
    # In float32, as the models were trained: elsewhere a pair on the edge may fall into the next bucket.
    ratio = np.log(np.maximum(distance, exact).astype(np.float32) / np.float32(exact))
    far = exact + (ratio / np.float32(math.log(FARTHEST / exact)) * np.float32(half - exact)).astype(np.int32)
    bucket = np.where(distance < exact, distance, np.minimum(far, half - 1)) + half * (d < 0)
    return bucket.astype(np.int32)


def _norm(x: jax.Array, w: dict[str, jax.Array], eps: float) -> jax.Array:
    """Layer normalisation, in float32 whatever the precision of x."""
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * w["scale"][None, None] + w["bias"][None, None]).astype(x.dtype)


class TextEncoder(nnx.Module):
    """Token ids to sentence embeddings."""

    def __init__(self, config: EncoderConfig, key: jax.Array, dtype: Any = jnp.float32):
        self.config = config
        self.weights = nnx.data(jax.tree.map(nnx.Param, params.init(key, describe(config), dtype)))

    def __call__(
        self,
        tokens: Int[Array, "batch time"],
        mask: Bool[Array, "batch time"],
        dropout_keys: Key[Array, " batch"] | None = None,
    ) -> Float[Array, "batch h"]:
        """Q of each text, in float32; padding stands on the right.

        Args:
          tokens: ids; what stands where `mask` is False is not read.
          mask: True at the tokens of the text, [CLS] and [SEP] among them.
          dropout_keys: one a row; they switch the encoder's own dropout on.
        """
        c, weights, time = self.config, nnx.as_pure(self.weights), tokens.shape[1]
        if time > c.max_position_embeddings:
            raise ValueError(f"{time} tokens, but the encoder has {c.longest} positions")
        attention_dropout = c.dropout if c.attention_dropout is None else c.attention_dropout

        def drop(x: jax.Array, site: jax.Array | int, rate: float = c.dropout) -> jax.Array:
            if dropout_keys is None or rate == 0:
                return x
            keep = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, site), 1 - rate, x.shape[1:]))(
                dropout_keys
            )
            return jnp.where(keep, x / (1 - rate), 0)

        e = weights["embeddings"]
        position = e["position"][c.first_position : c.first_position + time]
        # A batch may be padded to more than `longest`; there is no text out there.
        position = jnp.pad(position, ((0, time - position.shape[0]), (0, 0)))
        if "type" in e:
            position = position + e["type"][:1]
        x = drop(_norm(jnp.take(e["word"], tokens, axis=0) + position[None], e["norm"], c.layer_norm_eps), 0)
        scale = 1 / math.sqrt(c.hidden_size // c.num_attention_heads)
        relative = None
        if "relative" in weights:
            relative = jnp.moveaxis(jnp.take(weights["relative"], relative_buckets(time), axis=0), -1, 0)[None]

        def block(x: jax.Array, layer: tuple[dict[str, Any], jax.Array]) -> tuple[jax.Array, None]:
            w, site = layer
            q, k, v = (
                jnp.einsum("bth,hnk->btnk", x, w[name]["kernel"]) + w[name]["bias"][None, None] for name in "qkv"
            )
            logits = jnp.einsum("btnk,bsnk->bnts", q, k, preferred_element_type=jnp.float32) * scale
            if relative is not None:
                logits = logits + relative
            logits = jnp.where(mask[:, None, None, :], logits, jnp.finfo(logits.dtype).min)
            weight = drop(jax.nn.softmax(logits, axis=-1), 3 * site + 1, attention_dropout).astype(x.dtype)
            attended = jnp.einsum("bnts,bsnk->btnk", weight, v)
            y = jnp.einsum("btnk,nkh->bth", attended, w["o"]["kernel"]) + w["o"]["bias"][None, None]
            if c.architecture != "distilbert":
                y = drop(y, 3 * site + 2)
            x = _norm(x + y, w["attention_norm"], c.layer_norm_eps)
            y = jnp.einsum("bth,hf->btf", x, w["up"]["kernel"]) + w["up"]["bias"][None, None]
            y = jnp.einsum("btf,fh->bth", jax.nn.gelu(y, approximate=False), w["down"]["kernel"])
            y = drop(y + w["down"]["bias"][None, None], 3 * site + 3)
            return _norm(x + y, w["mlp_norm"], c.layer_norm_eps), None

        with jax.named_scope("text_encoder"):
            x, _ = jax.lax.scan(block, x, (weights["layers"], jnp.arange(c.num_hidden_layers)))
        return pool(x.astype(jnp.float32), mask, c)


def pool(
    hidden: Float[Array, "batch time h"], mask: Bool[Array, "batch time"], c: EncoderConfig
) -> Float[Array, "batch h"]:
    """Q from the last hidden states. A row without any token gives 0 (mean), and no gradient."""
    if c.pooling == "cls":
        Q = hidden[:, 0]
    else:
        weight = mask.astype(hidden.dtype)[..., None]
        Q = jnp.sum(hidden * weight, axis=1) / jnp.maximum(jnp.sum(weight, axis=1), 1e-9)
    if not c.normalize:
        return Q
    # max(|Q|, 1e-12), written so that the gradient at Q = 0 is 0 and not NaN
    return Q / jnp.sqrt(jnp.maximum(jnp.sum(Q * Q, axis=-1, keepdims=True), 1e-24))
