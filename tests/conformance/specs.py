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
        settings: beside or in the place of `COMMON`; None leaves a common one out, and is the value of any other.
        vision: of a composite model, whose text half the settings are then.
        targets: the names of all linear modules.
        parameters: of a mixture of experts: what PEFT adapts as parameters, `target_parameters`.
    """

    config: str
    model: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    vision: Mapping[str, Any] | None = None
    targets: Sequence[str] = PROJECTIONS
    parameters: Sequence[str] = ()

    @property
    def linear(self) -> str | list[str]:
        """PEFT's `target_modules` for all linear modules of the text half."""
        if self.vision is None:
            return list(self.targets)
        return rf".*language_model.*\.({'|'.join(self.targets)})"

    def options(self) -> dict[str, Any]:
        """What the configuration class is called with."""
        left_out = {key for key in COMMON if key in self.settings and self.settings[key] is None}
        found = {key: value for key, value in {**COMMON, **self.settings}.items() if key not in left_out}
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

EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
_MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2}
# Twice the experts' width is not the model's, so that no matrix of a pair fits where another belongs.
_QWEN_MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
_DEEPSEEK = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 40,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
# PEFT takes names that end in gate_proj and the like for those of experts, so that these go by their parameters.
_DEEPSEEK_PARAMETERS = (
    *EXPERTS,
    "mlp.gate.weight",
    *(f"{block}.{kind}_proj.weight" for block in ("mlp", "shared_experts") for kind in ("gate", "up", "down")),
)

MIXTURES: Mapping[str, Spec] = {
    "mixtral": Spec(
        "MixtralConfig", "MixtralForCausalLM", _MIXTURE, targets=ATTENTION, parameters=(*EXPERTS, "gate.weight")
    ),
    "qwen2moe": Spec(
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        {**_QWEN_MIXTURE, "shared_expert_intermediate_size": 48},
        targets=(*PROJECTIONS, "shared_expert_gate"),
        parameters=(*EXPERTS, "mlp.gate.weight"),
    ),
    "qwen3moe": Spec(
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {**_QWEN_MIXTURE, "head_dim": 32, "norm_topk_prob": True},
        targets=ATTENTION,
        parameters=(*EXPERTS, "mlp.gate.weight"),
    ),
    "granitemoe": Spec(
        "GraniteMoeConfig",
        "GraniteMoeForCausalLM",
        {**_MIXTURE, "embedding_multiplier": 2.0, "attention_multiplier": 0.3, "residual_multiplier": 0.7,
         "logits_scaling": 2.0},
        targets=ATTENTION,
        parameters=(*EXPERTS, "router.weight"),
    ),
    "granitemoe-shared": Spec(
        "GraniteMoeSharedConfig",
        "GraniteMoeSharedForCausalLM",
        {**_MIXTURE, "shared_intermediate_size": 48},
        targets=(*ATTENTION, "input_linear", "output_linear"),
        parameters=(*EXPERTS, "router.weight"),
    ),
    "gpt-oss": Spec(
        "GptOssConfig",
        "GptOssForCausalLM",
        {**_MIXTURE, "head_dim": 16, "sliding_window": 4,
         "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        targets=ATTENTION,
        parameters=(*EXPERTS, "router.weight"),
    ),
    # Of DeepSeek's attention llama.cpp looks for pairs at its output alone.
    "deepseek2": Spec(
        "DeepseekV2Config",
        "DeepseekV2ForCausalLM",
        {**_DEEPSEEK, "topk_method": "greedy"},
        targets=("o_proj",),
        parameters=_DEEPSEEK_PARAMETERS,
    ),
    # Without q_lora_rank llama.cpp loads the two published sizes alone. Gate and up together are square.
    "deepseek2-lite": Spec(
        "DeepseekV2Config",
        "DeepseekV2ForCausalLM",
        {**_DEEPSEEK, "topk_method": "greedy", "q_lora_rank": None, "moe_intermediate_size": 32},
        targets=("o_proj",),
        parameters=_DEEPSEEK_PARAMETERS,
    ),
    "deepseek3": Spec(
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        # Published files have the scoring function, which transformers 5 no longer writes.
        {**_DEEPSEEK, "scoring_func": "sigmoid"},
        targets=("o_proj",),
        parameters=_DEEPSEEK_PARAMETERS,
    ),
}  # fmt: skip
"""Mixtures of experts, on which `test_mixtures` runs."""

SPECS = {**THOROUGH, **MORE, **MIXTURES}
