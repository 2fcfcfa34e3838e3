"""The tensors of a GGUF model, whole or split, read lazily through a map of each file.

A file in the other byte order is turned where the gguf package's gguf-convert-endian knows how: the float types,
and the quantized types whose only fields of more than a byte are 16-bit scales at known places.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from converters.errors import FormatError, UnsupportedError
from converters.gguf_metadata import ByteOrder, GgufHeader, GgufTensor
from converters.paths import mapped
from converters.tensors import TensorInfo

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
_INTEGERS = {"I8", "I16", "I32", "I64"}
_FIELDS = {
    "F32": ((0, 4),), "F16": ((0, 2),), "BF16": ((0, 2),), "F64": ((0, 8),), "Q4_0": ((0, 2),), "Q8_0": ((0, 2),),
    "Q4_K": ((0, 2), (2, 2)), "Q6_K": ((208, 2),), "MXFP4": (), "NVFP4": (),
}  # fmt: skip
"""Offset and size of what a block holds in numbers of more than a byte."""


@dataclass(frozen=True)
class _Matrix:
    """A tensor seen as a matrix of `rows` rows of `row_bytes` bytes."""

    tensor: GgufTensor
    header: GgufHeader
    dtype: str
    rows: int
    row_bytes: int
    block_bytes: int

    def unsupported(self, message: str) -> UnsupportedError:
        return UnsupportedError(message, file=self.header.path, tensor=self.tensor.name)


class GgufTensors:
    """The tensors of one model (a `TensorSource`), its files mapped at first use.

    Args:
        headers: of all its shards.
    """

    def __init__(self, headers: Sequence[GgufHeader]) -> None:
        self._owner = {name: header for header in headers for name in header.tensors}
        self._infos = {name: _info(header.tensors[name]) for name, header in self._owner.items()}
        self._maps: dict[Path, mmap.mmap] = {}

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """All tensors by name; `dtype` is ggml's name of the type, F32 or Q4_K."""
        return self._infos

    def file_of(self, name: str) -> Path:
        return self._owner[name].path

    def load(self, name: str) -> torch.Tensor:
        """The tensor in its stored type (F32, F16, BF16, F64; it shares the file's pages), else float32.

        Raises:
            UnsupportedError: it holds integers, is of a type that can't be read, or in a byte order that can't be
                turned.
            FormatError: the file was changed meanwhile, or has no room for what the header announces.
            FileMissingError: the file is gone.
        """
        shape = self._infos[name].shape
        return self.rows(name, 0, prod(shape[:-1])).reshape(shape)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of the tensor seen as a matrix, all dimensions but the last merged; see `load`."""
        import torch

        from converters.ggml import dequantize

        matrix = self._matrix(name)
        if matrix.dtype in _INTEGERS:
            raise matrix.unsupported(f"is stored as {matrix.dtype}; weights are floats or quantized")
        stored = self._stored(matrix, start, stop, sys.byteorder)
        if matrix.dtype not in _FLOATS:
            try:
                return dequantize(stored, matrix.tensor.qtype)
            except UnsupportedError as error:
                raise matrix.unsupported(error.message) from None
        if stored.ctypes.data % matrix.block_bytes:  # general.alignment may be 1
            stored = stored.copy()
        flat = torch.from_numpy(stored.reshape(-1)).view(getattr(torch, _FLOATS[matrix.dtype]))
        return flat.reshape(stop - start, matrix.row_bytes // matrix.block_bytes)

    def blocks(self, name: str, start: int, stop: int) -> NDArray[np.uint8]:
        """The stored bytes of rows [start, stop), (rows, bytes of a row), their numbers little-endian; see `load`."""
        return self._stored(self._matrix(name), start, stop, "little")

    def prefetch(self, name: str) -> None:
        tensor, header = self._owner[name].tensors[name], self._owner[name]
        if hasattr(mmap, "MADV_WILLNEED") and tensor.nbytes:
            begin = tensor.offset // mmap.PAGESIZE * mmap.PAGESIZE
            self._mapped(header).madvise(mmap.MADV_WILLNEED, begin, tensor.offset + tensor.nbytes - begin)

    def _matrix(self, name: str) -> _Matrix:
        from converters.ggml import block_of, unknown_type

        header = self._owner[name]
        tensor = header.tensors[name]
        kind = block_of(tensor.qtype)
        if kind is None:
            raise UnsupportedError(unknown_type(tensor.qtype), file=header.path, tensor=name)
        columns = tensor.shape[-1] if tensor.shape else 1
        rows, row_bytes = prod(tensor.shape[:-1]), columns // kind.block * kind.nbytes
        # The header's reader has checked this for the types that it knows.
        if columns % kind.block or rows * row_bytes > tensor.nbytes:
            found = f"{rows} rows of {columns} elements, and room for {tensor.nbytes} bytes"
            raise FormatError(
                f"has {found}; {kind.name} takes {kind.nbytes} bytes for {kind.block} elements of a row",
                file=header.path,
                tensor=name,
            )
        return _Matrix(tensor, header, kind.name, rows, row_bytes, kind.nbytes)

    def _stored(self, matrix: _Matrix, start: int, stop: int, order: ByteOrder) -> NDArray[np.uint8]:
        """The bytes of some rows: a view of the file, or a copy in another byte order."""
        import numpy as np

        assert 0 <= start <= stop <= matrix.rows, f"rows {start} to {stop} of {matrix.rows}"
        shape = (stop - start, matrix.row_bytes)
        offset = matrix.tensor.offset + start * matrix.row_bytes
        view = np.frombuffer(self._mapped(matrix.header), np.uint8, prod(shape), offset).reshape(shape)
        return view if order == matrix.header.byte_order else _turned(view, matrix)

    def _mapped(self, header: GgufHeader) -> mmap.mmap:
        if header.path not in self._maps:
            view = mapped(header.path, "GGUF file")
            if len(view) != header.file_size:
                raise _changed(header)
            self._maps[header.path] = view
        return self._maps[header.path]


def _info(tensor: GgufTensor) -> TensorInfo:
    dtype = tensor.dtype
    if not tensor.known:
        from converters.ggml import block_of

        kind = block_of(tensor.qtype)
        dtype = kind.name if kind else dtype
    return TensorInfo(tensor.name, tensor.shape, dtype, tensor.nbytes)


def _turned(stored: NDArray[np.uint8], matrix: _Matrix) -> NDArray[np.uint8]:
    """A copy in the other byte order."""
    if matrix.dtype not in _FIELDS:
        order = matrix.header.byte_order
        raise matrix.unsupported(
            f"is {matrix.dtype} in {order}-endian order, which can't be turned here, nor by gguf-convert-endian; only "
            f"{', '.join(_FIELDS)} can. Take a {'little' if order == 'big' else 'big'}-endian file of the model"
        )
    blocks = stored.copy().reshape(-1, matrix.block_bytes)
    for offset, size in _FIELDS[matrix.dtype]:
        field = blocks[:, offset : offset + size]
        field[:] = field[:, ::-1]
    return blocks.reshape(stored.shape)


def _changed(header: GgufHeader) -> FormatError:
    return FormatError("was changed while it was read", file=header.path)
