"""Loads a frozen LLM and its tokenizer from a folder: Hugging Face safetensors or `.bin` files, or one GGUF file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
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
) -> FrozenLLM:
    """The module built abstractly around `weights` (kept in `precision`), placed on the mesh by their logical axes."""
    llm = FrozenLLM(_graph(config, precision), {"weights": weights}, config, tokenizer, precision)
    if mesh is not None:
        weights = jax.tree.map(jax.device_put, weights, params.shardings(llm.describe(), mesh))
    else:
        weights = jax.tree.map(jnp.asarray, weights)
    return FrozenLLM(llm.graph, {"weights": weights}, config, tokenizer, precision)


def _graph(config: Any, precision: Precision) -> Any:
    module = MODULES[type(config)]
    return nnx.split(nnx.eval_shape(lambda: module(config, jax.random.key(0), precision)))[0]


def load_llm(folder: Path, *, dtype: Any = jnp.float32, mesh: jax.sharding.Mesh | None = None) -> FrozenLLM:
    """Reads `folder` (or a single `.gguf` file), tensor by tensor, straight to its devices and its precision.

    Args:
      dtype: of the weights: a float dtype or its name, `auto`, `int8` or `int4` (see `quantize`).
      mesh: cuts the weights by their logical axes.

    Raises:
      UserError: if there is no model, its architecture is unknown, its tensors do not fit, it and its tokenizer are
        not of one model, or the mesh does not divide its heads.
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
    _check_mesh(config, mesh, str(folder))

    def ignore(name: str) -> bool:
        tied = name == "lm_head.weight" and config.tie_word_embeddings
        return tied or "rotary_emb" in name or name == gguf_file.DIVISORS

    described = MODULES[type(config)].describe(config)
    kept = quantize.describe(described, precision)
    tree = streaming.load(described, found, kept, precision, mesh=mesh, ignore=ignore, source=str(folder))
    return FrozenLLM(_graph(config, precision), {"weights": tree}, config, tokenizer, precision)


def _check_mesh(config: Any, mesh: jax.sharding.Mesh | None, source: str) -> None:
    parts, heads = 1 if mesh is None else mesh.shape.get("model", 1), config.num_attention_heads
    if heads % parts:
        fitting = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise UserError(f"{source}: {heads} heads cannot be cut over {parts} devices; set devices.model to {fitting}")
