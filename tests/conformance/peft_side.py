"""What transformers and PEFT say: small random models, adapters made by PEFT itself, and PEFT's forward pass."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conformance.specs import MIXTURES, PROJECTIONS, SPECS, THOROUGH, Spec

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

# The kinds whose logits are compared for all that llama.cpp computes in a way of its own; the others have "plain".
LOGIT_KINDS = ("plain", "rslora", "alpha_pattern", "rank_pattern")
ALL_KINDS = ("gemma2", "gemma3", "phi3", "granite", "olmo2")
MIXTURES_OF_ALL_KINDS = ("mixtral", "qwen3moe")

ROUTERS = ("mlp.gate.weight", "router.weight")

TOKENS = (3, 17, 92, 5, 41, 41, 120, 66, 8, 101)


def kinds_of(architecture: str) -> Mapping[str, Mapping[str, Any]]:
    """LoraConfig's options for each kind of adapter that the architecture is tested with."""
    if architecture in THOROUGH:
        return KINDS
    spec = SPECS[architecture]
    if architecture in MIXTURES:
        return _kinds_of_a_mixture(spec, LOGIT_KINDS if architecture in MIXTURES_OF_ALL_KINDS else ("plain",))
    first, last = spec.targets[0], spec.targets[-1]
    options: Mapping[str, Mapping[str, Any]] = {
        "plain": {},
        "rslora": {"use_rslora": True},
        "alpha_pattern": {"alpha_pattern": {first: 3, rf"layers\.0\.mlp\.{last}": 20}},
        "rank_pattern": {"rank_pattern": {first: 2, rf"layers\.1\.mlp\.{last}": 7}},
    }
    kinds = LOGIT_KINDS if architecture in ALL_KINDS else ("plain",)
    return {kind: {"target_modules": spec.linear, **options[kind]} for kind in kinds}


def _kinds_of_a_mixture(spec: Spec, kinds: Sequence[str]) -> Mapping[str, Mapping[str, Any]]:
    """Patterns are for the adapted parameter's name, whatever module PEFT hides it in."""
    down = r"layers\.1\..*\.experts\.down_proj"
    options: Mapping[str, Mapping[str, Any]] = {
        "plain": {},
        "rslora": {"use_rslora": True},
        "alpha_pattern": {
            "alpha_pattern": {"experts.gate_up_proj": 20, down: 3, "o_proj": 5, r"(gate|router)\.weight": 3}
        },
        "rank_pattern": {"rank_pattern": {"experts.gate_up_proj": 6, down: 2, "o_proj": 7}},
    }
    common = {"target_modules": list(spec.targets), "target_parameters": list(spec.parameters)}
    return {kind: {**common, **options[kind]} for kind in kinds}


def make_model(architecture: str) -> Any:
    """A seeded model with grouped queries whose logits differ by several units."""
    import transformers

    spec = SPECS[architecture]
    config = getattr(transformers, spec.config)(**spec.options())
    model = getattr(transformers, spec.model)(config).float().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(_spread(name, parameter, noise))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.5 * torch.randn(buffer.shape, generator=generator))
    return model


def _spread(name: str, neutral: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """A parameter's values, from what transformers starts it with: a norm's is 1, or 0 where 1 + weight is meant."""
    if name.endswith(("norm.weight", "ln_f.weight", "ln_attn.weight", "ln_mlp.weight")):
        return neutral + 0.2 * noise
    if noise.ndim == 1 or "embed" in name:
        return 0.5 * noise
    strong = "lm_head" in name or name.endswith(ROUTERS)  # no two experts are almost equally good
    return noise * (3.0 if strong else 1.0) / noise.shape[2 if noise.ndim == 3 else 1] ** 0.5


def align(model: Any) -> None:
    """Moves every matrix in place, strongly in a few directions and weakly in all, so that modules differ."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for place, parameter in enumerate(model.parameters()):
            if parameter.ndim in (2, 3):
                *experts, out, into = parameter.shape
                rank = 1 + place % 8
                left = torch.randn(*experts, out, rank, generator=generator)
                low = left @ torch.randn(*experts, rank, into, generator=generator)
                parameter.add_(0.05 * low + 0.02 * torch.randn(*experts, out, into, generator=generator))


def save_adapter(model_path: Path, target: Path, options: Mapping[str, Any], seed: int = 3) -> Path:
    """Has PEFT make and save an adapter, on all seven projections unless told otherwise, with noise in A and B."""
    import peft

    settings = {"r": 4, "lora_alpha": 8, "target_modules": list(PROJECTIONS), **options}
    config = peft.LoraConfig(task_type="CAUSAL_LM", **settings)
    adapted = peft.get_peft_model(load_model(model_path), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                size = parameter.shape[1] if "lora_A" in name else 60 * parameter.shape[1]
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / size**0.5)
    adapted.save_pretrained(target, save_embedding_layers=False)
    return target


def load_model(path: Path) -> Any:
    """A model by the class that its config.json names."""
    import transformers

    name = json.loads((path / "config.json").read_text())["architectures"][0]
    return getattr(transformers, name).from_pretrained(path, dtype=torch.float32).eval()


def load_adapted(model_path: Path, adapter_path: Path) -> Any:
    """The adapter on its model, as PEFT loads it."""
    import peft

    return peft.PeftModel.from_pretrained(load_model(model_path), adapter_path).eval()


class GgmlGelu(torch.nn.Module):
    """GELU as ggml's CPU code has it: its tanh form, between -10 and 10 from a table of F16."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        table = torch.nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
        return torch.where(x.abs() < 10, table, x.clamp(min=0))


def with_ggml_gelu(model: Any) -> Any:
    """The model with ggml's GELU in the place of its own, where it has one: alone it moves logits by up to 0.02."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if "gelu" in type(child).__name__.lower():
                setattr(module, name, GgmlGelu())
    return model


def logits_of(model: Any) -> np.ndarray:
    with torch.inference_mode():
        return model(input_ids=torch.tensor([TOKENS])).logits[0].float().numpy()


def lora_layers(adapted: Any) -> Iterator[tuple[str, Any]]:
    """Every adapted module by its name in the unadapted model; of a bare parameter the parameter's name."""
    for name, module in adapted.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "scaling"):
            own = name.removeprefix("base_model.model.")
            parameter = getattr(module, "parameter_name", "weight")  # its wrappers nest where one module has several
            yield own if parameter == "weight" else f"{own.replace('.base_layer', '')}.{parameter}", module


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
