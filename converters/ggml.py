"""ggml's tensor types: float32 values to stored bytes and back, exactly as llama.cpp rounds them."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from converters.gguf_types import TENSOR_TYPES

if TYPE_CHECKING:
    import torch

QType = GGMLQuantizationType

OUTTYPES = {"f32": QType.F32, "f16": QType.F16, "bf16": QType.BF16, "q8_0": QType.Q8_0}
"""What `--outtype` calls the types that an adapter can be written in."""


def nbytes(shape: tuple[int, ...], qtype: QType) -> int:
    """The stored size; the innermost dimension must be whole blocks."""
    kind, elements = TENSOR_TYPES[qtype], prod(shape)
    assert elements == 0 or fits(shape, qtype), f"{shape} is no whole number of {kind.name} blocks"
    return elements // kind.block * kind.nbytes


def fits(shape: tuple[int, ...], qtype: QType) -> bool:
    """Whether rows of this shape are whole blocks of the type."""
    return shape[-1] % TENSOR_TYPES[qtype].block == 0


def encode(tensor: torch.Tensor, qtype: QType) -> bytes:
    """A float32 CPU tensor as stored bytes, rounded to nearest even (Q8_0: by blocks of 32 along the rows)."""
    import torch

    if qtype == QType.F32:
        return tensor.contiguous().numpy().tobytes()
    if qtype == QType.F16:
        return tensor.to(torch.float16).contiguous().numpy().tobytes()
    if qtype == QType.BF16:
        return tensor.to(torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes()
    return bytes(quantize(tensor.contiguous().numpy(), qtype).tobytes())


def decode(data: bytes, shape: tuple[int, ...], qtype: QType) -> torch.Tensor:
    """Stored bytes as a float32 tensor of `shape`."""
    import numpy as np
    import torch

    floats = {QType.F32: torch.float32, QType.F16: torch.float16, QType.BF16: torch.bfloat16}
    if qtype in floats:
        return torch.frombuffer(bytearray(data), dtype=floats[qtype]).reshape(shape).float()
    rows = np.frombuffer(data, dtype=np.uint8).reshape(*shape[:-1], -1)
    return torch.from_numpy(dequantize(rows, qtype)).reshape(shape)
