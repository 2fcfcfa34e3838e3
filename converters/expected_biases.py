"""Which modules have biases in the models of a configuration, in transformers' classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from converters.config_reader import ConfigReader
from converters.models import Model

ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_output")
FEED_FORWARD = ("ffn_gate", "ffn_up", "ffn_down")
"""Modules, as GGUF calls them within a layer."""

BY_ATTENTION_BIAS = frozenset(
    {"llama", "granite", "smollm3", "qwen3", "qwen3moe", "gemma", "gemma2", "gemma3", "olmo2"}
)
BY_MLP_BIAS = frozenset({"llama", "granite", "smollm3"})
"""Architectures whose classes go by the key of config.json that is called so."""

WITHOUT_KEYS = frozenset({"MistralForCausalLM", "MixtralForCausalLM"})
"""Of llama's classes, those that know no such keys and have no biases."""


_QKV = frozenset(ATTENTION[:3])
IN_LLAMA_CPP: Mapping[str, frozenset[str]] = {
    **dict.fromkeys(("llama", "mistral3", "granite"), frozenset({*ATTENTION, *FEED_FORWARD})),
    **dict.fromkeys(("qwen2", "qwen3", "qwen2moe", "qwen3moe", "gemma", "gemma2", "gemma3", "olmo2", "smollm3"), _QKV),
    "phi3": frozenset({"attn_qkv"}),
}
"""By architecture, what llama.cpp's loader looks for beside a weight; it refuses a file with other tensors."""


def expected_biases(model: Model, config: Mapping[str, Any]) -> frozenset[str]:
    """The modules of each layer that must have a bias, as GGUF calls them; as far as classes are known.

    Args:
        model: in GGUF's layout.

    Raises:
        FormatError: a key is neither true nor false.
    """
    reader, name = ConfigReader(config, model.described_by), model.architecture
    if name == "qwen2" or (name == "qwen2moe" and reader.flag("qkv_bias", default=True)):
        return _QKV
    if model.model_class in WITHOUT_KEYS:
        return frozenset()
    found: set[str] = set()
    if name in BY_ATTENTION_BIAS and reader.flag("attention_bias", default=False):
        found.update(ATTENTION)
    if name in BY_MLP_BIAS and reader.flag("mlp_bias", default=False):
        found.update(FEED_FORWARD)
    return frozenset(found)
