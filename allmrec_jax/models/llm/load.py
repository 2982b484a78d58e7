"""Loads a frozen LLM and its tokenizer from a folder: Hugging Face safetensors or `.bin` files, or one GGUF file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from allmrec_jax.errors import UserError
from allmrec_jax.models import params, streaming
from allmrec_jax.models.llm import gguf_file, opt, quantize
from allmrec_jax.models.llm.architectures import MODULES, read_config
from allmrec_jax.models.llm.quantize import FLOAT32, Precision
from allmrec_jax.models.llm.tokenizer import Tokenizer, from_folder, from_gguf
from allmrec_jax.models.params import AXIS_RULES, FULLY_SHARDED
from allmrec_jax.models.tensor_files import Renamed, tensors


@dataclass(frozen=True)
class FrozenLLM:
    """A model taken apart: `nnx.merge(graph, weights)` inside a jitted function gives the module back.

    `weights` is an argument of every step, never part of a training state.
    """

    graph: Any
    weights: Any
    config: Any
    tokenizer: Tokenizer | None
    precision: Precision = FLOAT32
    rules: Mapping[str, str] = field(default_factory=lambda: AXIS_RULES)
    """Which mesh axis cuts which logical axis of the weights."""

    @property
    def width(self) -> int:
        """h, the width of the token embedding, where O_u and O_i are injected."""
        return self.config.width

    @property
    def context(self) -> int:
        """The longest sequence that the model reads."""
        return self.config.context

    def describe(self) -> dict[str, Any]:
        """The description of `weights["weights"]`, as they are kept."""
        return quantize.describe(MODULES[type(self.config)].describe(self.config), self.precision)

    def shardings(self, mesh: jax.sharding.Mesh) -> Any:
        """Of `weights`, cut over a mesh."""
        return {"weights": params.shardings(self.describe(), mesh, self.rules)}

    def parameters(self) -> int:
        """How many parameters the model has, however they are kept."""
        return params.count(MODULES[type(self.config)].describe(self.config))


def build(
    config: Any,
    weights: Any,
    tokenizer: Tokenizer | None,
    *,
    mesh: jax.sharding.Mesh | None = None,
    precision: Precision = FLOAT32,
    rules: Mapping[str, str] = AXIS_RULES,
) -> FrozenLLM:
    """The module built abstractly around `weights` (kept in `precision`), placed on the mesh by their logical axes."""
    llm = FrozenLLM(_graph(config, precision), {"weights": weights}, config, tokenizer, precision, rules)
    if mesh is None:
        return replace(llm, weights=jax.tree.map(jnp.asarray, llm.weights))
    return replace(llm, weights=jax.tree.map(jax.device_put, llm.weights, llm.shardings(mesh)))


def abstract(config: Any, precision: Precision, rules: Mapping[str, str] = AXIS_RULES) -> FrozenLLM:
    """A model of which only the shapes are there: its weights are `jax.ShapeDtypeStruct`s."""
    llm = FrozenLLM(_graph(config, precision), None, config, None, precision, rules)
    return replace(llm, weights={"weights": params.shapes(llm.describe())})


def _graph(config: Any, precision: Precision) -> Any:
    module = MODULES[type(config)]
    return nnx.split(nnx.eval_shape(lambda: module(config, jax.random.key(0), precision)))[0]


def load_llm(
    folder: Path,
    *,
    dtype: Any = jnp.float32,
    mesh: jax.sharding.Mesh | None = None,
    rules: Mapping[str, str] = AXIS_RULES,
) -> FrozenLLM:
    """Reads `folder` (or a single `.gguf` file), tensor by tensor, straight to its devices and its precision.

    Args:
      dtype: of the weights: a float dtype or its name, `auto`, `int8` or `int4` (see `quantize`).
      mesh: cuts the weights by their logical axes.
      rules: which mesh axis cuts which logical axis.

    Raises:
      UserError: if there is no model, its architecture is unknown, its tensors do not fit, it and its tokenizer are
        not of one model, the mesh does not divide its heads, or the devices have too little memory for it.
    """
    folder, precision = Path(folder), quantize.precision(dtype)
    ggufs = [folder] if folder.suffix == ".gguf" else sorted(folder.glob("*.gguf"))
    try:
        if (folder / "config.json").is_file():
            raw = json.loads((folder / "config.json").read_text())
            config = read_config(raw, str(folder))
            tokenizer = from_folder(folder, raw)
            found: Mapping[str, Any] = Renamed(tensors(folder), opt.plain_name, str(folder))
        elif ggufs:
            fields, found, config = gguf_file.read(ggufs[0])
            tokenizer = from_gguf(fields)
        else:
            raise UserError(f"{folder} holds no model: neither config.json with its weights nor a .gguf file")
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise UserError(f"{folder}: the model's config is damaged or lacks {error}") from error
    tokenizer.check_fits(config.vocab_size, str(folder))
    check_mesh(config, mesh, str(folder))
    check_memory(config, precision, mesh, rules, str(folder))

    def ignore(name: str) -> bool:
        tied = name == "lm_head.weight" and config.tie_word_embeddings
        return tied or "rotary_emb" in name or name == gguf_file.DIVISORS

    described = MODULES[type(config)].describe(config)
    kept = quantize.describe(described, precision)
    tree = streaming.load(described, found, kept, precision, mesh=mesh, rules=rules, ignore=ignore, source=str(folder))
    return FrozenLLM(_graph(config, precision), {"weights": tree}, config, tokenizer, precision, rules)


def check_mesh(config: Any, mesh: params.AnyMesh | None, source: str) -> None:
    """Raises `UserError` unless the mesh divides the model's heads."""
    parts, heads = 1 if mesh is None else mesh.shape.get("model", 1), config.num_attention_heads
    if heads % parts:
        fitting = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise UserError(f"{source}: {heads} heads cannot be cut over {parts} devices; set devices.model to {fitting}")


def memory_limit(device: Any) -> int | None:
    """Bytes that a device has for arrays, where it says so."""
    try:
        return (device.memory_stats() or {}).get("bytes_limit")
    except (jax.errors.JaxRuntimeError, NotImplementedError):
        return None


def check_memory(
    config: Any, how: Precision, mesh: jax.sharding.Mesh | None, rules: Mapping[str, str], source: str
) -> None:
    """That the weights alone fit the devices, before any is read.

    Raises:
      UserError: saying what is needed, what there is, and which changes of the config would do.
    """
    devices = [jax.devices()[0]] if mesh is None else list(mesh.devices.flat)
    limits = [limit for device in devices if (limit := memory_limit(device)) is not None]
    if not limits:
        return
    described, shape = MODULES[type(config)].describe(config), {} if mesh is None else dict(mesh.shape)

    def need(how: Precision, shape: dict[str, int], rules: Mapping[str, str]) -> float:
        sizes = jax.sharding.AbstractMesh(tuple(shape.values()), tuple(shape))
        return params.bytes_per_device(quantize.describe(described, how), sizes, rules)

    least, needed = min(limits), need(how, shape, rules)
    if needed <= least:
        return
    options = [
        (f"llm.dtype {name}", need(Precision(name, how.compute), shape, rules))
        for name in quantize.QUANTISED
        if how.weights not in quantize.QUANTISED[: quantize.QUANTISED.index(name) + 1]
    ]
    for parts in range(shape.get("model", 1) + 1, len(jax.devices()) + 1):
        bytes_ = need(how, {"data": max(1, len(jax.devices()) // parts), "model": parts}, rules)
        if config.num_attention_heads % parts == 0 and bytes_ <= least:
            options.append((f"devices.model {parts}", bytes_))
            break
    if shape.get("data", 1) > 1 and rules != FULLY_SHARDED:
        options.append(("devices.shard_weights", need(how, shape, FULLY_SHARDED)))
    enough = [f"{change} ({bytes_ / 2**30:.1f} GiB)" for change, bytes_ in options if bytes_ <= least]
    raise UserError(
        f"{source}: its weights take {needed / 2**30:.1f} GiB a device ({how.weights}), but each has "
        f"{least / 2**30:.1f} GiB; {'set ' + ' or '.join(enough) if enough else 'use more devices or a smaller LLM'}"
    )
