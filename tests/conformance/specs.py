"""Which small models transformers makes for the tests: one of every class in the tables, with what sets it apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
PROJECTIONS = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
PHI = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
FALCON = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")

COMMON: Mapping[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
YARN: Mapping[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
SMALL_VISION: Mapping[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


@dataclass(frozen=True)
class Spec:
    """One model class and its configuration.

    Attributes:
        settings: beside or in the place of `COMMON`; None leaves a common one out.
        vision: of a composite model, whose text half the settings are then.
        targets: the names of all linear modules.
    """

    config: str
    model: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    vision: Mapping[str, Any] | None = None
    targets: Sequence[str] = PROJECTIONS

    @property
    def linear(self) -> str | list[str]:
        """PEFT's `target_modules` for all linear modules of the text half."""
        if self.vision is None:
            return list(self.targets)
        return rf".*language_model.*\.({'|'.join(self.targets)})"

    def options(self) -> dict[str, Any]:
        """What the configuration class is called with."""
        found = {key: value for key, value in {**COMMON, **self.settings}.items() if value is not None}
        if self.vision is None:
            return found
        return {
            "text_config": found,
            "vision_config": dict(self.vision),
            "tie_word_embeddings": found["tie_word_embeddings"],
        }


THOROUGH: Mapping[str, Spec] = {
    "llama": Spec("LlamaConfig", "LlamaForCausalLM"),
    "qwen2": Spec("Qwen2Config", "Qwen2ForCausalLM"),
    # heads wider than hidden / heads, as the small Qwen 3 models have them
    "qwen3": Spec("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 32}),
}
"""What every test of this directory runs on."""

# Tied where llama.cpp has no place for an output matrix; windows shorter than the tests' ten tokens.
_GEMMA = {"head_dim": 32, "tie_word_embeddings": True}
_GEMMA2 = {**_GEMMA, "query_pre_attn_scalar": 32, "sliding_window": 4, "attn_logit_softcapping": 5.0,
           "final_logit_softcapping": 20.0}  # fmt: skip
_GEMMA3 = {**_GEMMA, "query_pre_attn_scalar": 32, "sliding_window": 4}
_FALCON = {"num_key_value_heads": None, "intermediate_size": None}

MORE: Mapping[str, Spec] = {
    "gemma2": Spec("Gemma2Config", "Gemma2ForCausalLM", _GEMMA2),
    "gemma3": Spec("Gemma3TextConfig", "Gemma3ForCausalLM", _GEMMA3),
    "phi3": Spec("Phi3Config", "Phi3ForCausalLM", targets=PHI),
    "granite": Spec(
        "GraniteConfig",
        "GraniteForCausalLM",
        {"embedding_multiplier": 2.0, "attention_multiplier": 0.3, "residual_multiplier": 0.7, "logits_scaling": 2.0},
    ),
    "olmo2": Spec("Olmo2Config", "Olmo2ForCausalLM"),
    "olmo3": Spec("Olmo3Config", "Olmo3ForCausalLM", {"sliding_window": 4}),
    "smollm3": Spec("SmolLM3Config", "SmolLM3ForCausalLM"),
    "ministral3": Spec("Ministral3Config", "Ministral3ForCausalLM", {"head_dim": 32, "rope_parameters": YARN}),
    "mistral3": Spec(
        "Mistral3Config",
        "Mistral3ForConditionalGeneration",
        {"model_type": "mistral"},
        {**SMALL_VISION, "head_dim": 16},
    ),
    "gemma": Spec("GemmaConfig", "GemmaForCausalLM", _GEMMA),
    "gemma3-vision": Spec("Gemma3Config", "Gemma3ForConditionalGeneration", _GEMMA3, SMALL_VISION),
    "command-r": Spec("CohereConfig", "CohereForCausalLM", {"tie_word_embeddings": True, "logit_scale": 0.5}),
    "cohere2": Spec(
        "Cohere2Config",
        "Cohere2ForCausalLM",
        # Upstream can't do without rotary_pct, which today's transformers no longer writes.
        {"tie_word_embeddings": True, "logit_scale": 0.5, "sliding_window": 4, "rotary_pct": 1.0},
    ),
    "stablelm": Spec("StableLmConfig", "StableLmForCausalLM", {"use_qkv_bias": True}),
    "glm4": Spec("Glm4Config", "Glm4ForCausalLM", {"head_dim": 32}, targets=(*ATTENTION, "gate_up_proj", "down_proj")),
    "falcon": Spec(
        "FalconConfig",
        "FalconForCausalLM",
        {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
        targets=FALCON,
    ),
    # Falcon 7B's form; transformers would save num_kv_heads as 4, which means nothing and ends upstream's converter.
    "falcon-7b": Spec("FalconConfig", "FalconForCausalLM", {**_FALCON, "num_kv_heads": 1}, targets=FALCON),
}
"""What the tests of the architectures' differences run on."""

SPECS = {**THOROUGH, **MORE}
