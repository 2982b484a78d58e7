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
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

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


def _mix(x: jax.Array) -> jax.Array:
    """A bijection of the 32-bit integers that changes each bit with probability 1/2 if any other one changes."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def kept(
    words: UInt32[Array, "*text 2"], site: int | Int[Array, ""], place: UInt32[Array, "*place"], rate: float
) -> Bool[Array, ...]:
    """What dropout keeps: each draw is a hash of its text's words, its site (where in the network) and its place there.

    So a text's masks depend neither on the row that it stands in nor on the texts beside it. Threefry, in its place,
    is ten times the operations and half of the time of compiling.

    Args:
      words: (..., 2), two of a text; place: of each number, within its text. Both broadcast, but for the 2.
    """
    of_site = _mix(words + jnp.asarray(site, jnp.uint32) * jnp.uint32(0x9E3779B9))
    return _mix(_mix(place ^ of_site[..., 0]) + of_site[..., 1]) >= jnp.uint32(round(rate * 2**32))


def layout(
    starts: Int[Array, "rows texts"], lengths: Int[Array, "rows texts"], time: int
) -> tuple[Int[Array, "rows {time}"], Int[Array, "rows {time}"], Bool[Array, "rows {time}"]]:
    """Of each place in rows of packed texts: which text it belongs to, the position in that text, and whether it does.

        starts 0 3, lengths 3 2, time 6      text 0 0 0 1 1 1     position 0 1 2 0 1 0     real 1 1 1 1 1 0

    Args:
      starts: ascending; of texts that are not there `time` or more.
    """
    at = jnp.arange(time)[None]
    text = jnp.maximum(jnp.sum(at[:, None] >= starts[:, :, None], axis=1) - 1, 0)
    position = at - jnp.take_along_axis(starts, text, axis=1)
    real = (position >= 0) & (position < jnp.take_along_axis(lengths, text, axis=1))
    return text, jnp.where(real, position, 0), real


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
        """Q of each text, in float32, one a row; padding stands on the right.

        Args:
          tokens: ids; what stands where `mask` is False is not read.
          mask: True at the tokens of the text, [CLS] and [SEP] among them.
          dropout_keys: one a row; they switch the encoder's own dropout on.
        """
        if tokens.shape[1] > self.config.max_position_embeddings:
            raise ValueError(f"{tokens.shape[1]} tokens, but the encoder has {self.config.longest} positions")
        lengths = jnp.sum(mask, axis=1)[:, None]
        keys = None if dropout_keys is None else dropout_keys[:, None]
        return self.packed(tokens, jnp.zeros_like(lengths), lengths, keys)[:, 0]

    def packed(
        self,
        tokens: Int[Array, "rows time"],
        starts: Int[Array, "rows texts"],
        lengths: Int[Array, "rows texts"],
        dropout_keys: Key[Array, "rows texts"] | None = None,
        *,
        remat: bool = False,
    ) -> Float[Array, "rows texts h"]:
        """Q of each text, in float32, where a row holds several; none sees another.

        Args:
          tokens: ids; what stands where there is no text is not read.
          starts, lengths: as in `layout`; without any token Q is 0 (mean).
          dropout_keys: one a text; they switch the encoder's own dropout on.
          remat: keep no layer's inner values for the gradient, but compute them again.
        """
        c, weights, time = self.config, nnx.as_pure(self.weights), tokens.shape[1]
        text, position, real = layout(starts, lengths, time)
        place = position.astype(jnp.uint32)
        if dropout_keys is not None:
            words = jax.vmap(jax.vmap(lambda key: jax.random.bits(key, (2,), jnp.uint32)))(dropout_keys)
            words = jnp.take_along_axis(words, text[:, :, None], axis=1)  # of each token

        def drop(x: jax.Array, site: jax.Array | int) -> jax.Array:
            if dropout_keys is None or c.dropout == 0:
                return x
            inner = (
                place[:, :, None] * jnp.uint32(c.hidden_size) + jnp.arange(c.hidden_size, dtype=jnp.uint32)[None, None]
            )
            return jnp.where(kept(words[:, :, None], site, inner, c.dropout), x / (1 - c.dropout), 0)

        def drop_weights(x: jax.Array, site: jax.Array) -> jax.Array:
            rate = c.dropout if c.attention_dropout is None else c.attention_dropout
            if dropout_keys is None or rate == 0:
                return x
            head = jnp.arange(c.num_attention_heads, dtype=jnp.uint32)[None, :, None, None]
            longest = jnp.uint32(c.max_position_embeddings)
            inner = (head * longest + place[:, None, :, None]) * longest + place[:, None, None, :]
            return jnp.where(kept(words[:, None, :, None], site, inner, rate), x / (1 - rate), 0)

        e = weights["embeddings"]
        x = jnp.take(e["word"], tokens, axis=0) + jnp.take(e["position"], position + c.first_position, axis=0)
        if "type" in e:
            x = x + e["type"][:1][None]
        x = drop(_norm(x, e["norm"], c.layer_norm_eps), 0)
        scale = 1 / math.sqrt(c.hidden_size // c.num_attention_heads)
        relative = None
        if "relative" in weights:
            relative = jnp.moveaxis(jnp.take(weights["relative"], relative_buckets(time), axis=0), -1, 0)[None]
        seen = (text[:, :, None] == text[:, None, :]) & real[:, None, :]

        def block(x: jax.Array, layer: tuple[dict[str, Any], jax.Array]) -> tuple[jax.Array, None]:
            w, site = layer
            q, k, v = (
                jnp.einsum("bth,hnk->btnk", x, w[name]["kernel"]) + w[name]["bias"][None, None] for name in "qkv"
            )
            logits = jnp.einsum("btnk,bsnk->bnts", q, k, preferred_element_type=jnp.float32) * scale
            if relative is not None:
                logits = logits + relative
            logits = jnp.where(seen[:, None], logits, jnp.finfo(logits.dtype).min)
            weight = drop_weights(jax.nn.softmax(logits, axis=-1), 3 * site + 1).astype(x.dtype)
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
            layer = jax.checkpoint(block, prevent_cse=False) if remat else block
            x, _ = jax.lax.scan(layer, x, (weights["layers"], jnp.arange(c.num_hidden_layers)))
        of_text = (text[:, None] == jnp.arange(starts.shape[1])[None, :, None]) & real[:, None]
        return pool(x.astype(jnp.float32), of_text, starts, c)


def pool(
    hidden: Float[Array, "rows time h"],
    of_text: Bool[Array, "rows texts time"],
    starts: Int[Array, "rows texts"],
    c: EncoderConfig,
) -> Float[Array, "rows texts h"]:
    """Q from the last hidden states. A text without any token gives 0 (mean), and no gradient."""
    if c.pooling == "cls":
        Q = jnp.take_along_axis(hidden, jnp.minimum(starts, hidden.shape[1] - 1)[:, :, None], axis=1)
    else:
        weight = of_text.astype(hidden.dtype)
        Q = jnp.einsum("rmt,rth->rmh", weight, hidden) / jnp.maximum(jnp.sum(weight, axis=2), 1e-9)[..., None]
    if not c.normalize:
        return Q
    # max(|Q|, 1e-12), written so that the gradient at Q = 0 is 0 and not NaN
    return Q / jnp.sqrt(jnp.maximum(jnp.sum(Q * Q, axis=-1, keepdims=True), 1e-24))
