"""What an adapter does to its model, by PEFT's own merge, and what a GGUF adapter makes of that in llama.cpp."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
from conformance import peft_side, reference
from conformance.gguf_side import rotary_rows
from conformance.specs import COMMON

Deltas = Mapping[str, np.ndarray]
Verdict = Literal["right", "off", "parts missing", "not applied", "no adapter"]

HEADS = {"q_proj": COMMON["num_attention_heads"], "k_proj": COMMON["num_key_value_heads"]}
PLAINLY = 0.1  # relative errors above this are no rounding
PERMUTED = ("llama", "mistral3")


def merged(model: Path, adapter: Path, load: Callable[[Path], Any] = peft_side.load_model) -> Deltas:
    """Merged minus original of every parameter that PEFT changes, in float64, by transformers' names."""
    import peft

    before = load(model)
    original = {name: value.double() for name, value in before.state_dict().items()}
    after = peft.PeftModel.from_pretrained(before, adapter).double().merge_and_unload().state_dict()
    found = {name: reference.float64(after[name] - original[name]) for name in original}
    return {name: delta for name, delta in found.items() if np.abs(delta).max() > 1e-9}


def in_gguf(architecture: str, changed: Deltas) -> Deltas:
    """The same by llama.cpp's names and in its order of rows; what GGUF has no name for keeps its own."""
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, COMMON["num_hidden_layers"])
    found = {}
    for name, delta in changed.items():
        plain = name.replace("language_model.", "", 1)
        if ".experts." in plain:
            found.update(_stacks(plain, delta))
            continue
        rows = HEADS.get(plain.split(".")[-2]) if architecture in PERMUTED and delta.ndim == 2 else None
        ordered = delta[rotary_rows(len(delta), rows)] if rows else delta
        found[names.get_name(plain, try_suffixes=(".weight", ".bias")) or name] = ordered
    return found


def _stacks(name: str, delta: np.ndarray) -> Deltas:
    """Every projection of the experts (experts, out, in) is a stack; transformers has gate over up in one tensor."""
    _, _, layer, *_, projection = name.split(".")
    if projection == "gate_up_proj":
        gate, up = np.split(delta, 2, axis=1)
        return {f"blk.{layer}.ffn_gate_exps.weight": gate, f"blk.{layer}.ffn_up_exps.weight": up}
    return {f"blk.{layer}.ffn_{projection.removesuffix('_proj')}_exps.weight": delta}


def applied(path: Path) -> Deltas:
    """(alpha / r) B A of every pair in the file, (alpha / r) (B A)^T of an embedding's, in float64."""
    reader = gguf.GGUFReader(path)
    alpha = reader.fields["adapter.lora.alpha"].contents()
    data = {tensor.name: _floats(tensor) for tensor in reader.tensors}
    found = {}
    for name in [name.removesuffix(".lora_a") for name in data if name.endswith(".lora_a")]:
        a, b = data[f"{name}.lora_a"], data[f"{name}.lora_b"]
        found[name] = alpha / b.shape[-1] * (a @ b.T if name == "token_embd.weight" else b @ a)
    return found


def _floats(tensor: gguf.gguf_reader.ReaderTensor) -> np.ndarray:
    shape = tensor.shape.tolist()[::-1]
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape).astype(np.float64)


def verdict(path: Path, truth: Deltas, allowed: float = 1e-6) -> Verdict:
    """How a converted adapter compares with the truth.

    Args:
        allowed: the relative error of a delta that its storage type explains.
    """
    reader = gguf.GGUFReader(path)
    if reader.fields["general.type"].contents() != "adapter":
        return "no adapter"
    found = applied(path)
    assert found.keys() <= truth.keys(), f"{found.keys() - truth.keys()} are not changed by PEFT"
    worst = max(reference.relative_error(found[name], truth[name]) for name in found)
    if worst > PLAINLY:
        return "off"
    assert worst <= allowed, f"off by {worst:.2g}, which is neither right nor plainly wrong"
    if found.keys() == truth.keys():
        return "right"
    whole = {tensor.name for tensor in reader.tensors if not tensor.name.endswith((".lora_a", ".lora_b"))}
    return "not applied" if whole else "parts missing"
