"""ggml's tensor types: float32 values to stored bytes and back, exactly as llama.cpp rounds them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize

if TYPE_CHECKING:
    import torch

QType = GGMLQuantizationType

OUTTYPES = {"f32": QType.F32, "f16": QType.F16, "bf16": QType.BF16, "q8_0": QType.Q8_0}
"""What `--outtype` calls the types that an adapter can be written in."""


def nbytes(shape: tuple[int, ...], qtype: QType) -> int:
    """The stored size; the innermost dimension must be whole blocks."""
    block, size = GGML_QUANT_SIZES[qtype]
    elements = 1
    for dimension in shape:
        elements *= dimension
    assert elements == 0 or shape[-1] % block == 0, f"{shape} is no whole number of {qtype.name} blocks"
    return elements // block * size


def fits(shape: tuple[int, ...], qtype: QType) -> bool:
    """Whether rows of this shape are whole blocks of the type."""
    return bool(shape[-1] % GGML_QUANT_SIZES[qtype][0] == 0)


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
