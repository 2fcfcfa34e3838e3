"""What llama.cpp's quantizer calls its kinds of files, and how large they get."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from converters.errors import UsageError
from converters.gguf_metadata import GgufHeader, GgufTensor
from converters.gguf_types import TENSOR_TYPES, TensorType


@dataclass(frozen=True)
class FileType:
    """A mixture of tensor types.

    Attributes:
        name: as llama-quantize spells it.
        number: llama.h's `llama_ftype`, which becomes `general.file_type`.
        qtype: the tensor type that most matrices get.
    """

    name: str
    number: int
    qtype: int

    @property
    def plain(self) -> bool:
        """Whether all matrices get this one type, nothing better for the more delicate ones."""
        return self.name in _PLAIN

    @property
    def block(self) -> int:
        """Matrices whose rows are whole blocks of so many elements get the type that they are meant for."""
        if self.plain or self.name == "MXFP4_MOE":
            return TENSOR_TYPES[self.qtype].block
        return _LARGEST_BLOCK  # every other mixture has k-quants in it


PADDING = 32
"""Bytes that the quantizer pads tensors to."""
_PLAIN = {"F32", "F16", "BF16", "Q8_0"}
_LARGEST_BLOCK = 256
# llama.h of llama-cpp-python 0.3.36, and `llama_ftype_get_default_type` in its llama-quant.cpp
FILE_TYPES = {
    name: FileType(name, number, qtype)
    for name, number, qtype in (
        ("F32", 0, 0), ("F16", 1, 1), ("BF16", 32, 30), ("Q8_0", 7, 8), ("Q6_K", 18, 14),
        ("Q5_K_M", 17, 13), ("Q5_K_S", 16, 13), ("Q5_1", 9, 7), ("Q5_0", 8, 6),
        ("Q4_K_M", 15, 12), ("Q4_K_S", 14, 12), ("Q4_1", 3, 3), ("Q4_0", 2, 2), ("IQ4_NL", 25, 20), ("IQ4_XS", 30, 23),
        ("Q3_K_L", 13, 11), ("Q3_K_M", 12, 11), ("Q3_K_S", 11, 11),
        ("IQ3_M", 27, 21), ("IQ3_S", 26, 21), ("IQ3_XS", 22, 21), ("IQ3_XXS", 23, 18),
        ("Q2_K", 10, 10), ("Q2_K_S", 21, 10), ("IQ2_M", 29, 22), ("IQ2_S", 28, 17), ("IQ2_XS", 20, 17),
        ("IQ2_XXS", 19, 16), ("IQ1_M", 31, 29), ("IQ1_S", 24, 19),
        ("TQ2_0", 37, 35), ("TQ1_0", 36, 34), ("Q2_0", 41, 42), ("Q1_0", 40, 41), ("MXFP4_MOE", 38, 39),
    )
}  # fmt: skip
_ALIASES = {"Q5_K": "Q5_K_M", "Q4_K": "Q4_K_M", "Q3_K": "Q3_K_M"}
_Q8_0, _F16 = TENSOR_TYPES[8], TENSOR_TYPES[1]
_WIDE = ("token_embd.weight", "per_layer_token_embd.weight", "output.weight")
_MIXED = 1.4  # better types for some matrices add up to a quarter in an ordinary model; the rest is reserve


def file_type(name: str) -> FileType:
    """What llama-quantize means by a name, in whatever case.

    Raises:
        UsageError: it has no such name.
    """
    upper = name.upper()
    found = FILE_TYPES.get(_ALIASES.get(upper, upper))
    if found is None:
        raise UsageError(f"unknown outtype {name!r}; models can be {', '.join((*FILE_TYPES, *_ALIASES))}")
    return found


def quantized_size(headers: Sequence[GgufHeader], wanted: FileType) -> int:
    """Bytes that the quantizer's output should not exceed: up to twice what it takes.

    Args:
        headers: of all shards of its source.
    """
    sizes = [_stored(tensor, wanted) for header in headers for tensor in header.tensors.values()]
    return sum(header.data_start for header in headers) + math.ceil(sum(sizes)) + PADDING * len(sizes)


def _stored(tensor: GgufTensor, wanted: FileType) -> float:
    if not is_quantized_again(tensor):
        return tensor.nbytes
    columns, kind = tensor.shape[-1], TENSOR_TYPES[wanted.qtype]
    if wanted.name == "MXFP4_MOE" or tensor.name in _WIDE or columns % kind.block:
        kind = max(kind, _Q8_0, key=_density)
    if columns % kind.block:
        kind = _F16
    return tensor.elements * _density(kind) * (1 if wanted.plain or kind is _Q8_0 else _MIXED)


def _density(kind: TensorType) -> float:
    """Bytes per element."""
    return kind.nbytes / kind.block


def is_quantized_again(tensor: GgufTensor) -> bool:
    """Whether the quantizer gives a tensor another type: matrices and stacks of them, but for norms and the like."""
    return (
        any(size > 1 for size in tensor.shape[:-1])
        and tensor.name.endswith("weight")
        and "_norm.weight" not in tensor.name
        and "ffn_gate_inp.weight" not in tensor.name
    )
