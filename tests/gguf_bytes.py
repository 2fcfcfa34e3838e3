"""GGUF files packed by hand, byte by byte from the format's description, so that every field can lie.

Not our writer and not the gguf package's: both refuse to write what these tests need.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

UINT8, UINT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64 = 0, 2, 4, 5, 6, 7, 8, 9, 10
F32, F16, Q8_0, I32, F64, BF16 = 0, 1, 8, 26, 28, 30
_BYTES = {F32: 4, F16: 2, I32: 4, F64: 8, BF16: 2}


@dataclass(frozen=True)
class Tensor:
    """An entry of the tensor list; what is None follows from the rest. `shape`: outermost dimension first."""

    name: str | bytes
    shape: tuple[int, ...]
    qtype: int = F32
    offset: int | None = None
    nbytes: int | None = None
    name_length: int | None = None
    dimensions: int | None = None

    @property
    def size(self) -> int:
        if self.nbytes is not None:
            return self.nbytes
        elements = 1
        for size in self.shape:
            elements *= size
        return elements // 32 * 34 if self.qtype == Q8_0 else elements * _BYTES[self.qtype]


@dataclass(frozen=True)
class Packer:
    """One byte order; `value` methods give kind and payload of a metadata value."""

    order: str = "<"

    def u32(self, value: int) -> bytes:
        return struct.pack(self.order + "I", value)

    def u64(self, value: int) -> bytes:
        return struct.pack(self.order + "Q", value)

    def string(self, value: str | bytes, length: int | None = None) -> bytes:
        data = value.encode() if isinstance(value, str) else value
        return self.u64(len(data) if length is None else length) + data

    def scalar(self, kind: int, form: str, value: float) -> bytes:
        return self.u32(kind) + struct.pack(self.order + form, value)

    def uint32(self, value: int) -> bytes:
        return self.scalar(UINT32, "I", value)

    def float32(self, value: float) -> bytes:
        return self.scalar(FLOAT32, "f", value)

    def text(self, value: str | bytes, length: int | None = None) -> bytes:
        return self.u32(STRING) + self.string(value, length)

    def array(self, item: int, items: Sequence[bytes], count: int | None = None) -> bytes:
        return self.u32(ARRAY) + self.u32(item) + self.u64(len(items) if count is None else count) + b"".join(items)

    def file(
        self,
        keys: Sequence[tuple[str | bytes, bytes]] = (),
        tensors: Sequence[Tensor] = (),
        *,
        version: int = 3,
        key_count: int | None = None,
        tensor_count: int | None = None,
        alignment: int = 32,
        content: Callable[[Tensor], bytes] | None = None,
    ) -> bytes:
        """A whole file; its data are zeros, or what `content` gives for each tensor."""
        counts = (
            len(tensors) if tensor_count is None else tensor_count,
            len(keys) if key_count is None else key_count,
        )
        header = b"GGUF" + struct.pack(self.order + "IQQ", version, *counts)
        header += b"".join(self.string(key) + value for key, value in keys)
        data = b""
        for tensor in tensors:
            header += self._tensor(tensor, len(data) if tensor.offset is None else tensor.offset)
            data += bytes(tensor.size) if content is None else content(tensor)
            data += bytes(-len(data) % alignment)
        return header + bytes(-len(header) % alignment) + data if tensors else header

    def _tensor(self, tensor: Tensor, offset: int) -> bytes:
        count = len(tensor.shape) if tensor.dimensions is None else tensor.dimensions
        sizes = b"".join(self.u64(size) for size in reversed(tensor.shape))
        return (
            self.string(tensor.name, tensor.name_length)
            + self.u32(count)
            + sizes
            + self.u32(tensor.qtype)
            + self.u64(offset)
        )


LITTLE, BIG = Packer("<"), Packer(">")


def noise(seed: int, order: str = "<") -> Callable[[Tensor], bytes]:
    """Values between -1 and 1 for F32 and F16 tensors, zeros for others: content that a computation can use."""
    source = random.Random(seed)

    def content(tensor: Tensor) -> bytes:
        form = {F32: "f", F16: "e"}.get(tensor.qtype)
        if form is None or tensor.nbytes is not None:
            return bytes(tensor.size)
        count = tensor.size // _BYTES[tensor.qtype]
        return struct.pack(f"{order}{count}{form}", *(source.uniform(-1, 1) for _ in range(count)))

    return content


def adapter_keys(packer: Packer = LITTLE, **changed: bytes | None) -> list[tuple[str | bytes, bytes]]:
    """A LoRA adapter's metadata; `general_type=...` replaces a value, None takes it out."""
    values: dict[str, bytes | None] = {
        "general.type": packer.text("adapter"),
        "general.architecture": packer.text("llama"),
        "adapter.type": packer.text("lora"),
        "adapter.lora.alpha": packer.float32(8.0),
    }
    values |= {key.replace("_", "."): value for key, value in changed.items()}
    return [(key, value) for key, value in values.items() if value is not None]
