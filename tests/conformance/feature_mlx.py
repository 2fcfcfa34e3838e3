"""mlx-lm's adapters for the README's table, from its formulas."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from conformance.feature_adapters import EXPERT_SHAPES, EXPERTS, Adapter, Workshop
from conformance.feature_truth import Deltas
from conformance.specs import COMMON
from safetensors.torch import load_file, save_file

_SCALE = 10.0


def mlx(workshop: Workshop, place: Path) -> Adapter:
    """mlx-lm's linear layers. Truth: its scale * (a @ b)^T, written out."""
    generator = torch.Generator().manual_seed(5)
    tensors, truth = {}, {}
    for layer in range(COMMON["num_hidden_layers"]):
        for name, (out, into) in {"self_attn.q_proj": (64, 64), "mlp.down_proj": (64, 96)}.items():
            module = f"model.layers.{layer}.{name}"
            a, b = (0.1 * torch.randn(size, generator=generator) for size in ((into, 4), (4, out)))
            tensors |= {f"{module}.lora_a": a, f"{module}.lora_b": b}
            truth[f"{module}.weight"] = _SCALE * (a.double() @ b.double()).T.numpy()
    return _save_mlx(workshop, place, "llama", tensors, truth)


def mlx_dora(workshop: Workshop, place: Path) -> Adapter:
    """mlx-lm's DoRALinear. Truth: W' - W with W' = m / ||W + scale * (a @ b)^T||_row * (W + scale * (a @ b)^T)."""
    generator = torch.Generator().manual_seed(7)
    weights = load_file(workshop.model("llama") / "model.safetensors")
    tensors, truth = {}, {}
    for layer in range(COMMON["num_hidden_layers"]):
        for name in ("self_attn.v_proj", "mlp.down_proj"):
            module = f"model.layers.{layer}.{name}"
            w = weights[f"{module}.weight"].double()
            out, into = w.shape
            a, b = (0.1 * torch.randn(size, generator=generator) for size in ((into, 4), (4, out)))
            directed = w + _SCALE * (a.double() @ b.double()).T
            lengths = w.norm(dim=1) * (1 + 0.2 * torch.randn(out, generator=generator))
            tensors |= {f"{module}.lora_a": a, f"{module}.lora_b": b, f"{module}.m": lengths.float()}
            factors = lengths.float().double() / directed.norm(dim=1)
            truth[f"{module}.weight"] = (factors[:, None] * directed - w).numpy()
    return _save_mlx(workshop, place, "llama", tensors, truth, method="dora")


def mlx_experts(workshop: Workshop, place: Path) -> Adapter:
    """mlx-lm's stacked experts. Truth: its scale * b[e] @ a[e] for each, written out."""
    generator = torch.Generator().manual_seed(6)
    tensors, truth = {}, {}
    for layer in range(COMMON["num_hidden_layers"]):
        for name, (out, into) in EXPERT_SHAPES.items():
            module = f"model.layers.{layer}.mlp.switch_mlp.{name}"
            sizes = ((EXPERTS, 4, into), (EXPERTS, out, 4))
            a, b = (0.1 * torch.randn(size, generator=generator) for size in sizes)
            tensors |= {f"{module}.lora_a": a, f"{module}.lora_b": b}
            truth[f"model.layers.{layer}.mlp.experts.{name}"] = _SCALE * (b.double() @ a.double()).numpy()
    return _save_mlx(workshop, place, "qwen3moe", tensors, truth)


def _save_mlx(
    workshop: Workshop,
    place: Path,
    kind: str,
    tensors: Mapping[str, torch.Tensor],
    truth: Deltas,
    *,
    method: str = "lora",
) -> Adapter:
    parameters = {"rank": 4, "scale": _SCALE, "dropout": 0.0}
    place.mkdir()
    (place / "adapter_config.json").write_text(json.dumps({"fine_tune_type": method, "lora_parameters": parameters}))
    save_file(dict(tensors), place / "adapters.safetensors", {"format": "mlx"})
    return Adapter(place, workshop.model(kind), kind, workshop.model(kind), place, truth)
