"""Small models and adapters on disk, made of seeded noise: what real files look like, without training.

Written with the safetensors package, not with our writer, so that reading is tested against another hand.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

PROJECTIONS = {
    "self_attn.q_proj": ("q", "hidden"),
    "self_attn.k_proj": ("kv", "hidden"),
    "self_attn.v_proj": ("kv", "hidden"),
    "self_attn.o_proj": ("hidden", "q"),
    "mlp.gate_proj": ("ffn", "hidden"),
    "mlp.up_proj": ("ffn", "hidden"),
    "mlp.down_proj": ("hidden", "ffn"),
}


@dataclass(frozen=True)
class Sizes:
    hidden: int = 64
    ffn: int = 96
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    vocab: int = 128
    tied: bool = False

    def of(self, name: str) -> int:
        return {
            "hidden": self.hidden,
            "ffn": self.ffn,
            "q": self.hidden,
            "kv": self.hidden // self.heads * self.kv_heads,
        }[name]

    def modules(self) -> dict[str, tuple[int, int]]:
        return {
            f"model.layers.{layer}.{module}": (self.of(out), self.of(into))
            for layer in range(self.layers)
            for module, (out, into) in PROJECTIONS.items()
        }


def config(sizes: Sizes, architecture: str = "LlamaForCausalLM") -> dict[str, Any]:
    return {
        "architectures": [architecture],
        "model_type": architecture.split("For", 1)[0].lower(),
        "hidden_size": sizes.hidden,
        "intermediate_size": sizes.ffn,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.hidden // sizes.heads,
        "vocab_size": sizes.vocab,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": sizes.tied,
        "hidden_act": "silu",
    }


def weights(sizes: Sizes, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.1).to(dtype)

    tensors = {f"{module}.weight": noise(*shape) for module, shape in sizes.modules().items()}
    tensors["model.embed_tokens.weight"] = noise(sizes.vocab, sizes.hidden)
    if not sizes.tied:
        tensors["lm_head.weight"] = noise(sizes.vocab, sizes.hidden)
    tensors["model.norm.weight"] = 1 + noise(sizes.hidden)
    for layer in range(sizes.layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = 1 + noise(sizes.hidden)
    return tensors


def moved(tensors: Mapping[str, torch.Tensor], seed: int, size: float = 0.02) -> dict[str, torch.Tensor]:
    """An aligned model: low-rank and plain noise added to every matrix."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for name, tensor in tensors.items():
        if tensor.ndim != 2:
            result[name] = tensor.clone()
            continue
        out, into = tensor.shape
        low = torch.randn(out, 3, generator=generator) @ torch.randn(3, into, generator=generator)
        plain = torch.randn(out, into, generator=generator)
        result[name] = (tensor.float() + size * low + 0.2 * size * plain).to(tensor.dtype)
    return result


def save_model(directory: Path, tensors: Mapping[str, torch.Tensor], settings: Mapping[str, Any]) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(settings))
    save_file(dict(tensors), directory / "model.safetensors", {"format": "pt"})
    return directory


def save_sharded(directory: Path, tensors: Mapping[str, torch.Tensor], settings: Mapping[str, Any]) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(settings))
    names = list(tensors)
    halves = [names[: len(names) // 2], names[len(names) // 2 :]]
    index = {}
    for number, half in enumerate(halves, 1):
        shard = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in half}, directory / shard, {"format": "pt"})
        index.update(dict.fromkeys(half, shard))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return directory


def adapter_config(r: int = 4, alpha: float = 8, **more: Any) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": r,
        "lora_alpha": alpha,
        "target_modules": rf".*\.({'|'.join(name.split('.')[1] for name in PROJECTIONS)})",  # a list: of every layer
        **more,
    }


def pairs(
    modules: Mapping[str, tuple[int, int]],
    seed: int,
    r: int = 4,
    ranks: Mapping[str, int] | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, (out, into) in modules.items():
        rank = (ranks or {}).get(module, r)
        a = torch.randn(rank, into, generator=generator) * 0.2
        b = torch.randn(out, rank, generator=generator) * 0.1
        tensors[f"base_model.model.{module}.lora_A.weight"] = a.to(dtype)
        tensors[f"base_model.model.{module}.lora_B.weight"] = b.to(dtype)
    return tensors


def save_adapter(directory: Path, tensors: Mapping[str, torch.Tensor], settings: Mapping[str, Any]) -> Path:
    directory.mkdir(parents=True)
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    save_file(dict(tensors), directory / "adapter_model.safetensors", {"format": "pt"})
    return directory


@dataclass(frozen=True)
class Trio:
    """Base, aligned and adapter that belong together, and what is in them."""

    base: Path
    aligned: Path
    adapter: Path
    base_tensors: Mapping[str, torch.Tensor]
    aligned_tensors: Mapping[str, torch.Tensor]
    pair_tensors: Mapping[str, torch.Tensor]
    sizes: Sizes

    @property
    def modules(self) -> Sequence[str]:
        return list(self.sizes.modules())


def save_trio(
    root: Path,
    *,
    sizes: Sizes | None = None,
    dtype: torch.dtype = torch.float32,
    architecture: str = "LlamaForCausalLM",
) -> Trio:
    sizes = sizes or Sizes()
    before = weights(sizes, 1, dtype)
    after = moved(before, 2)
    lora = pairs(sizes.modules(), 3, dtype=dtype)
    settings = config(sizes, architecture)
    return Trio(
        save_model(root / "base", before, settings),
        save_model(root / "aligned", after, settings),
        save_adapter(root / "adapter", lora, adapter_config()),
        before,
        after,
        lora,
        sizes,
    )
