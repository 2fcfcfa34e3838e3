"""Oracle: PEFT's own ParamWrapper.get_delta_weight, for every parameter that it adapts in transformers' models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from converters.adapters.lora import LoraPair
from converters.adapters.peft import PeftAdapter, open_peft

pytestmark = pytest.mark.conformance

EXPERTS = 5
SMALL = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 32, "max_position_embeddings": 32, "num_experts_per_tok": 2,
}  # fmt: skip
MODELS: Mapping[str, Mapping[str, Any]] = {
    "Qwen3Moe": {"num_experts": EXPERTS, "moe_intermediate_size": 12, "head_dim": 8},
    "Mixtral": {"num_local_experts": EXPERTS},
    "GptOss": {"num_local_experts": EXPERTS, "head_dim": 8},
    "GraniteMoe": {"num_local_experts": EXPERTS},
    "JetMoe": {"num_local_experts": EXPERTS, "kv_channels": 8},
    "NemotronH": {
        "n_routed_experts": EXPERTS, "moe_intermediate_size": 12, "head_dim": 8, "layers_block_type": ["moe", "moe"],
        "moe_latent_size": None, "mamba_num_heads": 2, "mamba_head_dim": 16,
    },
}  # fmt: skip
BOTH = ["experts.gate_up_proj", "experts.down_proj"]
KINDS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "two parameters": ("Qwen3Moe", {"target_parameters": BOTH[::-1]}),
    "two parameters of Mixtral": ("Mixtral", {"target_parameters": BOTH}),
    "two transposed parameters": ("GptOss", {"target_parameters": BOTH}),
    "four of one module": ("GptOss", {"target_parameters": [*BOTH, "gate_up_proj_bias", "down_proj_bias"]}),
    "two parameters of Granite": ("GraniteMoe", {"target_parameters": BOTH}),
    "an up projection alone": ("NemotronH", {"target_parameters": ["experts.up_proj", "experts.down_proj"]}),
    "the first": ("Qwen3Moe", {"target_parameters": ["mlp.experts.gate_up_proj"]}),
    "the second": ("GptOss", {"target_parameters": ["down_proj"], "target_modules": ["q_proj", "o_proj"]}),
    "by full names": (
        "Mixtral",
        {"target_parameters": ["model.layers.0.mlp.experts.down_proj", "model.layers.1.mlp.experts.gate_up_proj"]},
    ),
    "more in one layer": ("Qwen3Moe", {"target_parameters": ["gate_up_proj", "1.mlp.experts.down_proj"]}),
    "routers": ("Qwen3Moe", {"target_parameters": [*BOTH, "mlp.gate.weight"], "target_modules": ["q_proj"]}),
    "weights of three dimensions": ("JetMoe", {"target_parameters": ["input_linear.weight", "output_linear.weight"]}),
    "the head": ("Mixtral", {"target_parameters": ["lm_head.weight", *BOTH]}),
    "rslora": ("Qwen3Moe", {"target_parameters": BOTH, "use_rslora": True}),
    "patterns": (
        "GptOss",
        {
            "target_parameters": ["gate_up_proj", "down_proj"],
            "target_modules": ["q_proj"],
            "rank_pattern": {r".*\.gate_up_proj": 6, "down_proj": 2, r"layers\.0\.mlp\.experts": 7},
            "alpha_pattern": {"1.mlp.experts.down_proj": 5, r"(gate_up|q)_proj": 9},
        },
    ),
    "patterns and rslora": (
        "Qwen3Moe",
        {"target_parameters": ["gate_up_proj"], "rank_pattern": {"0.mlp.experts.gate_up_proj": 5}, "use_rslora": True},
    ),
}


def make_model(name: str) -> Any:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SMALL, **MODELS[name])
    return getattr(transformers, f"{name}ForCausalLM")(config).float()


def fill(adapted: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


def peft_deltas(adapted: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """By the name of an adapted weight, what PEFT adds to it; (out, in), or that for every expert."""
    for name, layer in adapted.named_modules():
        if not hasattr(layer, "lora_A") or not hasattr(layer, "scaling"):
            continue
        weight = name.removeprefix("base_model.model.").replace(".base_layer", "")
        parameter = getattr(layer, "parameter_name", "weight")
        delta = layer.get_delta_weight("default").detach()
        if delta.ndim == 3 and getattr(layer.get_base_layer(), "is_transposed", False):
            delta = delta.transpose(1, 2)
        yield (weight if parameter == "weight" else f"{weight}.{parameter}"), delta


def our_deltas(adapter: PeftAdapter) -> dict[str, torch.Tensor]:
    """The same from the pairs, in float64; experts stacked."""
    found: dict[str, list[torch.Tensor]] = {}
    for pair in adapter.pairs.values():
        delta = _delta(adapter, pair)
        assert pair.expert in (None, len(found.get(pair.weight, ())))
        found.setdefault(pair.weight, []).append(delta)
    stacks = {pair.weight for pair in adapter.pairs.values() if pair.expert is not None}
    return {name: torch.stack(deltas) if name in stacks else deltas[0] for name, deltas in found.items()}


def _delta(adapter: PeftAdapter, pair: LoraPair) -> torch.Tensor:
    a, b = (half.double() for half in adapter.load(pair.module))
    assert (a.shape, b.shape) == ((pair.rank, pair.shape[1]), (pair.shape[0], pair.rank))
    return pair.scaling * (b @ a)


@pytest.mark.parametrize("kind", KINDS)
def test_every_expert_s_pair_is_peft_s_delta(kind: str, tmp_path: Path) -> None:
    import peft

    name, options = KINDS[kind]
    config = peft.LoraConfig(task_type="CAUSAL_LM", **{"r": 3, "lora_alpha": 4, "target_modules": [], **options})
    adapted = peft.get_peft_model(make_model(name), config)
    fill(adapted)
    adapted.save_pretrained(str(tmp_path), save_embedding_layers=False)
    adapter = open_peft(tmp_path)
    ours, theirs = our_deltas(adapter), dict(peft_deltas(adapted))
    assert ours.keys() == theirs.keys() and (adapter.notes, adapter.losses) == ((), ())
    for weight, delta in theirs.items():
        assert ours[weight].shape == delta.shape
        torch.testing.assert_close(ours[weight], delta.double(), atol=1e-6, rtol=1e-6)


OLD = {
    "Qwen3Moe": ("gate_proj", "up_proj", "down_proj"),
    "Mixtral": ("w1", "w3", "w2"),
}


@pytest.mark.parametrize("name", OLD)
def test_an_adapter_of_single_experts_that_peft_has_fused(name: str, tmp_path: Path) -> None:
    import peft

    model = make_model(name)
    save_old_adapter(tmp_path / "old", model, OLD[name])
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "old")
    adapted.save_pretrained(str(tmp_path / "new"), save_embedding_layers=False)
    old, new = open_peft(tmp_path / "old"), open_peft(tmp_path / "new")
    ours, theirs = our_deltas(new), dict(peft_deltas(adapted))
    assert ours.keys() == theirs.keys()
    for weight, delta in theirs.items():
        torch.testing.assert_close(ours[weight], delta.double(), atol=1e-6, rtol=1e-6)
    gate, up, down = OLD[name]
    for layer in range(SMALL["num_hidden_layers"]):
        stacks = {stack: ours[f"model.layers.{layer}.mlp.experts.{stack}"] for stack in ("gate_up_proj", "down_proj")}
        for expert in range(EXPERTS):
            module = f"{old_module(name, layer)}.experts.{expert}"
            single = {part: _delta(old, old.pairs[f"{module}.{part}"]) for part in (gate, up, down)}
            fused = torch.cat([single[gate], single[up]])
            torch.testing.assert_close(stacks["gate_up_proj"][expert], fused, atol=1e-6, rtol=1e-6)
            torch.testing.assert_close(stacks["down_proj"][expert], single[down], atol=1e-6, rtol=1e-6)


def old_module(name: str, layer: int) -> str:
    return f"model.layers.{layer}.{'block_sparse_moe' if name == 'Mixtral' else 'mlp'}"


def save_old_adapter(directory: Path, model: Any, parts: tuple[str, str, str]) -> None:
    """What PEFT saved when every expert was three modules: with transformers 4."""
    import peft

    name = type(model).__name__.removesuffix("ForCausalLM")
    width = dict(model.named_parameters())["model.layers.0.mlp.experts.down_proj"].shape[2]
    generator = torch.Generator().manual_seed(2)
    tensors = {}
    for layer in range(SMALL["num_hidden_layers"]):
        sizes = {f"experts.{expert}.{part}": (16, width) if part == parts[2] else (width, 16)
                 for expert in range(EXPERTS) for part in parts} | {"gate": (EXPERTS, 16)}  # fmt: skip
        for part, (out, into) in sizes.items():
            key = f"base_model.model.{old_module(name, layer)}.{part}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(3, into, generator=generator)
            tensors[f"{key}.lora_B.weight"] = torch.randn(out, 3, generator=generator)
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=5, target_modules=[*parts, "gate"])
    config.save_pretrained(str(directory))
