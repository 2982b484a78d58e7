"""The frozen LLM of the baseline: transformers' own."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from allmrec_jax.models.llm import llama
from allmrec_jax.torch_baseline.weights import load


def in_transformers(c: llama.LlamaConfig, tree: Any, attention: str = "sdpa") -> nn.Module:
    """`LlamaForCausalLM` with our weights, without dropout. Only plain Llamas: no biases, no scaled rotation.

    Args:
      attention: its `attn_implementation`.
    """
    import transformers

    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
    names += ("num_key_value_heads", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings")
    plain = {name: value for name, value in dataclasses.asdict(c).items() if name in names}
    config = transformers.LlamaConfig(
        **plain,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        attn_implementation=attention,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    more = {"lm_head.weight": np.asarray(tree["embed"])} if c.tie_word_embeddings else {}
    return load(transformers.LlamaForCausalLM(config), llama.describe(c), tree, **more).eval()


def from_folder(folder: Path) -> nn.Module:
    """The causal LM that transformers reads from a folder, in float32 and without dropout."""
    import transformers

    transformers.utils.logging.disable_progress_bar()  # it would write among the errors
    return transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
