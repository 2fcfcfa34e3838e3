"""Values on their way into a tensor's type: a few megabytes at a time, with what the rounding costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from converters.errors import FormatError, MismatchError, UnsupportedError
from converters.ggml import QType, block_of, decode, encode
from converters.gguf_layout import ModelTensor, Rounded
from converters.tensors import matrices_within

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

_ELEMENTS = 1 << 21  # of a tensor that are held at once: 8 MB in float32
_SERIAL = 1 << 15  # elements, so few that torch takes one thread: on a busy machine several wait long for each other
_SAFE_SQUARES = (1e-20, 1e30)  # sums in float32 that have lost nothing to its range
_LARGE = 1e9  # beyond what the 16-bit scales of the types with a grid can express, on which libggml aborts
_MOST_IMPORTANT = 1e12  # activations are far below a million
_EMBEDDING = "token_embd.weight"
_NEED_IMPORTANCE = {QType.IQ1_S, QType.IQ1_M, QType.IQ2_XXS, QType.IQ2_XS, QType.IQ2_S, QType.IQ3_XXS}
"""The types that llama-quantize (`tensor_requires_imatrix`) makes with an importance matrix alone."""


@dataclass(frozen=True)
class StoredError:
    """What rounding to the stored type cost a tensor: ||stored - wanted||_F, and that divided by ||wanted||_F.

    Attributes:
        flat: whether its type is made for an importance matrix, and every column counted the same for want of one.
    """

    relative: float
    absolute: float
    flat: bool = False


def is_flat(tensor: ModelTensor) -> bool:
    """Whether a tensor will be stored as if all its columns were of the same importance, in a type not made for it."""
    return tensor.qtype in _NEED_IMPORTANCE and isinstance(tensor.data, Rounded) and tensor.data.importance is None


def check_types(tensors: Iterable[ModelTensor]) -> None:
    """Whether the values that are to be rounded can be stored in their types, known before there are any.

    Raises:
        UnsupportedError: libggml is needed and missing, or nothing writes the type.
    """
    import torch

    seen = set()
    for tensor in tensors:
        if not isinstance(tensor.data, Rounded):
            continue
        weighted = tensor.qtype in _NEED_IMPORTANCE or tensor.data.importance is not None
        if (tensor.qtype, weighted) not in seen:
            kind = block_of(tensor.qtype)
            zeros = torch.zeros(1, kind.block if kind else 1)
            _encoded(zeros, tensor, torch.ones_like(zeros[0]) if weighted else None)
            seen.add((tensor.qtype, weighted))


def column_importance(
    weights: Mapping[str, NDArray[np.float32]], name: str, shape: tuple[int, ...], file: Path
) -> Callable[[int], torch.Tensor] | None:
    """What an importance matrix says of one tensor, in the form that `Rounded` takes; None where it says nothing.

    Args:
        weights: see `converters.imatrix.read_imatrix`, which read them from `file`.

    Raises:
        MismatchError: it was made for a tensor of another shape. FormatError: it holds what is no square.
    """
    found, columns, matrices = weights.get(name), shape[-1], prod(shape[:-2])
    if found is None:
        return None
    if found.size != columns * matrices:
        if name == _EMBEDDING:  # llama-imatrix counts its tokens, which says nothing of columns
            return None
        told = f"has {found.size} columns in the importance matrix, and {matrices} x {columns} in the model"
        raise MismatchError(f"{told}; take an importance matrix of this model", file=file, tensor=name)
    if not 0 <= found.min() <= found.max() <= _MOST_IMPORTANT:  # libggml aborts on some
        told = f"holds an importance of {found.min():.3g} to {found.max():.3g}; squares of activations were expected"
        raise FormatError(told, file=file, tensor=name)
    by_matrix = found.reshape(matrices, columns)

    def importance(number: int) -> torch.Tensor:
        import torch

        return torch.from_numpy(by_matrix[number])

    return importance


def rounded_pieces(tensor: ModelTensor) -> Generator[bytes, None, StoredError]:
    """The stored bytes of a tensor's values, piece after piece, and in the end what its type cost it.

    Values that come in the stored type, or in a type that float32 holds, are not looked at: they are exact.

    Raises:
        UnsupportedError: a value is not finite, or the type can't hold it.
    """
    assert isinstance(tensor.data, Rounded), tensor.name
    columns = tensor.shape[-1] if tensor.shape else 1
    count, step = prod(tensor.shape[:-1]), max(1, _ELEMENTS // max(1, columns))
    off = size = 0.0
    for start in range(0, count, step):
        shape = (min(step, count - start), columns)
        values = tensor.data.rows(start, start + shape[0]).cpu()
        assert values.shape == shape, f"{tensor.name}: {tuple(values.shape)} for {shape}"
        if _is_exact(values.dtype, tensor.qtype):
            yield _bytes(values.float() if tensor.qtype == QType.F32 else values)
            continue
        data, lost, square = _stored(values, start, tensor)
        off, size = off + lost, size + square
        del values
        yield data
    return StoredError(
        math.sqrt(off / size) if size else 0.0 if off == 0 else math.inf, math.sqrt(off), is_flat(tensor)
    )


def _stored(values: torch.Tensor, start: int, tensor: ModelTensor) -> tuple[bytes, float, float]:
    """Rows from `start` on as stored bytes; ||stored - wanted||_F^2, and ||wanted||_F^2."""
    import torch

    shape, qtype = tuple(values.shape), tensor.qtype
    if qtype in (QType.F16, QType.BF16):
        return _halved(values, tensor)
    wanted = values.to(torch.float32)
    square = sum(_checked_square(wanted[some], tensor) for some in _serial(shape))
    if qtype == QType.F32:
        return _bytes(wanted), 0.0, square
    data = _encoded_rows(wanted, start, tensor)
    again = decode(data, shape, qtype)
    lost = sum(_square(again[some].sub_(wanted[some])) for some in _serial(shape))
    if not math.isfinite(lost):
        _refuse_large(tensor, wanted)
    return data, lost, square


def _halved(values: torch.Tensor, tensor: ModelTensor) -> tuple[bytes, float, float]:
    """The same for the float types of 16 bits, in pieces so small that they stay in the processor's cache."""
    import torch

    data, lost, size = [], 0.0, 0.0
    for some in _serial(values.shape):
        wanted = values[some].to(torch.float32)
        square = _checked_square(wanted, tensor)
        half = wanted.to(torch.float16 if tensor.qtype == QType.F16 else torch.bfloat16)
        off = _square(half.to(torch.float32).sub_(wanted))
        if not math.isfinite(off):
            _refuse_large(tensor, wanted)
        data.append(_bytes(half))
        lost, size = lost + off, size + square
    return b"".join(data), lost, size


def _serial(shape: tuple[int, ...]) -> Iterator[slice]:
    """The rows of a matrix, a few at a time."""
    step = max(1, _SERIAL // max(1, shape[-1]))
    return (slice(start, start + step) for start in range(0, shape[0], step))


def _checked_square(wanted: torch.Tensor, tensor: ModelTensor) -> float:
    square = _square(wanted)
    if not math.isfinite(square):
        _refuse_no_numbers(tensor)
    if square > _LARGE**2 and _type_name(tensor).startswith("IQ") and float(wanted.abs().max()) > _LARGE:
        _refuse_large(tensor, wanted)
    return square


def _is_exact(dtype: torch.dtype, qtype: int) -> bool:
    import torch

    halves = {torch.bfloat16: QType.BF16, torch.float16: QType.F16}
    return dtype in halves and qtype in (halves[dtype], QType.F32)


def _bytes(values: torch.Tensor) -> bytes:
    """A copy: the next rows may come in the same memory."""
    import torch

    flat = values.contiguous()
    return (flat if flat.dtype == torch.float32 else flat.view(torch.int16)).numpy().tobytes()


def _encoded_rows(wanted: torch.Tensor, start: int, tensor: ModelTensor) -> bytes:
    """Rows from `start` on, of each matrix by its own importance."""
    import torch

    assert isinstance(tensor.data, Rounded)
    importance, flat = tensor.data.importance, None
    if tensor.qtype in _NEED_IMPORTANCE:
        flat = torch.ones(wanted.shape[-1])
    if importance is None:
        return _encoded(wanted, tensor, flat)
    height = tensor.shape[-2] if len(tensor.shape) > 1 else 1
    parts = []
    for number, first, last in matrices_within(start, start + len(wanted), height):
        before = number * height - start
        known = importance(number)
        parts.append(_encoded(wanted[before + first : before + last], tensor, flat if known is None else known))
    return b"".join(parts)


def _encoded(wanted: torch.Tensor, tensor: ModelTensor, importance: torch.Tensor | None) -> bytes:
    try:
        return encode(wanted, tensor.qtype, importance)
    except UnsupportedError as error:
        raise UnsupportedError(error.message, file=tensor.origin, tensor=tensor.name) from None


def _square(values: torch.Tensor) -> float:
    """||values||_F^2 for a matrix; not finite where a value is not."""
    import torch

    norms = torch.linalg.vector_norm(values, dim=-1).double()  # in float64 from the start it takes sixty times as long
    total = float(norms.square().sum())
    if _SAFE_SQUARES[0] < total < _SAFE_SQUARES[1]:
        return total
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2


def _type_name(tensor: ModelTensor) -> str:
    kind = block_of(tensor.qtype)
    return kind.name if kind else str(tensor.qtype)


def _refuse_no_numbers(tensor: ModelTensor) -> NoReturn:
    told = f"holds NaN or Inf, which can't be stored as {_type_name(tensor)}: the model, or what was added to it,"
    raise UnsupportedError(f"{told} is broken", file=tensor.origin, tensor=tensor.name)


def _refuse_large(tensor: ModelTensor, wanted: torch.Tensor) -> NoReturn:
    told = f"holds values up to {float(wanted.abs().max()):.3g}, too large for {_type_name(tensor)}"
    raise UnsupportedError(f"{told}; store the model as BF16 or F32", file=tensor.origin, tensor=tensor.name)
