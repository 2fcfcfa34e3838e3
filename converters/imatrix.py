"""Importance matrices as llama-imatrix writes them: how much an error in each column of a weight costs.

A GGUF file with two tensors for each weight W: `W.in_sum2`, sums of squared activations, and `W.counts`, the tokens
that each matrix of a stack has seen. The weight of a column is their quotient, or 1 where no token came by.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from converters.errors import FormatError
from converters.gguf_header import read_gguf_header
from converters.gguf_metadata import GgufHeader, GgufTensor
from converters.gguf_types import TENSOR_TYPES

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SUMS, _COUNTS = ".in_sum2", ".counts"
"""What the tensors of a weight are called, behind its name."""


def check_imatrix(path: str | Path) -> GgufHeader:
    """The header of an importance matrix.

    Raises:
        FileMissingError: it can't be read. FormatError: it is none, or of the kind that is no GGUF file.
    """
    header = read_gguf_header(path, "GGUF importance matrix")
    names = {name.removesuffix(SUMS) for name in header.tensors if name.endswith(SUMS)}
    if not names:
        raise FormatError(f"has no tensor that ends in {SUMS}: no importance matrix", file=path)
    for name in sorted(names):
        counts = header.tensors.get(name + _COUNTS)
        if counts is None:
            raise FormatError(f"has sums and no {name + _COUNTS!r}", file=path, tensor=name + SUMS)
        _check_pair(header, header.tensors[name + SUMS], counts)
    return header


def _check_pair(header: GgufHeader, sums: GgufTensor, counts: GgufTensor) -> None:
    for tensor in (sums, counts):
        if tensor.dtype != "F32":
            raise FormatError(f"is stored as {tensor.dtype}, expected F32", file=header.path, tensor=tensor.name)
    if not counts.elements or not sums.elements or sums.elements % counts.elements:
        found = f"{sums.elements} sums and {counts.elements} counts: they don't divide"
        raise FormatError(found, file=header.path, tensor=sums.name)


def read_imatrix(path: str | Path) -> Mapping[str, NDArray[np.float32]]:
    """For each weight the importance of its columns, float32 (matrices * columns,).

    Raises:
        FileMissingError, FormatError: see `check_imatrix`; or a value is no finite number.
    """
    import numpy as np

    header, weights = check_imatrix(path), {}
    for name, sums in header.tensors.items():
        if not name.endswith(SUMS):
            continue
        weight = name.removesuffix(SUMS)
        counts = np.rint(_values(header, header.tensors[weight + _COUNTS]))[:, None]
        with np.errstate(all="ignore"):
            means = _values(header, sums).reshape(len(counts), -1) / counts
        importance = np.where(counts > 0, means, np.float32(1)).astype(np.float32)
        if not np.isfinite(importance).all():
            raise FormatError("holds values that are not finite", file=header.path, tensor=name)
        weights[weight] = importance.reshape(-1)
    return weights


def _values(header: GgufHeader, tensor: GgufTensor) -> NDArray[np.float32]:
    import numpy as np

    order = ">" if header.byte_order == "big" else "<"
    assert tensor.nbytes == tensor.elements * TENSOR_TYPES[tensor.qtype].nbytes
    values = np.fromfile(header.path, f"{order}f4", tensor.elements, offset=tensor.offset)
    return values.astype(np.float32)
