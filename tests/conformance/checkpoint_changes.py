"""What published checkpoints have otherwise than transformers writes them today: tensors, their names, config.json."""

from __future__ import annotations

from typing import Any

import torch

Tensors = dict[str, torch.Tensor]


def with_buffers(tensors: Tensors) -> Tensors:
    """As transformers wrote them until 2023, with what rotary embeddings can be computed from."""
    buffers = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.arange(8.0) for layer in range(2)}
    return {**tensors, **buffers}


def with_tied_head(tensors: Tensors) -> Tensors:
    """As some trainers write a tied model: the embedding a second time."""
    return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}


def with_float_norms(tensors: Tensors) -> Tensors:
    """As some fine-tunes are: the norms in float32 among matrices of 16 bits."""
    return {name: tensor.float() if tensor.ndim == 1 else tensor for name, tensor in tensors.items()}


def with_awkward_values(tensors: Tensors) -> Tensors:
    """With values half way between two of F16 or BF16, below the smallest of F16, and a row of zeros."""
    matrix = tensors["model.layers.0.mlp.up_proj.weight"]
    values = [1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-11, 1 + 3 * 2**-11, 2**-24, 2**-25, 1e-8, -6e-8, 1e-40, -0.0]
    matrix[0, : len(values)] = torch.tensor(values)
    matrix[1] = 0
    return tensors


def published_vision(tensors: Tensors) -> Tensors:
    """Under the names that published files of Gemma 3 have."""
    return {name.replace("vision_tower.", "vision_tower.vision_model."): tensor for name, tensor in tensors.items()}


def nested_vision(tensors: Tensors) -> Tensors:
    """Under the names of the modules in memory, as some versions of transformers saved them."""
    text = {name.replace("language_model.model.", "language_model."): tensor for name, tensor in tensors.items()}
    return {f"model.{name}": tensor for name, tensor in text.items()}


def fused_experts(tensors: Tensors) -> Tensors:
    """As transformers 5 has them in memory: one stack of all experts' gates and ups, one of their downs."""
    blocks = {name.split(".experts.")[0] for name in tensors if ".experts.0." in name}
    fused = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for block in blocks:
        count = len({name for name in tensors if name.startswith(f"{block}.experts.") and "down_proj" in name})
        parts = {
            kind: torch.stack([tensors[f"{block}.experts.{expert}.{kind}_proj.weight"] for expert in range(count)])
            for kind in ("gate", "up", "down")
        }
        fused[f"{block}.experts.gate_up_proj"] = torch.cat([parts["gate"], parts["up"]], dim=1)
        fused[f"{block}.experts.down_proj"] = parts["down"]
    return fused


def mixed_experts(tensors: Tensors) -> Tensors:
    """As quantized models are after a conversion back, or merges: experts of a layer in several types."""
    types = {".experts.0.": torch.float32, ".experts.1.": torch.float16}
    kinds = {name: next((types[part] for part in types if part in name), tensor.dtype)
             for name, tensor in tensors.items()}  # fmt: skip
    return {name: tensor.to(kinds[name]) for name, tensor in tensors.items()}


def in_the_older_dialect(config: dict[str, Any]) -> dict[str, Any]:
    """config.json as transformers 4 wrote it."""
    older = {key: value for key, value in config.items() if key not in ("rope_parameters", "dtype")}
    rope = dict(config["rope_parameters"])
    older |= {"torch_dtype": config["dtype"], "rope_theta": rope.pop("rope_theta")}
    return {**older, "rope_scaling": None if rope["rope_type"] == "default" else rope}


def gemma3_in_the_older_dialect(config: dict[str, Any]) -> dict[str, Any]:
    """config.json as it is published with the larger models of Gemma 3."""
    text = {key: value for key, value in config["text_config"].items() if key not in ("rope_parameters", "layer_types")}
    rope = config["text_config"]["rope_parameters"]
    text |= {
        "rope_theta": rope["full_attention"]["rope_theta"],
        "rope_local_base_freq": rope["sliding_attention"]["rope_theta"],
        "rope_scaling": {"rope_type": "linear", "factor": rope["full_attention"]["factor"]},
        "sliding_window_pattern": 6,
    }
    return {**config, "text_config": text}
