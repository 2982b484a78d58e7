"""Which architectures are known: what reads the `config.json` of each, and the module that its config describes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from allmrec_jax.errors import UserError
from allmrec_jax.models.llm import llama, opt
from allmrec_jax.models.llm.llama import Llama, LlamaConfig
from allmrec_jax.models.llm.module import LanguageModel
from allmrec_jax.models.llm.opt import OPT, OPTConfig

READERS: dict[str, Callable[[Mapping[str, Any], str], Any]] = {
    "OPTForCausalLM": opt.read_config,
    "LlamaForCausalLM": llama.read_config,
    "MistralForCausalLM": llama.read_config,
    "Qwen2ForCausalLM": llama.read_config,
    "Qwen3ForCausalLM": llama.read_config,
}
"""By the name that `architectures` of a `config.json` gives."""

MODULES: dict[type, type[LanguageModel]] = {OPTConfig: OPT, LlamaConfig: Llama}


def read_config(raw: Mapping[str, Any], source: str) -> Any:
    """The config of a model from its `config.json`.

    Raises:
      UserError: for an architecture that is not supported, naming it and the list, and for weights that are
        quantised already.
    """
    architecture = (raw.get("architectures") or [raw.get("model_type", "?")])[0]
    if architecture not in READERS:
        raise UserError(f"{source}: architecture {architecture} is not supported (known: {', '.join(READERS)})")
    if quantised := raw.get("quantization_config"):
        method = quantised.get("quant_method", "an unknown method")
        raise UserError(
            f"{source}: its weights are quantised ({method}); get the model's plain weights, or a GGUF file, and set "
            "llm.dtype to int8 or int4"
        )
    return READERS[architecture](raw, source)
