"""Configurations of every family that is converted, in the variants that its keys depend on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from published_configs import PUBLISHED

Config = Mapping[str, Any]

_SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
_LLAMA3_ALONE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3 = {**_LLAMA3_ALONE, "original_max_position_embeddings": 8192}
_LINEAR = {"type": "linear", "factor": 4.0}
_YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
_MANY_YARN = {"rope_type": "yarn", "factor": 8, "original_max_position_embeddings": 4096, "extrapolation_factor": 1.5,
              "attention_factor": 0.7, "beta_fast": 32, "beta_slow": 1.0}  # fmt: skip
_DYNAMIC = {"type": "dynamic", "factor": 2.0}

_CLASSES = {
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "mixtral": "MixtralForCausalLM",
    "smollm3": "SmolLM3ForCausalLM", "granite": "GraniteForCausalLM", "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM", "qwen2_moe": "Qwen2MoeForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM",
    "gemma": "GemmaForCausalLM", "gemma2": "Gemma2ForCausalLM", "gemma3_text": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM", "olmo2": "Olmo2ForCausalLM", "olmo3": "Olmo3ForCausalLM",
}  # fmt: skip
FAMILY = {
    "gemma2": {"query_pre_attn_scalar": 16, "head_dim": 16},
    "gemma3_text": {"query_pre_attn_scalar": 16, "head_dim": 16},
    "qwen3_moe": {"norm_topk_prob": True},
}
"""What llama.cpp has built in and the classes' defaults are not."""


def config(kind: str, **settings: Any) -> dict[str, Any]:
    """A configuration of a `model_type`; a setting of None is left out, `...` is null."""
    given = {"model_type": kind, "architectures": [_CLASSES[kind]], **_SIZES, **FAMILY.get(kind, {}), **settings}
    return {key: None if value is ... else value for key, value in given.items() if value is not None}


_FLAT = [kind for kind in _CLASSES if kind not in ("gemma", "gemma2", "gemma3_text", "phi3", "olmo3")]
_BY_LAYER = ("gemma3_text", "olmo3")


def _of_all(kind: str) -> dict[str, Config]:
    """What each family has variants of."""
    return {
        f"{kind} as left to the defaults": config(kind),
        f"{kind}, fewer keys": config(kind, num_key_value_heads=2),
        f"{kind}, as many keys": config(kind, num_key_value_heads=4),
        f"{kind}, all said": config(
            kind, num_key_value_heads=1, rms_norm_eps=1e-5, max_position_embeddings=4096, vocab_size=333,
            tie_word_embeddings=True, torch_dtype="float16"),
        f"{kind}, causal or not": config(kind, is_causal=kind in ("gemma", "gemma2", "phi3")),
    }  # fmt: skip


def _flat(kind: str) -> dict[str, Config]:
    """Rotations of families whose layers all rotate alike, in both dialects."""
    return {
        f"{kind}, base": config(kind, rope_theta=500000),
        f"{kind}, base in settings": config(
            kind, rope_parameters={"rope_type": "default", "rope_theta": 12345.678}, dtype="bfloat16"),
        f"{kind}, no scaling": config(kind, rope_scaling=..., rope_theta=1e6),
        f"{kind}, linear": config(kind, rope_scaling=_LINEAR, rope_theta=1e6),
        f"{kind}, linear in settings": config(
            kind, rope_parameters={"rope_type": "linear", "factor": 3, "rope_theta": 1e6}),
        f"{kind}, yarn": config(kind, rope_scaling=_YARN, max_position_embeddings=4096),
        f"{kind}, yarn with everything": config(kind, rope_scaling=_MANY_YARN, max_position_embeddings=32768),
        f"{kind}, yarn in settings": config(
            kind, rope_parameters={**_MANY_YARN, "rope_theta": 2e5}, max_position_embeddings=32768),
        f"{kind}, yarn without the original": config(kind, rope_scaling={"type": "yarn", "factor": 2.0}),
        f"{kind}, dynamic": config(kind, rope_scaling=_DYNAMIC),
    }  # fmt: skip


def _head_sizes(kind: str) -> dict[str, Config]:
    return {
        f"{kind}, large heads": config(kind, head_dim=32, query_pre_attn_scalar=32 if kind in FAMILY else None),
    }


def _llama3(kind: str) -> dict[str, Config]:
    scaled = {**_LLAMA3, "factor": 32.0, "rope_theta": 500000.0}
    return {
        f"{kind}, llama3": config(kind, rope_scaling=_LLAMA3, rope_theta=500000.0, head_dim=128),
        f"{kind}, llama3 in settings": config(kind, rope_parameters=scaled, head_dim=64),
        f"{kind}, llama3 by the width": config(
            kind, rope_parameters={**scaled, "factor": 3}, hidden_size=1024, num_attention_heads=8),
        f"{kind}, llama3 without the original": config(
            kind, rope_scaling={**_LLAMA3_ALONE, "low_freq_factor": 0.7}, head_dim=80, max_position_embeddings=2000),
    }  # fmt: skip


def _by_layer(kind: str) -> dict[str, Config]:
    groups = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6},
              "sliding_attention": {"rope_type": "default", "rope_theta": 20000.0}}  # fmt: skip
    return {
        f"{kind}, window": config(kind, sliding_window=512),
        f"{kind}, base": config(kind, rope_theta=123456, sliding_window=8),
        f"{kind}, linear": config(kind, rope_scaling={"rope_type": "linear", "factor": 8.0}),
        f"{kind}, yarn": config(kind, rope_scaling=_MANY_YARN, max_position_embeddings=32768),
        f"{kind}, settings": config(kind, rope_parameters=groups),
        f"{kind}, half the settings": config(kind, rope_parameters={"full_attention": groups["full_attention"]}),
    }


def _phi() -> dict[str, Config]:
    short, long = [1.0 + 0.1 * n for n in range(8)], [1.5 * n + 1 for n in range(8)]
    scaled = {"short_factor": short, "long_factor": long}
    sizes = {"max_position_embeddings": 131072, "original_max_position_embeddings": 4096}
    return {
        **{f"phi3, {kind}": config("phi3", rope_scaling={"type": kind, **scaled}, **sizes, num_key_value_heads=4,
                                   rms_norm_eps=1e-5, rope_theta=10000.0) for kind in ("longrope", "su", "yarn")},
        "phi3, longrope in settings": config(
            "phi3", rope_parameters={"rope_type": "longrope", "rope_theta": 5e5, **scaled}, **sizes),
        "phi3, longrope of a part": config(
            "phi3", rope_scaling={"type": "longrope", "short_factor": short[:6], "long_factor": long[:6]},
            partial_rotary_factor=0.75, sliding_window=2047, **sizes),
        "phi3, longrope that stretches nothing": config(
            "phi3", rope_scaling={"type": "longrope", **scaled}, max_position_embeddings=4096),
        "phi3, plain": config("phi3", sliding_window=..., rope_theta=250000, max_position_embeddings=16384,
                              original_max_position_embeddings=16384),
    }  # fmt: skip


def _others() -> dict[str, Config]:
    text = {key: value for key, value in config("gemma3_text").items() if key != "architectures"}
    both = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]}
    kinds = ["sliding_attention", "full_attention"] * 2
    mixture = {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
    return {
        "gemma3 with images": {**both, "text_config": {**text, "sliding_window": 1024}},
        "gemma3 with images, scaled": {
            **both, "text_config": {**text, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}},
        "gemma3, no windows": config("gemma3_text", sliding_window_pattern=1),
        "gemma3, softcap": config("gemma3_text", final_logit_softcapping=30.0),
        "gemma3, local base": config("gemma3_text", rope_theta=1e6, rope_local_base_freq=9999),
        "gemma2, softcaps": config("gemma2", attn_logit_softcapping=7.0, final_logit_softcapping=0.1, sliding_window=77,
                                   layer_types=kinds),
        "gemma, gelu": config("gemma", hidden_act="gelu", hidden_activation=..., head_dim=64),
        "olmo3, layers": config("olmo3", layer_types=kinds, sliding_window=9),
        "granite, scales": config("granite", attention_multiplier=0.0078125, embedding_multiplier=12,
                                  residual_multiplier=0.22, logits_scaling=8.0, head_dim=16),
        "mixtral, experts": config("mixtral", num_local_experts=5, num_experts_per_tok=1),
        "qwen2_moe, experts": config("qwen2_moe", shared_expert_intermediate_size=40, **mixture),
        "qwen3_moe, experts": config("qwen3_moe", **mixture),
        "qwen3_moe, experts as transformers 5 writes": config(
            "qwen3_moe", num_local_experts=7, num_experts_per_tok=2, head_dim=32),
        "qwen3_moe, shared expert": config("qwen3_moe", shared_expert_intermediate_size=40),
        "qwen3_moe, shared expert of nothing": config("qwen3_moe", shared_expert_intermediate_size=0),
        "phi3, plain rotation of a part": config(
            "phi3", rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        "smollm3, layers": config("smollm3", no_rope_layers=[1, 1, 1, 0], no_rope_layer_interval=4),
        "qwen2, windows": config("qwen2", use_sliding_window=True, sliding_window=16, max_window_layers=2),
        **{f"{kind}, heads of null": config(kind, head_dim=...) for kind in ("llama", "mistral", "mixtral")},
        "mistral, window": config("mistral", sliding_window=4096),
    }  # fmt: skip


def _published() -> dict[str, Config]:
    """What `published_configs` has of these families, completed where shapes don't need it and llama.cpp does."""
    more: dict[str, Config] = {
        "Gemma 2 27B": {"query_pre_attn_scalar": 144},
        "Gemma 3 27B": {"query_pre_attn_scalar": 168},
        "Qwen 3 30B A3B": {"norm_topk_prob": True},
    }
    known = {*_CLASSES.values(), "Gemma3ForConditionalGeneration"}
    return {
        name: {**({"model_type": "gemma3"} if "text_config" in found.config else {}), **found.config,
               **more.get(name, {})}
        for name, found in PUBLISHED.items() if found.config["architectures"][0] in known
    }  # fmt: skip


CONFIGS: Mapping[str, Config] = {
    **{name: found for kind in _CLASSES for name, found in _of_all(kind).items()},
    **{name: found for kind in _FLAT for name, found in _flat(kind).items()},
    **{name: found for kind in _BY_LAYER for name, found in _by_layer(kind).items()},
    **{name: found for kind in ("llama", "mistral", "mixtral") for name, found in _llama3(kind).items()},
    **{name: found for kind in ("llama", "mistral", "mixtral", "smollm3", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe")
       for name, found in _head_sizes(kind).items()},
    **_phi(),
    **_others(),
    **_published(),
}  # fmt: skip
