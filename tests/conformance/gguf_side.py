"""What GGUF files hold, by the gguf package, and llama.cpp's order of rows, written as lists of places."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np


def tensors(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Type, shape and stored bytes by name."""
    return {
        tensor.name: (tensor.tensor_type.name, tuple(tensor.shape.tolist()), tensor.data.tobytes())
        for tensor in gguf.GGUFReader(path).tensors
    }


def facts(path: Path) -> dict[str, Any]:
    """The metadata that llama.cpp acts upon, with its types."""
    fields = gguf.GGUFReader(path).fields
    keys = ("general.type", "general.architecture", "adapter.type", "adapter.lora.alpha")
    return {key: (fields[key].types, fields[key].contents()) for key in keys}


def deltas(path: Path) -> dict[str, np.ndarray]:
    """What llama.cpp adds to each weight or stack of weights, (alpha / r) B A in float64, by GGUF name."""
    reader = gguf.GGUFReader(path)
    alpha = reader.fields["adapter.lora.alpha"].contents()
    data = {tensor.name: tensor.data.astype(np.float64) for tensor in reader.tensors}
    names = [name.removesuffix(".lora_a") for name in data if name.endswith(".lora_a")]
    return {name: alpha / data[f"{name}.lora_a"].shape[-2] * data[f"{name}.lora_b"] @ data[f"{name}.lora_a"]
            for name in names}  # fmt: skip


def rotary_rows(rows: int, heads: int) -> list[int]:
    """Which row of a head-wise matrix llama.cpp's llama has at each place: 0, half, 1, half + 1, ... of each head."""
    size = rows // heads
    within = [place // 2 + (place % 2) * (size // 2) for place in range(size)]
    return [head * size + place for head in range(heads) for place in within]


def ungrouped_rows(rows: int, heads: int, key_value_heads: int) -> list[int]:
    """Which row of Falcon's fused matrix llama.cpp has at each place: its groups' queries, then keys, then values."""
    size = rows // (heads + 2 * key_value_heads)
    shared = heads // key_value_heads
    starts = [group * (shared + 2) for group in range(key_value_heads)]  # in heads
    queries = [start + head for start in starts for head in range(shared)]
    order = [*queries, *(start + shared for start in starts), *(start + shared + 1 for start in starts)]
    return [head * size + row for head in order for row in range(size)]
