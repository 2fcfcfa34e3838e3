"""What published models say of themselves, and the shapes of their weights: (out, in) as the checkpoints have them.

Configurations hold the keys that their files have and shapes depend on; what a file leaves out is left out here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Shapes = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Published:
    """One model.

    Attributes:
        config: `architectures` included.
        shapes: of the modules in layer 0, by their names in it; both sides follow from the configuration.
        by_width: of more such modules, of which it gives no more than the side that is the model's width.
    """

    config: Mapping[str, Any]
    shapes: Shapes
    by_width: Shapes


def _config(kind: str, architecture: str, numbers: tuple[int, ...], more: Mapping[str, Any]) -> dict[str, Any]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return {"model_type": kind, "architectures": [architecture], **dict(zip(names, numbers, strict=False)), **more}


def _plain(kind: str, architecture: str, numbers: tuple[int, ...], queries: int, keys: int, **more: Any) -> Published:
    """A dense decoder with matrices of their own; `numbers`: width, inner size, layers, heads, key-value heads."""
    width, inner = numbers[:2]
    shapes = {**_attention(width, queries, keys), "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width),
              "mlp.down_proj": (width, inner)}  # fmt: skip
    return Published(_config(kind, architecture, numbers, more), shapes, {})


def _attention(width: int, queries: int, keys: int) -> dict[str, tuple[int, int]]:
    names = {"q": (queries, width), "k": (keys, width), "v": (keys, width), "o": (width, queries)}
    return {f"self_attn.{name}_proj": shape for name, shape in names.items()}


def _inside(text: Mapping[str, Any], published: Published, architecture: str) -> Published:
    """A model of text and images, with what its text_config says."""
    config = {"architectures": [architecture], "text_config": dict(text)}
    return Published(config, published.shapes, published.by_width)


_LLAMA, _MISTRAL = "LlamaForCausalLM", "MistralForCausalLM"
_GEMMA3_4B_TEXT = {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
                   "num_hidden_layers": 34}  # fmt: skip
_SMALL_3_TEXT = {"model_type": "mistral", "hidden_size": 5120, "intermediate_size": 32768, "num_hidden_layers": 40,
                 "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}  # fmt: skip

DENSE: Mapping[str, Published] = {
    "Llama 3 8B": _plain("llama", _LLAMA, (4096, 14336, 32, 32, 8), 4096, 1024),
    "Llama 3.1 70B": _plain("llama", _LLAMA, (8192, 28672, 80, 64, 8), 8192, 1024),
    "Llama 3.2 1B": _plain("llama", _LLAMA, (2048, 8192, 16, 32, 8), 2048, 512, head_dim=64),
    "Llama 2 7B": _plain("llama", _LLAMA, (4096, 11008, 32, 32), 4096, 4096),
    "Mistral 7B": _plain("mistral", _MISTRAL, (4096, 14336, 32, 32, 8), 4096, 1024),
    "Mistral Nemo": _plain("mistral", _MISTRAL, (5120, 14336, 40, 32, 8), 4096, 1024, head_dim=128),
    "Mistral Small 3.1": _inside(_SMALL_3_TEXT, _plain("mistral", _MISTRAL, (5120, 32768), 4096, 1024),
                                 "Mistral3ForConditionalGeneration"),
    "Gemma 7B": _plain("gemma", "GemmaForCausalLM", (3072, 24576, 28, 16, 16), 4096, 4096, head_dim=256),
    "Gemma 2 2B": _plain("gemma2", "Gemma2ForCausalLM", (2304, 9216, 26, 8, 4), 2048, 1024, head_dim=256),
    "Gemma 2 9B": _plain("gemma2", "Gemma2ForCausalLM", (3584, 14336, 42, 16, 8), 4096, 2048, head_dim=256),
    "Gemma 2 27B": _plain("gemma2", "Gemma2ForCausalLM", (4608, 36864, 46, 32, 16), 4096, 2048, head_dim=128),
    "Gemma 3 1B": _plain("gemma3_text", "Gemma3ForCausalLM", (1152, 6912, 26, 4, 1), 1024, 256, head_dim=256),
    "Gemma 3 4B": _inside(_GEMMA3_4B_TEXT, _plain("gemma3_text", "Gemma3ForCausalLM", (2560, 10240), 2048, 1024),
                          "Gemma3ForConditionalGeneration"),
    "Gemma 3 27B": _plain("gemma3_text", "Gemma3ForCausalLM", (5376, 21504, 62, 32, 16), 4096, 2048, head_dim=128),
    "Qwen 2.5 0.5B": _plain("qwen2", "Qwen2ForCausalLM", (896, 4864, 24, 14, 2), 896, 128),
    "Qwen 2.5 7B": _plain("qwen2", "Qwen2ForCausalLM", (3584, 18944, 28, 28, 4), 3584, 512),
    "Qwen 3 0.6B": _plain("qwen3", "Qwen3ForCausalLM", (1024, 3072, 28, 16, 8), 2048, 1024, head_dim=128),
    "Qwen 3 32B": _plain("qwen3", "Qwen3ForCausalLM", (5120, 25600, 64, 64, 8), 8192, 1024, head_dim=128),
    "Granite 3.1 2B": _plain("granite", "GraniteForCausalLM", (2048, 8192, 40, 32, 8), 2048, 512),
    "Granite 3.1 8B": _plain("granite", "GraniteForCausalLM", (4096, 12800, 40, 32, 8), 4096, 1024),
    "Command R": _plain("cohere", "CohereForCausalLM", (8192, 22528, 40, 64, 64), 8192, 8192),
    "Command R+": _plain("cohere", "CohereForCausalLM", (12288, 33792, 64, 96, 8), 12288, 1024),
    "Command R7B": _plain("cohere2", "Cohere2ForCausalLM", (4096, 14336, 32, 32, 8), 4096, 1024),
    "OLMo 2 7B": _plain("olmo2", "Olmo2ForCausalLM", (4096, 11008, 32, 32, 32), 4096, 4096),
    "SmolLM3 3B": _plain("smollm3", "SmolLM3ForCausalLM", (2048, 11008, 36, 16, 4), 2048, 512),
    "StableLM 2 1.6B": _plain("stablelm", "StableLmForCausalLM", (2048, 5632, 24, 32, 32), 2048, 2048),
}  # fmt: skip

_FALCON = "FalconForCausalLM"

FUSED: Mapping[str, Published] = {
    "Phi 3 mini": Published(
        _config("phi3", "Phi3ForCausalLM", (3072, 8192, 32, 32, 32), {}),
        {"self_attn.qkv_proj": (9216, 3072), "self_attn.o_proj": (3072, 3072), "mlp.gate_up_proj": (16384, 3072),
         "mlp.down_proj": (3072, 8192)}, {}),
    "Phi 4": Published(
        _config("phi3", "Phi3ForCausalLM", (5120, 17920, 40, 40, 10), {}),
        {"self_attn.qkv_proj": (7680, 5120), "self_attn.o_proj": (5120, 5120), "mlp.gate_up_proj": (35840, 5120),
         "mlp.down_proj": (5120, 17920)}, {}),
    "GLM 4 9B": Published(
        _config("glm4", "Glm4ForCausalLM", (4096, 13696, 40, 32, 2), {"head_dim": 128}),
        {**_attention(4096, 4096, 256), "mlp.gate_up_proj": (27392, 4096), "mlp.down_proj": (4096, 13696)}, {}),
    "Falcon 7B": Published(
        {"architectures": [_FALCON], "model_type": "falcon", "hidden_size": 4544, "num_hidden_layers": 32,
         "num_attention_heads": 71, "num_kv_heads": 71, "multi_query": True, "new_decoder_architecture": False},
        {"self_attention.query_key_value": (4672, 4544), "self_attention.dense": (4544, 4544)},
        {"mlp.dense_h_to_4h": (18176, 4544), "mlp.dense_4h_to_h": (4544, 18176)}),
    "Falcon 40B": Published(
        {"architectures": [_FALCON], "model_type": "falcon", "hidden_size": 8192, "num_hidden_layers": 60,
         "num_attention_heads": 128, "num_kv_heads": 8, "multi_query": True, "new_decoder_architecture": True},
        {"self_attention.query_key_value": (9216, 8192), "self_attention.dense": (8192, 8192)},
        {"mlp.dense_h_to_4h": (32768, 8192), "mlp.dense_4h_to_h": (8192, 32768)}),
    "Falcon 2 11B": Published(
        {"architectures": [_FALCON], "model_type": "falcon", "hidden_size": 4096, "num_hidden_layers": 60,
         "num_attention_heads": 32, "num_kv_heads": 8, "ffn_hidden_size": 16384, "multi_query": True,
         "new_decoder_architecture": True},
        {"self_attention.query_key_value": (6144, 4096), "self_attention.dense": (4096, 4096),
         "mlp.dense_h_to_4h": (16384, 4096), "mlp.dense_4h_to_h": (4096, 16384)}, {}),
}  # fmt: skip


def _experts(module: str, names: str, width: int, inner: int) -> dict[str, tuple[int, int]]:
    gate, up, down = names.split()
    return {f"{module}.{gate}": (inner, width), f"{module}.{up}": (inner, width), f"{module}.{down}": (width, inner)}


_GATE_UP_DOWN = "gate_proj up_proj down_proj"
_LATENT = {"v_head_dim": 128, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "kv_lora_rank": 512}

MIXTURES: Mapping[str, Published] = {
    "Mixtral 8x7B": Published(
        _config("mixtral", "MixtralForCausalLM", (4096, 14336, 32, 32, 8), {"num_local_experts": 8}),
        {**_attention(4096, 4096, 1024), "block_sparse_moe.gate": (8, 4096),
         **_experts("block_sparse_moe.experts.7", "w1 w3 w2", 4096, 14336)}, {}),
    "Qwen 1.5 MoE A2.7B": Published(
        _config("qwen2_moe", "Qwen2MoeForCausalLM", (2048, 5632, 24, 16, 16), {
            "num_experts": 60, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632}),
        {**_attention(2048, 2048, 2048), "mlp.gate": (60, 2048),
         **_experts("mlp.experts.59", _GATE_UP_DOWN, 2048, 1408)},
        {**_experts("mlp.shared_expert", _GATE_UP_DOWN, 2048, 5632), "mlp.shared_expert_gate": (1, 2048)}),
    "Qwen 3 30B A3B": Published(
        _config("qwen3_moe", "Qwen3MoeForCausalLM", (2048, 6144, 48, 32, 4), {
            "head_dim": 128, "num_experts": 128, "moe_intermediate_size": 768}),
        {**_attention(2048, 4096, 512), "mlp.gate": (128, 2048),
         **_experts("mlp.experts.0", _GATE_UP_DOWN, 2048, 768)}, {}),
    "Granite 3.0 1B A400M": Published(
        _config("granitemoe", "GraniteMoeForCausalLM", (1024, 512, 24, 16, 8), {"num_local_experts": 32}),
        {**_attention(1024, 1024, 512), "block_sparse_moe.router.layer": (32, 1024),
         **_experts("block_sparse_moe.experts.31", _GATE_UP_DOWN, 1024, 512)}, {}),
    "gpt-oss 20B": Published(
        _config("gpt_oss", "GptOssForCausalLM", (2880, 2880, 24, 64, 8), {"head_dim": 64, "num_local_experts": 32}),
        {**_attention(2880, 4096, 512), "mlp.router": (32, 2880)}, {}),
    "DeepSeek V2 Lite": Published(
        _config("deepseek_v2", "DeepseekV2ForCausalLM", (2048, 10944, 27, 16, 16), {
            **_LATENT, "q_lora_rank": None, "first_k_dense_replace": 1, "n_routed_experts": 64, "n_shared_experts": 2,
            "moe_intermediate_size": 1408}),
        {**_experts("mlp", _GATE_UP_DOWN, 2048, 10944), "mlp.gate": (64, 2048),
         **_experts("mlp.experts.63", _GATE_UP_DOWN, 2048, 1408)},
        {"self_attn.q_proj": (3072, 2048), "self_attn.kv_a_proj_with_mqa": (576, 2048),
         "self_attn.o_proj": (2048, 2048), **_experts("mlp.shared_experts", _GATE_UP_DOWN, 2048, 2816)}),
    "DeepSeek V3": Published(
        _config("deepseek_v3", "DeepseekV3ForCausalLM", (7168, 18432, 61, 128, 128), {
            **_LATENT, "q_lora_rank": 1536, "first_k_dense_replace": 3, "n_routed_experts": 256, "n_shared_experts": 1,
            "moe_intermediate_size": 2048}),
        {**_experts("mlp", _GATE_UP_DOWN, 7168, 18432), "mlp.gate": (256, 7168),
         **_experts("mlp.experts.255", _GATE_UP_DOWN, 7168, 2048)},
        {"self_attn.q_a_proj": (1536, 7168), "self_attn.kv_a_proj_with_mqa": (576, 7168),
         "self_attn.o_proj": (7168, 16384), **_experts("mlp.shared_experts", _GATE_UP_DOWN, 7168, 2048)}),
}  # fmt: skip

PUBLISHED = {**DENSE, **FUSED, **MIXTURES}
