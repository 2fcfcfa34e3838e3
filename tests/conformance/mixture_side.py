"""Mixtures of experts: where their parameters go in GGUF, written out, and adapters that nobody's library makes today.

transformers 4 had a module for every expert, and adapters from then name them; mlx-lm has three modules for all. Their
files are made by hand here, from the names in a checkpoint.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conformance import peft_side, reference
from conformance.families import Family
from conformance.gguf_side import rotary_rows
from conformance.specs import COMMON
from safetensors import safe_open
from safetensors.torch import load_file, save_file

PERMUTED = ("mixtral", "granitemoe", "granitemoe-shared")
NOT_ADAPTED = ("_bias", "kv_b_proj.weight")
SINGLE = re.compile(r"(.*)\.experts\.(\d+)\.(\w+)")
SOME = {
    "rank_pattern": {r".*\.experts\.1\..*": 2, r".*\.experts\.3\..*": 7},
    "alpha_pattern": {r".*\.experts\.3\..*": 5},
}
"""Settings of the adapter that has `some_experts`."""
KIND = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}
PLACES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "mlp.gate": "ffn_gate_inp",
    "mlp.router": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "block_sparse_moe.router": "ffn_gate_inp",
    "block_sparse_moe.router.layer": "ffn_gate_inp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "shared_mlp.output_linear": "ffn_down_shexp",
    **{f"mlp.{kind}_proj": f"ffn_{kind}" for kind in ("gate", "up", "down")},
    **{f"mlp.{shared}.{kind}_proj": f"ffn_{kind}_shexp"
       for shared in ("shared_expert", "shared_experts") for kind in ("gate", "up", "down")},
}  # fmt: skip


def in_gguf(architecture: str, name: str, values: np.ndarray) -> dict[str, np.ndarray]:
    """What llama.cpp makes of a parameter or its delta: tensors by name, rows in its order.

    Args:
        name: of a module, or of a parameter for all experts, as transformers 5 has it in memory.
        values: (out, in), (experts, out, in), and (experts, in, out) for gpt-oss' experts.
    """
    layer, rest = name.removeprefix("model.layers.").split(".", 1)
    if rest == "shared_mlp.input_linear":
        gate, up = np.split(values, 2)
        return {f"blk.{layer}.ffn_gate_shexp.weight": gate, f"blk.{layer}.ffn_up_shexp.weight": up}
    if not rest.endswith((".experts.gate_up_proj", ".experts.down_proj")):
        heads = {"q_proj": COMMON["num_attention_heads"], "k_proj": COMMON["num_key_value_heads"]}
        turned = heads.get(rest.rpartition(".")[2]) if architecture in PERMUTED else None
        return {f"blk.{layer}.{PLACES[rest]}.weight": values[rotary_rows(len(values), turned)] if turned else values}
    if architecture == "gpt-oss":
        values = values.swapaxes(1, 2)
    if rest.endswith("down_proj"):
        return {f"blk.{layer}.ffn_down_exps.weight": values}
    half = values.shape[1] // 2
    parts = (slice(0, None, 2), slice(1, None, 2)) if architecture == "gpt-oss" else (slice(half), slice(half, None))
    return {f"blk.{layer}.ffn_{kind}_exps.weight": values[:, part]
            for kind, part in zip(("gate", "up"), parts, strict=True)}  # fmt: skip


def adapted_weights(architecture: str, model: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Weights of a model in float64, by GGUF name."""
    found = {}
    for name, parameter in peft_side.load_model(model).named_parameters():
        if name.startswith("model.layers.") and parameter.ndim > 1 and not name.endswith(NOT_ADAPTED):
            found |= in_gguf(architecture, name.removesuffix(".weight"), reference.float64(parameter.detach()))
    return {name: found[name] for name in names}


def peft_deltas(family: Family, adapter: Path) -> dict[str, np.ndarray]:
    """PEFT's own deltas in float64, by GGUF name."""
    found: dict[str, np.ndarray] = {}
    for name, layer in peft_side.lora_layers(peft_side.load_adapted(family.aligned, adapter).double()):
        delta = reference.float64(layer.get_delta_weight("default").detach())
        found |= in_gguf(family.architecture, name, delta)
    return found


def module_deltas(family: Family, adapter: Path) -> dict[str, np.ndarray]:
    """The deltas of an adapter by module in float64, by GGUF name: alpha / r B A, and zeros for absent experts."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    experts = json.loads((family.aligned / "config.json").read_text())
    count = next(experts[key] for key in ("num_local_experts", "num_experts", "n_routed_experts") if key in experts)
    found: dict[str, np.ndarray] = {}
    pairs = load_file(adapter / "adapter_model.safetensors")
    for key in (key for key in pairs if key.endswith(".lora_A.weight")):
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        a, b = reference.float64(pairs[key]), reference.float64(pairs[key.replace("lora_A", "lora_B")])
        alphas = (alpha for pattern, alpha in config.get("alpha_pattern", {}).items() if re.fullmatch(pattern, module))
        delta = next(alphas, config["lora_alpha"]) / len(a) * b @ a
        single = SINGLE.fullmatch(module)
        if single is None:
            found |= in_gguf(family.architecture, module, delta)
        else:
            name = f"blk.{module.split('.')[2]}.ffn_{KIND[single[3]]}_exps.weight"
            found.setdefault(name, np.zeros((count, *delta.shape)))[int(single[2])] = delta
    return found


def linear_shapes(family: Family) -> Iterator[tuple[str, tuple[int, int]]]:
    """Every matrix of the layers that transformers 4 had as a linear module, by its name on disk.

    DeepSeek's kv_b_proj has no counterpart in GGUF for a pair.
    """
    with safe_open(family.aligned / "model.safetensors", "pt") as file:
        for name in sorted(file.keys()):
            shape = tuple(file.get_slice(name).get_shape())
            if name.startswith("model.layers.") and len(shape) == 2 and not name.endswith(NOT_ADAPTED):
                yield name.removesuffix(".weight"), (shape[0], shape[1])


def save_by_module(
    family: Family,
    target: Path,
    chosen: Callable[[str], bool] = lambda module: True,
    rank: Callable[[str], int] = lambda module: 4,
    **settings: Any,
) -> Path:
    """An adapter as PEFT wrote it with transformers 4: two tensors for every linear module, one expert's included."""
    generator = torch.Generator().manual_seed(4)
    tensors = {}
    for module, (out, into) in linear_shapes(family):
        if chosen(module):
            r = rank(module)
            prefix = f"base_model.model.{module}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(r, into, generator=generator) / into**0.5
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(out, r, generator=generator) / r**0.5 / 4
    target.mkdir()
    save_file(tensors, target / "adapter_model.safetensors")
    leaves = sorted({key.split(".lora_")[0].rpartition(".")[2] for key in tensors})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": leaves}
    (target / "adapter_config.json").write_text(json.dumps({**config, **settings}))
    return target


def save_mlx(family: Family, target: Path, scale: float = 10.0) -> dict[str, np.ndarray]:
    """An adapter as mlx-lm writes it for all experts and the router; its deltas in float64 by GGUF name.

    mlx-lm's sums: scale * (a @ b).T of a linear module, scale * b[e] @ a[e] of an expert.
    """
    generator = torch.Generator().manual_seed(6)
    tensors, deltas = {}, {}
    for name, stack in _stacks(family).items():
        prefix, _, kind = name.rpartition(".")
        layer = prefix.split(".")[2]
        experts, out, into = stack
        a = torch.randn(experts, 4, into, generator=generator) / 8
        b = torch.randn(experts, out, 4, generator=generator) / 8
        tensors |= {f"{name}.lora_a": a, f"{name}.lora_b": b}
        delta = scale * reference.float64(b) @ reference.float64(a)
        deltas[f"blk.{layer}.ffn_{KIND[kind]}_exps.weight"] = delta
    for module, (out, into) in linear_shapes(family):
        if module.endswith((".gate", ".router", ".router.layer")):
            a, b = torch.randn(into, 4, generator=generator) / 8, torch.randn(4, out, generator=generator) / 8
            tensors |= {f"{module}.lora_a": a, f"{module}.lora_b": b}
            delta = scale * (reference.float64(a) @ reference.float64(b)).T
            deltas[f"blk.{module.split('.')[2]}.ffn_gate_inp.weight"] = delta
    target.mkdir()
    save_file(tensors, target / "adapters.safetensors", {"format": "mlx"})
    settings = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 4, "scale": scale}}
    (target / "adapter_config.json").write_text(json.dumps(settings))
    return deltas


def _stacks(family: Family) -> dict[str, tuple[int, int, int]]:
    """mlx-lm's modules for all experts, with (experts, out, in)."""
    found = {}
    for name, parameter in peft_side.load_model(family.aligned).named_parameters():
        block, _, kind = name.rpartition(".experts.")
        if kind not in ("gate_up_proj", "down_proj"):
            continue
        experts, out, into = parameter.shape
        switch = "switch_mlp"
        if family.architecture == "gpt-oss":
            out, into, switch = into, out, "experts"
        if family.architecture == "mixtral":
            block = block.replace(".mlp", ".block_sparse_moe")
        parts = {"down_proj": out} if kind == "down_proj" else {"gate_proj": out // 2, "up_proj": out // 2}
        found |= {f"{block}.{switch}.{part}": (experts, rows, into) for part, rows in parts.items()}
    return found


def some_experts(module: str) -> bool:
    """Two of four, and of them not the up projection."""
    found = SINGLE.fullmatch(module)
    return found is not None and found[2] in "13" and not found[3].startswith(("up", "w3"))


def rank_of(module: str) -> int:
    """What `SOME` says."""
    return 2 if ".experts.1." in module else 7


def worst(found: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> float:
    """The largest relative error of all tensors and, of stacks, of every matrix; zeros must be zeros."""
    assert found.keys() == expected.keys()
    errors = []
    for name, truth in expected.items():
        assert found[name].shape == truth.shape, name
        matrices = truth.reshape(-1, *truth.shape[-2:])
        for ours, theirs in zip(found[name].reshape(matrices.shape), matrices, strict=True):
            errors.append(reference.relative_error(ours, theirs) if theirs.any() else float(ours.any()))
    return max(errors)


def matrices(stacks: Mapping[str, np.ndarray]) -> int:
    """How many, an expert's gate and up being two."""
    return sum(stack.size // (stack.shape[-2] * stack.shape[-1]) for stack in stacks.values())


def projected_deltas(family: Family, truth: Mapping[str, np.ndarray]) -> tuple[float, dict[str, np.ndarray]]:
    """Safe LoRA for every matrix by itself, from the half of all matrices with the lower cosines, and the threshold."""
    before, after = (adapted_weights(family.architecture, path, truth) for path in (family.base, family.aligned))
    moved, cosines = {}, {}
    for name, stack in truth.items():
        v = after[name] - before[name]
        operator = v @ v.swapaxes(-1, -2) / np.linalg.norm(v, axis=(-1, -2), keepdims=True)
        moved[name] = operator @ stack
        products = [(left * right).sum((-1, -2)) for left, right in
                    ((moved[name], stack), (moved[name], moved[name]), (stack, stack))]  # fmt: skip
        cosines[name] = products[0] / np.sqrt(products[1] * products[2])
    ordered = np.sort(np.concatenate([np.ravel(values) for values in cosines.values()]))
    low, high = ordered[len(ordered) // 2 - 1], ordered[len(ordered) // 2]
    assert high - low > 1e-4, "two cosines too close to tell apart"
    threshold = float(low + high) / 2
    return threshold, {name: np.where((cosines[name] <= threshold)[..., None, None], moved[name], stack)
                       for name, stack in truth.items()}  # fmt: skip
