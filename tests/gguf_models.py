"""GGUF models and adapters written with the gguf package, from Hugging Face tensors: the other hand to our readers.

Names come from the package's own map, llama's row order from the formula in llama.cpp's converter.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from converters.ggml import QType, encode

FLOATS = {QType.F32: np.float32, QType.F16: np.float16}


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows (out, ...) in llama.cpp's order: w.reshape(n, 2, rows / n / 2, ...).swapaxes(1, 2)."""
    rows = weight.shape[0]
    swapped = weight.reshape(heads, 2, rows // heads // 2, *weight.shape[1:]).swapaxes(1, 2)
    return np.ascontiguousarray(swapped.reshape(weight.shape))


def _rows(module: str, weight: np.ndarray, settings: Mapping[str, Any]) -> np.ndarray:
    if settings["architectures"][0] == "LlamaForCausalLM":
        if module.endswith("q_proj"):
            return permuted(weight, settings["num_attention_heads"])
        if module.endswith("k_proj"):
            return permuted(weight, settings["num_key_value_heads"])
    return weight


def _names(settings: Mapping[str, Any]) -> tuple[str, gguf.TensorNameMap]:
    arch = {"LlamaForCausalLM": gguf.MODEL_ARCH.LLAMA, "Qwen2ForCausalLM": gguf.MODEL_ARCH.QWEN2,
            "Qwen3ForCausalLM": gguf.MODEL_ARCH.QWEN3}[settings["architectures"][0]]  # fmt: skip
    return gguf.MODEL_ARCH_NAMES[arch], gguf.get_tensor_name_map(arch, settings["num_hidden_layers"])


def write_gguf_model(
    path: Path, tensors: Mapping[str, torch.Tensor], settings: Mapping[str, Any], qtype: QType = QType.F32
) -> Path:
    """A model of `config.json` settings; matrices in `qtype`, vectors in F32."""
    architecture, names = _names(settings)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_head_count(settings["num_attention_heads"])
    writer.add_head_count_kv(settings["num_key_value_heads"])
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        weight = _rows(module, tensor.float().numpy(), settings)
        put(writer, names.get_name(module) + ".weight", weight, qtype if weight.ndim > 1 else QType.F32)
    finish(writer)
    return path


def write_gguf_adapter(
    path: Path,
    pairs: Mapping[str, torch.Tensor],
    settings: Mapping[str, Any],
    *,
    alpha: float | None = 8.0,
    qtype: QType = QType.F32,
) -> Path:
    """An adapter from PEFT's tensors (`base_model.model.X.lora_A.weight`)."""
    architecture, names = _names(settings)
    writer = adapter_writer(path, architecture, alpha)
    for key, tensor in pairs.items():
        module, half = key.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".lora_", 1)
        matrix = tensor.float().numpy()
        if half == "B":
            matrix = _rows(module, matrix, settings)
        put(writer, f"{names.get_name(module)}.weight.lora_{half.lower()}", matrix, qtype)
    finish(writer)
    return path


def adapter_writer(path: Path, architecture: str, alpha: float | None = 8.0) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    if alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    return writer


def put(writer: gguf.GGUFWriter, name: str, weight: np.ndarray, qtype: QType = QType.F32) -> None:
    """Adds a tensor, rounded to `qtype` by numpy or, for quantized types, by ggml."""
    if qtype in FLOATS:
        writer.add_tensor(name, np.ascontiguousarray(weight.astype(FLOATS[qtype])))
        return
    flat = torch.from_numpy(np.ascontiguousarray(weight.astype(np.float32)))
    data = np.frombuffer(encode(flat, qtype), np.uint8).reshape(*weight.shape[:-1], -1)
    writer.add_tensor(name, data, raw_dtype=qtype)


def write_trio(
    root: Path,
    architecture: str,
    weights: Mapping[str, tuple[np.ndarray, np.ndarray]],
    pairs: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    qtype: QType = QType.F32,
) -> tuple[Path, Path, Path]:
    """Base, aligned and adapter in GGUF's own names, of whatever architecture."""
    root.mkdir(parents=True, exist_ok=True)
    for place, role in enumerate(("base", "aligned")):
        writer = gguf.GGUFWriter(root / f"{role}.gguf", architecture)
        for name, both in weights.items():
            put(writer, name, both[place], qtype)
        finish(writer)
    writer = adapter_writer(root / "adapter.gguf", architecture)
    for name, (a, b) in pairs.items():
        put(writer, f"{name}.lora_a", a)
        put(writer, f"{name}.lora_b", b)
    finish(writer)
    return root / "base.gguf", root / "aligned.gguf", root / "adapter.gguf"


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
