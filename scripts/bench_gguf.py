"""References as GGUF: written from safetensors in one of ggml's types, and read back whole as one would without us.

Both directions go by the gguf package: its map of tensor names, its writer, its reader and its dequantize. llama.cpp's
row order of queries and keys (the two halves of a head interleaved) is made and undone here independently of the
package under test, from the formula in llama.cpp's converter. Llama models only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as QType
from safetensors import safe_open

PROJECTIONS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""The seven projections of a layer in llama.cpp's words and in PEFT's."""


def module_of(name: str) -> str:
    """The PEFT module of a GGUF weight; other names as they are."""
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    return f"model.layers.{match[1]}.{PROJECTIONS[match[2]]}" if match and match[2] in PROJECTIONS else name


def llama_rows(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Rows (out, n) of queries or keys from PEFT's order into llama.cpp's."""
    return np.ascontiguousarray(matrix.reshape(heads, 2, -1, matrix.shape[1]).swapaxes(1, 2)).reshape(matrix.shape)


def peft_rows(matrix: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `llama_rows`."""
    return np.ascontiguousarray(matrix.reshape(heads, -1, 2, matrix.shape[1]).swapaxes(1, 2)).reshape(matrix.shape)


def write_model(path: Path, checkpoint: Path, qtype: QType) -> Path:
    """A checkpoint's `model.safetensors` as GGUF, as a stream: matrices in `qtype`, vectors in F32.

    Args:
        checkpoint: a directory with config.json of a LlamaForCausalLM.
    """
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    with safe_open(checkpoint / "model.safetensors", "pt") as source:
        keys = list(source.keys())
        for key in keys:
            shape = tuple(source.get_slice(key).get_shape())
            add_tensor_info(writer, f"{names.get_name(key.removesuffix('.weight'))}.weight", shape, qtype)
        start_tensors(writer)
        for key in keys:
            writer.write_tensor_data(_encoded(key, source.get_tensor(key), config, qtype))
    writer.close()
    return path


def add_tensor_info(writer: gguf.GGUFWriter, name: str, shape: tuple[int, ...], qtype: QType) -> None:
    """Announces a tensor of `shape`, in F32 unless it is a matrix."""
    kind = qtype if len(shape) > 1 else QType.F32
    stored = gguf.quants.quant_shape_to_byte_shape(shape, kind)
    writer.add_tensor_info(name, stored, np.dtype(np.uint8), int(np.prod(stored)), raw_dtype=kind)


def start_tensors(writer: gguf.GGUFWriter) -> None:
    """Writes the header; `write_tensor_data` follows for each announced tensor, in their order."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def encoded(matrix: np.ndarray, qtype: QType) -> np.ndarray:
    """The stored bytes of a float32 matrix, rounded by libggml."""
    from converters.ggml import encode

    return np.frombuffer(encode(torch.from_numpy(np.ascontiguousarray(matrix)), qtype), np.uint8)


def _encoded(key: str, tensor: torch.Tensor, config: Mapping[str, Any], qtype: QType) -> np.ndarray:
    values = tensor.float().numpy()
    for projection, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
        if key.endswith(f"{projection}.weight"):
            values = llama_rows(values, config[heads])
    return encoded(values, qtype if values.ndim > 1 else QType.F32)


def load_whole(path: str | Path) -> dict[str, torch.Tensor]:
    """Every tensor in float32 by PEFT's name, dequantized by the gguf package: what transformers does with a GGUF
    file, too."""
    reader = gguf.GGUFReader(path)
    return dict(_loaded(reader))


def _loaded(reader: gguf.GGUFReader) -> Iterator[tuple[str, torch.Tensor]]:
    counts = {"attn_q": "llama.attention.head_count", "attn_k": "llama.attention.head_count_kv"}
    heads = {name: int(reader.fields[key].contents()) for name, key in counts.items()}
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        short = tensor.name.removesuffix(".weight").rpartition(".")[2]
        if short in heads:
            values = peft_rows(values, heads[short])
        name = module_of(tensor.name)
        yield name if name == tensor.name else f"{name}.weight", torch.from_numpy(values)
