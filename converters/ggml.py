"""ggml's tensor types: float32 values to stored bytes and back, exactly as llama.cpp rounds them.

libggml does the work where it is there, several times faster than the gguf package and equal to the bit: where a
formula adds to a product, the product is exact in float32, so that it does not matter whether a compiler fused them.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from math import prod
from typing import TYPE_CHECKING

import numpy as np
from gguf import GGMLQuantizationType, quants

from converters import libggml
from converters.errors import UnsupportedError
from converters.gguf_types import TENSOR_TYPES, TensorType

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

QType = GGMLQuantizationType

OUTTYPES = {"f32": QType.F32, "f16": QType.F16, "bf16": QType.BF16, "q8_0": QType.Q8_0}
"""What `--outtype` calls the types that an adapter can be written in."""

_LEAST_SHARE = 1 << 18  # elements that are worth a thread
_MOST_SHARE = 1 << 30  # elements; libggml counts them in int


def nbytes(shape: tuple[int, ...], qtype: int) -> int:
    """The stored size; the innermost dimension must be whole blocks."""
    kind, elements = TENSOR_TYPES[qtype], prod(shape)
    assert elements == 0 or fits(shape, qtype), f"{shape} is no whole number of {kind.name} blocks"
    return elements // kind.block * kind.nbytes


def fits(shape: tuple[int, ...], qtype: int) -> bool:
    """Whether rows of this shape are whole blocks of the type."""
    return shape[-1] % TENSOR_TYPES[qtype].block == 0


def block_of(qtype: int) -> TensorType | None:
    """Name and block of a type, of those that only the installed libggml knows too; None for an unknown number."""
    kind = TENSOR_TYPES.get(qtype)
    if kind is None and (library := libggml.library()) is not None:
        kind = library.type_of(qtype)
    return kind


def unknown_type(qtype: int) -> str:
    """What is to be said of a tensor whose type `block_of` does not know."""
    return (
        f"has the tensor type {qtype}, which this version of ggml does not know; update llama-cpp-python, or take a "
        f"file in another type"
    )


def encode(tensor: torch.Tensor, qtype: int, importance: torch.Tensor | None = None) -> bytes:
    """A float32 CPU tensor as stored bytes, rounded to nearest even (quantized types: by blocks along the rows).

    Args:
        importance: float32 (columns,), what an error in each column costs; the types that need no importance
            matrix take one as well, except for F32, F16, BF16 and Q8_0.

    Raises:
        UnsupportedError: the type needs libggml or an importance matrix and there is none, or can't be quantized;
            or the tensor holds values that are not finite.
    """
    import torch

    if qtype == QType.F32:
        return tensor.contiguous().numpy().tobytes()
    if qtype == QType.F16:
        return tensor.to(torch.float16).contiguous().numpy().tobytes()
    if qtype == QType.BF16:
        return tensor.to(torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes()
    if qtype == QType.Q8_0:
        return _quantize_q8_0(tensor.contiguous())
    return _quantize(tensor.contiguous(), qtype, importance)


def check_storable(qtype: int) -> None:
    """Whether `encode` can store a type without an importance matrix, known before there are values.

    Raises:
        UnsupportedError: it can't; as `encode` says it.
    """
    import torch

    kind = block_of(qtype)
    encode(torch.zeros(1, kind.block if kind else 1), qtype)


def decode(data: bytes, shape: tuple[int, ...], qtype: int) -> torch.Tensor:
    """Stored bytes as a float32 tensor of `shape`."""
    import torch

    floats = {QType.F32: torch.float32, QType.F16: torch.float16, QType.BF16: torch.bfloat16}
    if qtype in floats:
        return torch.frombuffer(bytearray(data), dtype=floats[QType(qtype)]).reshape(shape).float()
    rows = np.frombuffer(data, dtype=np.uint8).reshape(prod(shape[:-1]), -1)
    return dequantize(rows, qtype).reshape(shape)


def dequantize(blocks: NDArray[np.uint8], qtype: int, out: torch.Tensor | None = None) -> torch.Tensor:
    """Stored rows of a quantized type as float32 values, on as many threads as torch uses.

    Args:
        blocks: (rows, bytes of a row), in this machine's byte order; may be read-only.
        out: float32 (rows, columns), contiguous, that receives the values; made anew if missing.

    Raises:
        UnsupportedError: neither libggml nor the gguf package reads the type.
    """
    import torch

    kind = block_of(qtype)
    if kind is None:
        raise UnsupportedError(unknown_type(qtype))
    rows, row_bytes = blocks.shape
    shape = (rows, row_bytes // kind.nbytes * kind.block)
    assert row_bytes % kind.nbytes == 0, f"{row_bytes} bytes are no whole number of {kind.name} blocks"
    if not blocks.size:  # of any number of rows: numpy would count their bytes
        return torch.empty(shape) if out is None else out
    if out is None:  # numpy's memory comes in huge pages where it can: 8192 page faults cost more than the arithmetic
        out = torch.from_numpy(np.empty(shape, np.float32))
    assert out.shape == shape and out.dtype == torch.float32 and out.is_contiguous()
    library = _library_for(qtype, kind)
    native = None if library is None else library.dequantizer(qtype)
    if native is None:
        _dequantize_in_numpy(blocks, qtype, kind, out)
    else:
        _dequantize_natively(blocks, native, kind, out)
    return out


def _library_for(qtype: int, kind: TensorType) -> libggml.Library | None:
    """libggml, if it is there and means the same by the number as the table."""
    library = libggml.library()
    return library if library is not None and library.type_of(qtype) == kind else None


def _dequantize_natively(
    blocks: NDArray[np.uint8], native: libggml.Dequantize, kind: TensorType, out: torch.Tensor
) -> None:
    blocks = np.ascontiguousarray(blocks)
    if blocks.ctypes.data % 2 and kind.nbytes % 2 == 0:  # fields of 16 bits, misaligned: not for every processor
        blocks = blocks.copy()
    source, target = blocks.ctypes.data, out.data_ptr()

    def share(start: int, stop: int) -> None:
        native(source + start * kind.nbytes, target + 4 * start * kind.block, (stop - start) * kind.block)

    _in_shares(blocks.size // kind.nbytes, kind.block, share)


def _dequantize_in_numpy(blocks: NDArray[np.uint8], qtype: int, kind: TensorType, out: torch.Tensor) -> None:
    step = max(1, _LEAST_SHARE // out.shape[1])  # rows at a time: numpy needs several times their size
    for start in range(0, len(blocks), step):
        try:
            with np.errstate(all="ignore"):
                values = quants.dequantize(blocks[start : start + step], _gguf_type(qtype))
        except NotImplementedError:
            raise UnsupportedError(f"is stored as {kind.name}, {_which_libggml('reads')}") from None
        out[start : start + step].numpy()[:] = values


def _gguf_type(qtype: int) -> QType:
    try:
        return QType(qtype)
    except ValueError:
        raise NotImplementedError from None


def _which_libggml(does: str) -> str:
    """The rest of a sentence about a type that can't be had."""
    if libggml.library() is None:
        return f"which only libggml {does}: install llama-cpp-python (the extra safelora-gguf[llama])"
    return f"which nothing here {does}: update llama-cpp-python, or choose another type"


def _quantize_q8_0(tensor: torch.Tensor) -> bytes:
    """The one quantized type that is stored whatever the values are, which callers then see in its error."""
    from converters.in_cache import is_finite

    library = _library_for(QType.Q8_0, TENSOR_TYPES[QType.Q8_0])
    if library is None or not library.quantizes(QType.Q8_0) or not tensor.numel() or not is_finite(tensor):
        return bytes(quants.quantize(tensor.numpy(), QType.Q8_0).tobytes())
    return _quantize_natively(tensor, QType.Q8_0, TENSOR_TYPES[QType.Q8_0], library, None)


def _quantize(tensor: torch.Tensor, qtype: int, importance: torch.Tensor | None) -> bytes:
    from converters.in_cache import is_finite

    kind = block_of(qtype)
    if kind is None:
        raise UnsupportedError(unknown_type(qtype))
    assert tensor.shape[-1] % kind.block == 0, f"{tuple(tensor.shape)} is no whole number of {kind.name} blocks"
    if not tensor.numel():
        return b""
    if not is_finite(tensor):  # libggml aborts the process on some
        raise UnsupportedError(f"holds values that are not finite, which {kind.name} can't store")
    library = _library_for(qtype, kind)
    if library is None or not library.quantizes(qtype):
        return _quantize_in_numpy(tensor, qtype, kind, importance)
    if importance is None and library.requires_importance(qtype):
        raise UnsupportedError(f"can't be stored as {kind.name} without an importance matrix: choose another type")
    return _quantize_natively(tensor, qtype, kind, library, importance)


def _quantize_natively(
    tensor: torch.Tensor, qtype: int, kind: TensorType, library: libggml.Library, importance: torch.Tensor | None
) -> bytes:
    columns = tensor.shape[-1]
    rows = tensor.numel() // columns
    weights = None if importance is None else importance.float().contiguous()
    assert weights is None or weights.shape == (columns,)
    blocks = np.empty((rows, columns // kind.block * kind.nbytes), np.uint8)
    source, target = tensor.data_ptr(), blocks.ctypes.data

    def share(start: int, stop: int) -> None:
        address = None if weights is None else weights.data_ptr()
        rows = stop - start
        library.quantize(qtype, source, target, start=start, rows=rows, columns=columns, importance=address)

    _in_shares(rows, columns, share)
    return blocks.tobytes()


def _quantize_in_numpy(tensor: torch.Tensor, qtype: int, kind: TensorType, importance: torch.Tensor | None) -> bytes:
    if importance is None:
        try:
            return bytes(quants.quantize(tensor.numpy(), _gguf_type(qtype)).tobytes())
        except NotImplementedError:
            pass
    how = "" if importance is None else " by an importance matrix"
    raise UnsupportedError(f"can't be stored as {kind.name}{how}, {_which_libggml('writes')}")


def _in_shares(units: int, elements: int, work: Callable[[int, int], None]) -> None:
    """Calls `work(start, stop)` over all units, of so many elements each, on as many threads as torch uses."""
    import torch

    threads = torch.get_num_threads()
    least, most = (max(1, limit // elements) for limit in (_LEAST_SHARE, _MOST_SHARE))
    share = min(max(-(-units // threads), least), most)
    starts = range(0, units, share)
    if len(starts) > 1:
        list(_pool(threads).map(lambda start: work(start, min(start + share, units)), starts))
    else:
        work(0, units)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="ggml")
