"""The safetensors format: header parsing that believes nothing, lazy tensors, a streaming writer.

The `safetensors` package is not used for reading: it maps a file only after it has parsed the header with
limits of its own (100 MB), and its writer holds every tensor in memory and orders its metadata at random.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeGuard

from converters.errors import FileMissingError, FormatError, UnsupportedError, system_reason
from converters.paths import mapped, parse_json_object, regular_file
from converters.tensors import TensorInfo

if TYPE_CHECKING:
    import torch

MAX_HEADER = 32 << 20
"""Longest header that is read, in bytes; the largest published models need under a tenth of it."""

_ITEM_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32,
    "U16": 16, "U8": 8, "BOOL": 8, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
_LOADABLE = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_MAX_DIMENSIONS = 8
_MAX_NAME = 1024  # characters; the longest in use have some 150
_PIECE = 1 << 20  # bytes that are copied at a time: as fast as any larger number


@dataclass(frozen=True)
class Header:
    """A parsed header: tensors in file order, where each lies, and the free-form metadata."""

    infos: Mapping[str, TensorInfo]
    offsets: Mapping[str, int]
    metadata: Mapping[str, str]
    nbytes: int


def read_header(path: Path) -> Header:
    """Reads and checks the header of one file.

    Raises:
        FileMissingError: the file can't be read.
        FormatError: its header lies about lengths, types, holes or overlaps.
    """
    size = regular_file(path, "safetensors file")
    with _open(path) as file:
        start = file.read(8)
        if len(start) < 8:
            raise FormatError(f"has {size} bytes; a safetensors file has at least 8", file=path)
        if start == b"version ":
            raise FormatError("is a pointer to a file in Git LFS; fetch the file itself (git lfs pull)", file=path)
        (length,) = struct.unpack("<Q", start)
        if length > MAX_HEADER:
            raise FormatError(f"claims a header of {length} bytes; at most {MAX_HEADER} are read", file=path)
        if 8 + length > size:
            raise FormatError(f"claims a header of {length} bytes but has only {size}: truncated?", file=path)
        raw = bytearray(length)
        if file.readinto(raw) != length:
            raise FormatError("was changed while it was read", file=path)
    table = parse_json_object(raw, "the safetensors header", path)
    metadata = _metadata(table.pop("__metadata__", None), path)
    return _check_layout(table, metadata, 8 + length, size, path)


def _open(path: Path) -> BufferedReader:
    try:
        return path.open("rb")
    except OSError as error:
        raise FileMissingError(f"safetensors file: {system_reason(error)}", file=path) from None


def _metadata(value: Any, path: Path) -> dict[str, str]:
    if value is None:  # MLX writes null where there is none
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise FormatError("__metadata__ is no object of strings", file=path)
    return value


def _check_layout(table: dict[str, Any], metadata: dict[str, str], start: int, size: int, path: Path) -> Header:
    spans = []
    while table:  # which gives its memory back meanwhile
        info, begin = _tensor(*table.popitem(), path)
        spans.append((begin, info))
    spans.sort(key=lambda span: (span[0], span[1].nbytes))
    end = 0
    for begin, info in spans:
        if begin != end:
            what = "overlaps the tensor before it" if begin < end else "leaves a hole before it"
            raise FormatError(f"data begins at {begin}, expected {end}: {what}", file=path, tensor=info.name)
        end = begin + info.nbytes
    if start + end != size:
        found = f"the tensors need {start + end} bytes and the file has {size}"
        raise FormatError(f"{found}: truncated or damaged; fetch it again", file=path)
    return Header(
        infos={info.name: info for _, info in spans},
        offsets={info.name: start + begin for begin, info in spans},
        metadata=metadata,
        nbytes=start,
    )


def _tensor(name: str, entry: Any, path: Path) -> tuple[TensorInfo, int]:
    def fail(message: str) -> FormatError:
        return FormatError(message, file=path, tensor=name)

    if len(name) > _MAX_NAME:
        told = f"a tensor's name has {len(name)} characters, expected at most {_MAX_NAME}: {name[:80]!r}"
        raise FormatError(told, file=path)
    if not name.isascii() and any("\ud800" <= letter <= "\udfff" for letter in name):
        raise FormatError(f"the tensor name {name[:80]!r} is no text: it holds half of a surrogate pair", file=path)
    if not isinstance(entry, dict):
        raise fail("its header entry is no object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _ITEM_BITS:
        found = dtype[:40] if isinstance(dtype, str) else type(dtype).__name__
        raise fail(f"has the type {found!r}, which safetensors does not define")
    if not _naturals(shape) or len(shape) > _MAX_DIMENSIONS:
        raise fail(f"its shape is no list of at most {_MAX_DIMENSIONS} sizes")
    if not _naturals(offsets) or len(offsets) != 2:
        raise fail("its data_offsets are no pair of sizes")
    begin, end = offsets
    bits = prod(shape) * _ITEM_BITS[dtype]
    if bits % 8 or end - begin != bits // 8:
        raise fail(f"shape {shape} of {dtype} needs {bits / 8:g} bytes, data_offsets give {end - begin}")
    return TensorInfo(name, tuple(shape), dtype, bits // 8), begin


def _naturals(value: Any) -> TypeGuard[list[int]]:
    """Whether a JSON value is a list of sizes that fit 63 bits (a bool is an int in Python, not here)."""
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


class SafetensorsFile:
    """The tensors of one file (a `TensorSource`), mapped into memory at first use."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header = read_header(path)
        self._map: mmap.mmap | None = None

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        return self.header.infos

    def load(self, name: str) -> torch.Tensor:
        """The tensor in its stored type: F64, F32, F16 or BF16.

        Raises:
            UnsupportedError: the tensor is stored as integers or in 8 bits and less.
        """
        info = self.infos[name]
        return self._span(info, 0, info.elements).reshape(info.shape)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of the tensor seen as a matrix, all dimensions but the last merged; see `load`."""
        info = self.infos[name]
        columns = info.shape[-1] if info.shape else 1
        return self._span(info, start * columns, stop * columns).reshape(stop - start, columns)

    def check_type(self, name: str) -> None:
        """Raises UnsupportedError for a tensor that `load` can't give: integers, or 8 bits and less."""
        if self.infos[name].dtype not in _LOADABLE:
            raise UnsupportedError(
                f"is stored as {self.infos[name].dtype}; only F32, F16, BF16 and F64 are weights as they are. A "
                f"checkpoint quantized by bitsandbytes, GPTQ, AWQ or to FP8 must be dequantized first",
                file=self.path,
                tensor=name,
            )

    def stored(self, name: str) -> Iterator[memoryview]:
        """The tensor's bytes in the file, whatever its type, piece by piece; a piece lasts until the next is asked for.

        Raises:
            FileMissingError: the file can't be read. FormatError: it has become shorter.
        """
        left = self.infos[name].nbytes
        buffer = memoryview(bytearray(min(left, _PIECE)))
        with _open(self.path) as file:
            file.seek(self.header.offsets[name])
            while left:
                try:
                    count = file.readinto(buffer[: min(left, _PIECE)])
                except OSError as error:
                    raise FileMissingError(f"can't be read: {system_reason(error)}", file=self.path) from None
                if not count:
                    raise FormatError("was changed while it was read", file=self.path, tensor=name)
                yield buffer[:count]
                left -= count

    def _span(self, info: TensorInfo, start: int, stop: int) -> torch.Tensor:
        """Elements [start, stop) as they are stored."""
        import torch

        self.check_type(info.name)
        dtype: torch.dtype = getattr(torch, _LOADABLE[info.dtype])
        if start == stop:
            return torch.empty(0, dtype=dtype)
        offset = self.header.offsets[info.name] + start * dtype.itemsize
        if offset % dtype.itemsize:  # legal in the format, not for every processor
            data = bytearray(self._mapped()[offset : offset + (stop - start) * dtype.itemsize])
            return torch.frombuffer(data, dtype=dtype)
        return torch.frombuffer(self._mapped(), dtype=dtype, count=stop - start, offset=offset)

    def prefetch(self, name: str) -> None:
        if hasattr(mmap, "MADV_WILLNEED"):
            begin = self.header.offsets[name] // mmap.PAGESIZE * mmap.PAGESIZE
            end = self.header.offsets[name] + self.infos[name].nbytes
            self._mapped().madvise(mmap.MADV_WILLNEED, begin, end - begin)

    def _mapped(self) -> mmap.mmap:
        if self._map is None:
            view = mapped(self.path, "safetensors file")
            if len(view) != self.header.nbytes + sum(info.nbytes for info in self.infos.values()):
                raise FormatError("was changed while it was read", file=self.path)
            self._map = view
        return self._map


def write_safetensors(
    file: BinaryIO,
    infos: Sequence[TensorInfo],
    load: Callable[[str], Iterable[bytes | memoryview]],
    metadata: Mapping[str, str],
) -> None:
    """Writes one file in a stream: the header, then every tensor's bytes as `load(name)` gives them.

    The order of `infos` and of `metadata` is kept, so equal calls write equal bytes.
    """
    import json

    table: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for info in infos:
        span = [offset, offset + info.nbytes]
        table[info.name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": span}
        offset += info.nbytes
    header = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)  # keeps the data aligned for readers that map it
    file.write(struct.pack("<Q", len(header)))
    file.write(header)
    for info in infos:
        written = sum(file.write(part) for part in load(info.name))
        assert written == info.nbytes, f"{info.name}: {written} bytes written, {info.nbytes} announced"
