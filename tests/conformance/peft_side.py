"""What transformers and PEFT say: small random models, adapters made by PEFT itself, and PEFT's forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

CLASSES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {}),
    # heads wider than hidden / heads, as the small Qwen 3 models have them
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 32}),
}

ALPHAS = {"v_proj": 3, r"layers\.0\.mlp\.up_proj": 20, "layers.1.self_attn.q_proj": 5}
RANKS = {"k_proj": 2, r"layers\.1\.mlp\.(gate|up)_proj": 7}
KINDS: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "alpha_pattern": {"alpha_pattern": ALPHAS},
    "rank_pattern": {"rank_pattern": RANKS},
    "all_at_once": {"use_rslora": True, "alpha_pattern": ALPHAS, "rank_pattern": RANKS},
    "embeddings": {"target_modules": [*PROJECTIONS, "embed_tokens", "lm_head"]},
    "plain_r32": {"r": 32, "lora_alpha": 32},
}

TOKENS = (3, 17, 92, 5, 41, 41, 120, 66, 8, 101)


def make_model(architecture: str) -> Any:
    """A seeded model with grouped queries whose logits differ by several units."""
    import transformers

    config_class, model_class, more = CLASSES[architecture]
    config = getattr(transformers, config_class)(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        **more,
    )
    model = getattr(transformers, model_class)(config).float().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(_spread(name, noise))
    return model


def _spread(name: str, noise: torch.Tensor) -> torch.Tensor:
    if name.endswith("norm.weight"):
        return 1 + 0.2 * noise
    if noise.ndim == 1 or "embed_tokens" in name:
        return 0.5 * noise
    return noise * (3.0 if "lm_head" in name else 1.0) / noise.shape[1] ** 0.5


def align(model: Any) -> None:
    """Moves every matrix in place, strongly in a few directions and weakly in all, so that modules differ."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for place, parameter in enumerate(model.parameters()):
            if parameter.ndim == 2:
                out, into = parameter.shape
                rank = 1 + place % 8
                low = torch.randn(out, rank, generator=generator) @ torch.randn(rank, into, generator=generator)
                parameter.add_(0.05 * low + 0.02 * torch.randn(out, into, generator=generator))


def save_adapter(model_path: Path, target: Path, options: Mapping[str, Any], seed: int = 3) -> Path:
    """Has PEFT make and save an adapter, on all seven projections unless told otherwise, with noise in A and B."""
    import peft

    settings = {"r": 4, "lora_alpha": 8, "target_modules": list(PROJECTIONS), **options}
    config = peft.LoraConfig(task_type="CAUSAL_LM", **settings)
    adapted = peft.get_peft_model(load_model(model_path), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                size = parameter.shape[1] if "lora_A" in name else 60 * parameter.shape[1]
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / size**0.5)
    adapted.save_pretrained(target, save_embedding_layers=False)
    return target


def load_model(path: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def load_adapted(model_path: Path, adapter_path: Path) -> Any:
    """The adapter on its model, as PEFT loads it."""
    import peft

    return peft.PeftModel.from_pretrained(load_model(model_path), adapter_path).eval()


def logits_of(model: Any) -> np.ndarray:
    with torch.inference_mode():
        return model(input_ids=torch.tensor([TOKENS])).logits[0].float().numpy()


def lora_layers(adapted: Any) -> Iterator[tuple[str, Any]]:
    """Every adapted module by its name in the unadapted model."""
    for name, module in adapted.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "scaling"):
            yield name.removeprefix("base_model.model."), module


@contextmanager
def replaced_b(adapted: Any, new: Mapping[str, torch.Tensor]) -> Iterator[Any]:
    """The model with another B in the named modules, until the block ends."""
    layers = dict(lora_layers(adapted))
    old = {name: layers[name].lora_B["default"].weight.detach().clone() for name in new}
    with torch.no_grad():
        for name, b in new.items():
            layers[name].lora_B["default"].weight.copy_(b)
        yield adapted
        for name, b in old.items():
            layers[name].lora_B["default"].weight.copy_(b)
