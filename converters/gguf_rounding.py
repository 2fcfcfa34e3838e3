"""Values on their way into a tensor's type: a few megabytes at a time, with what the rounding costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from converters.errors import FormatError, MismatchError, UnsupportedError
from converters.ggml import QType, block_of, dequantize, encode
from converters.gguf_layout import ModelTensor, Rounded
from converters.tensors import matrices_within

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

_ELEMENTS = 1 << 21  # of a tensor that are held at once: 8 MB in float32
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


def rounded_pieces(tensor: ModelTensor) -> Generator[memoryview, None, StoredError]:
    """The stored bytes of a tensor's values, piece after piece, and in the end what its type cost it.

    Values that come in the stored type, or in a type that float32 holds, are not looked at: they are exact.

    Raises:
        UnsupportedError: a value is not finite, or the type can't hold it.
    """
    assert isinstance(tensor.data, Rounded), tensor.name
    columns = tensor.shape[-1] if tensor.shape else 1
    count, step = prod(tensor.shape[:-1]), max(1, _ELEMENTS // max(1, columns))
    off = size = 0.0
    room = _Room()
    for start in range(0, count, step):
        shape = (min(step, count - start), columns)
        values = tensor.data.rows(start, start + shape[0]).cpu()
        assert values.shape == shape, f"{tensor.name}: {tuple(values.shape)} for {shape}"
        if _is_exact(values.dtype, tensor.qtype):
            yield _exact(values, tensor.qtype)
            continue
        data, lost, square = _stored(values, start, tensor, room)
        off, size = off + lost, size + square
        del values
        yield data
    return StoredError(
        math.sqrt(off / size) if size else 0.0 if off == 0 else math.inf, math.sqrt(off), is_flat(tensor)
    )


@dataclass
class _Room:
    """Memory that a tensor's pieces take one after the other: new pages cost more than the arithmetic."""

    wanted: torch.Tensor | None = None
    again: torch.Tensor | None = None

    def of(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        import torch

        found: torch.Tensor | None = getattr(self, name)
        if found is None:
            found = torch.empty(shape)
            setattr(self, name, found)
        return found[: shape[0]]


def _exact(values: torch.Tensor, qtype: int) -> memoryview:
    """A copy: the next rows may come in the same memory."""
    import torch

    from converters.in_cache import copied

    return _view(copied(values, torch.empty(values.shape, dtype=torch.float32 if qtype == QType.F32 else values.dtype)))


def _stored(values: torch.Tensor, start: int, tensor: ModelTensor, room: _Room) -> tuple[memoryview, float, float]:
    """Rows from `start` on as stored bytes; ||stored - wanted||_F^2, and ||wanted||_F^2."""
    import torch

    from converters import in_cache

    shape, qtype = tuple(values.shape), tensor.qtype
    floats = {QType.F32: torch.float32, QType.F16: torch.float16, QType.BF16: torch.bfloat16}
    if qtype in floats:
        half = torch.empty(shape, dtype=floats[QType(qtype)])
        lost, square = in_cache.rounded(values.float() if values.dtype == torch.float64 else values, half)
        _check_square(square, values, tensor)
        data = _view(half)
    else:
        own = values.dtype == torch.float32 and values.is_contiguous()
        wanted = values if own else room.of("wanted", shape)
        square = in_cache.widened(values, wanted)
        _check_square(square, wanted, tensor)
        blocks = _encoded_rows(wanted, start, tensor)
        again = dequantize(np.frombuffer(blocks, np.uint8).reshape(shape[0], -1), qtype, room.of("again", shape))
        lost, data = in_cache.lost(again, wanted), memoryview(blocks)
    if not math.isfinite(lost):
        _refuse_large(tensor, values)
    return data, lost, square


def _check_square(square: float, wanted: torch.Tensor, tensor: ModelTensor) -> None:
    if not math.isfinite(square):
        _refuse_no_numbers(tensor)
    if square > _LARGE**2 and _type_name(tensor).startswith("IQ") and float(wanted.abs().max()) > _LARGE:
        _refuse_large(tensor, wanted)


def _is_exact(dtype: torch.dtype, qtype: int) -> bool:
    import torch

    halves = {torch.bfloat16: QType.BF16, torch.float16: QType.F16}
    return dtype in halves and qtype in (halves[dtype], QType.F32)


def _view(values: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor."""
    import torch

    return values.reshape(-1).view(torch.uint8).numpy().data


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


def _type_name(tensor: ModelTensor) -> str:
    kind = block_of(tensor.qtype)
    return kind.name if kind else str(tensor.qtype)


def _refuse_no_numbers(tensor: ModelTensor) -> NoReturn:
    told = f"holds NaN or Inf, which can't be stored as {_type_name(tensor)}: the model, or what was added to it,"
    raise UnsupportedError(f"{told} is broken", file=tensor.origin, tensor=tensor.name)


def _refuse_large(tensor: ModelTensor, wanted: torch.Tensor) -> NoReturn:
    told = f"holds values up to {float(wanted.abs().max()):.3g}, too large for {_type_name(tensor)}"
    raise UnsupportedError(f"{told}; store the model as BF16 or F32", file=tensor.origin, tensor=tensor.name)
