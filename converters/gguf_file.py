"""The GGUF format, version 3, little-endian: a writer that streams.

The `gguf` package's writer keeps what it is given in memory and writes in place; this one takes typed values
and a function per tensor, and writes to whatever stream it is given (see `converters.atomic`).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from converters.ggml import QType, nbytes
from converters.gguf_types import FIXED, Kind

_VERSION = 3
_ALIGNMENT = 32
_MAX_NAME = 64  # ggml's names live in fixed buffers of this size, the closing zero included


@dataclass(frozen=True)
class Value:
    """A typed metadata value; `item` is the type of an array's items."""

    type: Kind
    data: Any
    item: Kind | None = None


def text(value: str) -> Value:
    return Value(Kind.STRING, value)


def float32(value: float) -> Value:
    return Value(Kind.FLOAT32, value)


def uint32(value: int) -> Value:
    return Value(Kind.UINT32, value)


def texts(values: Sequence[str]) -> Value:
    return Value(Kind.ARRAY, tuple(values), Kind.STRING)


def uint32s(values: Sequence[int]) -> Value:
    return Value(Kind.ARRAY, tuple(values), Kind.UINT32)


@dataclass(frozen=True)
class TensorOut:
    """A tensor to write: its shape outermost dimension first, and what gives its stored bytes when asked."""

    name: str
    shape: tuple[int, ...]
    qtype: QType
    data: Callable[[], bytes]


def write_gguf(file: BinaryIO, metadata: Sequence[tuple[str, Value]], tensors: Sequence[TensorOut]) -> None:
    """Writes a whole GGUF file in a stream: header, metadata in the given order, then tensor after tensor."""
    header = start_bytes(len(tensors), len(metadata))
    header += b"".join(entry_bytes(key, value) for key, value in metadata)
    offset = 0
    for tensor in tensors:
        header += tensor_info_bytes(tensor.name, tensor.shape, tensor.qtype, offset)
        offset += _padded(nbytes(tensor.shape, tensor.qtype))
    file.write(header.ljust(_padded(len(header)), b"\0"))
    for tensor in tensors:
        data = tensor.data()
        expected = nbytes(tensor.shape, tensor.qtype)
        assert len(data) == expected, f"{tensor.name}: {len(data)} bytes given, {expected} announced"
        file.write(data)
        file.write(b"\0" * (_padded(expected) - expected))


def start_bytes(tensors: int, keys: int) -> bytes:
    """What a file begins with: magic, version, and how much follows."""
    return struct.pack("<4sIQQ", b"GGUF", _VERSION, tensors, keys)


def entry_bytes(key: str, value: Value) -> bytes:
    """A key with its value as the header holds it."""
    return _string(key) + struct.pack("<I", value.type) + _value(value)


def stored_entry_bytes(key: str, kind: Kind, item: Kind | None, count: int, payload: bytes) -> bytes:
    """A key with a value whose bytes come from another little-endian file; `item` and `count` are an array's."""
    head = struct.pack("<I", kind) if item is None else struct.pack("<IIQ", kind, item, count)
    return _string(key) + head + payload


def tensor_info_bytes(name: str, shape: tuple[int, ...], qtype: int, offset: int) -> bytes:
    """A tensor's entry in the list; `offset` counts from the beginning of the data."""
    assert len(name.encode()) < _MAX_NAME, f"{name}: longer than ggml's names"
    sizes = shape[::-1]  # GGUF counts dimensions from the innermost
    return _string(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, qtype, offset)


def _value(value: Value) -> bytes:
    if value.item is None:
        return _item(value.type, value.data)
    items = b"".join(_item(value.item, item) for item in value.data)
    return struct.pack("<IQ", value.item, len(value.data)) + items


def _item(kind: Kind, data: Any) -> bytes:
    return _string(data) if kind == Kind.STRING else struct.pack("<" + FIXED[kind], data)


def _string(value: str) -> bytes:
    data = value.encode("utf-8", "replace")
    return struct.pack("<Q", len(data)) + data


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
