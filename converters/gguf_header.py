"""The header of a GGUF file, version 2 or 3, in either byte order: read without believing a word of it.

    "GGUF", version u32, number of tensors u64, number of keys u64
    key:     name, kind u32, value       string: length u64, bytes     array: kind u32, number u64, items
    tensor:  name, dimensions u32, sizes u64 innermost first, type u32, offset u64 into the data
    padding to the alignment, then the data, each tensor padded likewise

Every count and length is held against what the file has left before it is used, and against a bound of ours
where a large file could make us spend minutes: the `gguf` package's reader loops without end over 49 bytes,
and takes half a minute for a large vocabulary. Values are located here and decoded when asked for. As ggml
does, tensors must follow each other without holes, in the order of the list.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, NoReturn

from converters.errors import FileMissingError, FormatError, system_reason
from converters.gguf_metadata import Entry, GgufHeader, GgufTensor, shown
from converters.gguf_types import FIXED, TENSOR_TYPES, Kind
from converters.paths import read_bytes, regular_file

MAX_HEADER = 64 << 20
"""Longest header that is read, in bytes; the largest published vocabularies take a quarter of it."""
MAX_KEYS = 8192
MAX_TENSORS = 1 << 15
MAX_STRINGS = 3 << 19  # in all arrays together, twice the most in use: their lengths must be walked
MAX_KEY = 1024  # bytes of a key's name
MAX_NAME = 64  # ggml's names live in fixed buffers of this size, the closing zero included

__all__ = ["Entry", "GgufHeader", "GgufTensor", "read_gguf_header"]

_MAGIC = b"GGUF"
_DEFAULT_ALIGNMENT = 32
_FAR = 1 << 72  # bytes, more than the longest tensor takes
_MAX_DIMENSIONS = 4
_LEAST_KEY, _LEAST_TENSOR = 14, 25  # bytes that a key or a tensor takes at the very least


def read_gguf_header(path: str | Path, what: str = "GGUF file", *, whole: bool = True) -> GgufHeader:
    """Reads and checks the header of one file.

    Args:
        what: how messages call the file, "GGUF adapter".
        whole: whether the tensors' data must be there; the header must be.

    Raises:
        FileMissingError: the file can't be read.
        FormatError: the header lies, or is larger than anything real.
    """
    path = Path(path)
    size = regular_file(path, what)
    if size < 24:
        _refuse_short(path, size, what)
    with _mapped(path, size, what) as view:
        if view[:4] != _MAGIC:
            raise FormatError(f"starts with {view[:4]!r}; a {what} starts with {_MAGIC!r}", file=path)
        return _Parser(view, size, path).header(whole=whole)


def _mapped(path: Path, size: int, what: str) -> mmap.mmap:
    """The part of the file that a header may take."""
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), min(size, MAX_HEADER), access=mmap.ACCESS_READ)
    except OSError as error:
        raise FileMissingError(f"{what}: {system_reason(error)}", file=path) from None
    except ValueError:
        raise FormatError("was changed while it was read", file=path) from None


def _refuse_short(path: Path, size: int, what: str) -> NoReturn:
    start = read_bytes(path, what)[:4]
    if start != _MAGIC:
        raise FormatError(f"starts with {start!r}; a {what} starts with {_MAGIC!r}", file=path)
    raise FormatError(f"has {size} bytes; a {what} has at least 24: truncated?", file=path)


class _Parser:
    """A position in the mapped beginning of a file."""

    def __init__(self, view: mmap.mmap, size: int, path: Path) -> None:
        self._view = view
        self._size = size
        self._path = path
        self._end = len(view)
        self.version, self._order = self._version_and_order()
        self._at = 8
        self._u32 = struct.Struct(self._order + "I").unpack_from
        self._u64 = struct.Struct(self._order + "Q").unpack_from
        self._strings = 0

    def header(self, *, whole: bool) -> GgufHeader:
        tensor_count, key_count = self._count(MAX_TENSORS, "tensors"), self._count(MAX_KEYS, "keys")
        self._room(key_count * _LEAST_KEY, f"{key_count} keys")
        entries: dict[str, Entry] = {}
        for _ in range(key_count):
            key = self._name("key", MAX_KEY)
            if key in entries:
                raise self._fail(f"has the key {shown(key)} twice")
            entries[key] = self._entry(key)
        self._room(tensor_count * _LEAST_TENSOR, f"{tensor_count} tensors")
        listed = [self._tensor() for _ in range(tensor_count)]
        nbytes, alignment = self._at, self._alignment(entries)
        start = _padded(nbytes, alignment) if listed else nbytes
        return GgufHeader(
            path=self._path,
            version=self.version,
            byte_order="big" if self._order == ">" else "little",
            entries=entries,
            tensors=_placed(listed, start, self._size if whole else None, alignment, self._path),
            alignment=alignment,
            nbytes=nbytes,
            data_start=start,
            file_size=self._size,
        )

    def _version_and_order(self) -> tuple[int, str]:
        for order in "<>":
            (version,) = struct.unpack_from(order + "I", self._view, 4)
            if version in (2, 3):
                return version, order
        (version,) = struct.unpack_from("<I", self._view, 4)
        raise self._fail(f"is GGUF version {version}; versions 2 and 3 are read: fetch or convert it anew")

    def _count(self, most: int, what: str) -> int:
        count = self._number(self._u64, 8)
        if count > most:
            raise self._fail(f"claims {count} {what}; at most {most} are read")
        return count

    def _entry(self, key: str) -> Entry:
        kind, item, count = self._kind(key), None, 1
        if kind is Kind.ARRAY:
            item, count = self._kind(key), self._number(self._u64, 8)
            if item is Kind.ARRAY:
                raise self._fail(f"{shown(key)} is an array of arrays, which llama.cpp does not read either")
        offset = self._at
        of = kind if item is None else item
        if of is Kind.STRING:
            self._skip_strings(count, key)
        else:
            size = struct.calcsize("<" + FIXED[of]) * count
            self._room(size, f"{count} items of {shown(key)}")
            self._at += size
        return Entry(kind, item, count, offset, self._at - offset)

    def _kind(self, key: str) -> Kind:
        number = self._number(self._u32, 4)
        try:
            return Kind(number)
        except ValueError:
            raise self._fail(f"{shown(key)} has the value type {number}; GGUF has 0 to {max(Kind)}") from None

    def _skip_strings(self, count: int, key: str) -> None:
        self._room(8 * count, f"{count} strings of {shown(key)}")
        self._strings += count
        if self._strings > MAX_STRINGS:
            raise self._fail(f"has arrays of more than {MAX_STRINGS} strings")
        at, view, u64 = self._at, self._view, self._u64
        try:
            for _ in range(count):  # half a million times in an ordinary model
                at += 8 + u64(view, at)[0]
        except (struct.error, OverflowError):
            raise self._short(f"the strings of {shown(key)}") from None
        self._at = at
        self._room(0, f"the strings of {shown(key)}")

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, type, offset."""
        name = self._name("tensor name", MAX_NAME - 1)
        dimensions = self._number(self._u32, 4)
        if dimensions > _MAX_DIMENSIONS:
            raise self._fail(f"has {dimensions} dimensions; at most {_MAX_DIMENSIONS} are possible", name)
        self._room(8 * dimensions + 12, "a tensor's shape, type and offset")
        *sizes, qtype, offset = struct.unpack_from(f"{self._order}{dimensions}QIQ", self._view, self._at)
        self._at += 8 * dimensions + 12
        if max(sizes, default=0) >= 1 << 63 or prod(size or 1 for size in sizes) >= 1 << 63:
            raise self._fail(f"its shape {sizes} overflows: no tensor has 2^63 elements", name)
        return name, tuple(reversed(sizes)), qtype, offset

    def _alignment(self, entries: Mapping[str, Entry]) -> int:
        entry = entries.get("general.alignment")
        if entry is None:
            return _DEFAULT_ALIGNMENT
        if entry.kind is not Kind.UINT32:
            raise self._fail(f"general.alignment is stored as {entry.kind.name}, expected UINT32")
        alignment: int = self._u32(self._view, entry.offset)[0]
        if alignment == 0 or alignment & (alignment - 1):
            raise self._fail(f"general.alignment is {alignment}, expected a power of two")
        return alignment

    def _name(self, what: str, most: int) -> str:
        length = self._number(self._u64, 8)
        if not 0 < length <= most:
            raise self._fail(f"a {what} is {length} bytes long, expected 1 to {most}")
        self._room(length, f"a {what}")
        raw = self._view[self._at : self._at + length]
        self._at += length
        if 0 in raw:
            raise self._fail(f"the {what} {raw[:80]!r} holds a zero byte")
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self._fail(f"the {what} {raw[:80]!r} is no UTF-8 text") from None

    def _number(self, unpack: Any, size: int) -> int:
        self._room(size, "a number")
        number: int = unpack(self._view, self._at)[0]
        self._at += size
        return number

    def _room(self, nbytes: int, what: str) -> None:
        if self._at + nbytes > self._end:
            raise self._short(what)

    def _short(self, what: str) -> FormatError:
        if self._end < self._size:
            return self._fail(f"{what} would make its header longer than the {MAX_HEADER} bytes that are read")
        return self._fail(f"{what} would reach past the file's {self._size} bytes: truncated or damaged")

    def _fail(self, message: str, tensor: str | None = None) -> FormatError:
        return FormatError(message, file=self._path, tensor=tensor)


def _placed(
    listed: list[tuple[str, tuple[int, ...], int, int]], start: int, size: int | None, alignment: int, path: Path
) -> dict[str, GgufTensor]:
    """The tensors with their sizes, each where the one before it ends; `size` is the file's, if they must be in it."""
    tensors: dict[str, GgufTensor] = {}
    room = _FAR if size is None else size - start
    least, exact = 0, True
    for place, (name, shape, qtype, offset) in enumerate(listed):
        if name in tensors:
            raise FormatError("stands twice in the list of tensors", file=path, tensor=name)
        if offset % alignment or offset < least or (exact and offset != least):
            expected = f"{least}" if exact else f"{least} or more, a multiple of {alignment}"
            raise FormatError(f"its data begins at {offset}, expected {expected}", file=path, tensor=name)
        ceiling = listed[place + 1][3] if place + 1 < len(listed) else room
        nbytes = _stored_size(shape, qtype, max(0, min(ceiling, room) - offset), path, name)
        if offset + nbytes > room:
            raise FormatError(
                f"its data would end at byte {start + offset + nbytes} and the file has {size}: truncated or damaged",
                file=path,
                tensor=name,
            )
        known = TENSOR_TYPES.get(qtype)
        dtype = known.name if known else f"type {qtype}"
        tensors[name] = GgufTensor(name, shape, qtype, dtype, start + offset, nbytes)
        least, exact = _padded(offset + (nbytes if known else 0), alignment), known is not None
    return tensors


def _stored_size(shape: tuple[int, ...], qtype: int, gap: int, path: Path, name: str) -> int:
    """The bytes a tensor takes; `gap`, up to the next one, where its type is unknown."""
    known = TENSOR_TYPES.get(qtype)
    if known is None:
        return gap
    if (shape[-1] if shape else 1) % known.block:
        found = f"rows of {shape[-1] if shape else 1} elements"
        raise FormatError(f"{found} are no whole blocks of {known.block} ({known.name})", file=path, tensor=name)
    return prod(shape) // known.block * known.nbytes


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment
