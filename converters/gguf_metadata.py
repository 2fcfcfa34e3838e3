"""What a GGUF header holds: tensors, and metadata whose values stay in the file until they are asked for."""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

from converters.errors import FileMissingError, FormatError, system_reason
from converters.gguf_types import FIXED, TENSOR_TYPES, Kind

MAX_VALUE = 16 << 20  # bytes, and
MAX_ITEMS = 1 << 19  # items, of a value that is decoded; the longest list of merges has 515,000
MAX_WORD = 256  # bytes of a value that is a name
_HUB = re.compile(r"https://huggingface\.co/([^/]+/[^/]+)")
_MAX_BRIEF = 1024  # bytes of a value of no consequence

ByteOrder = Literal["little", "big"]


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor as the header lists it.

    Attributes:
        shape: outermost dimension first, as in torch.
        qtype: ggml's number of the type.
        dtype: the type's name, or "type 77" for one that is not known here.
        offset: where its data begins in the file.
        nbytes: the size of its data; for an unknown type all the room up to the next tensor.
    """

    name: str
    shape: tuple[int, ...]
    qtype: int
    dtype: str
    offset: int
    nbytes: int

    @property
    def known(self) -> bool:
        return self.qtype in TENSOR_TYPES

    @property
    def elements(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a metadata value lies: `count` items of `item` for an array (else None), from `offset` on."""

    kind: Kind
    item: Kind | None
    count: int
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufHeader:
    """A checked header. Metadata stays in the file until asked for.

    Attributes:
        entries: where each metadata value lies, in file order.
        tensors: by name, in file order.
        nbytes: length of the header; `data_start` is that, padded to `alignment`.
    """

    path: Path
    version: int
    byte_order: ByteOrder
    entries: Mapping[str, Entry]
    tensors: Mapping[str, GgufTensor]
    alignment: int
    nbytes: int
    data_start: int
    file_size: int

    def kind_of(self, key: str) -> Kind | None:
        """The type a value is stored in, None where the key is missing."""
        return self.entries[key].kind if key in self.entries else None

    def value(self, key: str) -> Any:
        """A value as int, float, bool, str, or a list of them; None where the key is missing.

        Bytes that are no UTF-8 become U+FFFD.

        Raises:
            FormatError: an array or text longer than any that is in use. FileMissingError: the file is gone.
        """
        entry = self.entries.get(key)
        if entry is None:
            return None
        if entry.nbytes > MAX_VALUE or entry.count > MAX_ITEMS:
            raise FormatError(
                f"{shown(key)} holds {entry.count} items in {entry.nbytes} bytes; at most {MAX_ITEMS} items and "
                f"{MAX_VALUE} bytes of a value are read",
                file=self.path,
            )
        try:
            return _decode(entry, self._read(entry), ">" if self.byte_order == "big" else "<")
        except struct.error:
            raise self._changed() from None

    def text(self, key: str) -> str | None:
        """A value that must be a string, and a name, not a document; None where the key is missing.

        Raises:
            FormatError: it is stored as something else (on which llama.cpp aborts), or is longer than `MAX_WORD`.
        """
        self.expect(key, Kind.STRING)
        if key in self.entries and self.entries[key].nbytes > 8 + MAX_WORD:
            told = f"{shown(key)} is a string of {self.entries[key].nbytes - 8} bytes; at most {MAX_WORD} are expected"
            raise FormatError(told, file=self.path)
        value: str | None = self.value(key)
        return value

    def expect(self, key: str, kind: Kind) -> None:
        """Raises FormatError if the key is there and stored as another kind."""
        found = self.kind_of(key)
        if found is not None and found is not kind:
            raise FormatError(f"{shown(key)} is stored as {found.name}, expected {kind.name}", file=self.path)

    def _read(self, entry: Entry) -> bytes:
        try:
            with self.path.open("rb") as file:
                file.seek(entry.offset)
                data = file.read(entry.nbytes)
        except OSError as error:
            raise FileMissingError(f"GGUF file: {system_reason(error)}", file=self.path) from None
        if len(data) != entry.nbytes:
            raise self._changed()
        return data

    def _changed(self) -> FormatError:
        return FormatError("was changed while it was read", file=self.path)


def _decode(entry: Entry, data: bytes, order: str) -> Any:
    of = entry.kind if entry.item is None else entry.item
    items = _texts(data, entry.count, order) if of is Kind.STRING else _fixed(data, entry.count, order + FIXED[of])
    return items if entry.kind is Kind.ARRAY else items[0]


def _fixed(data: bytes, count: int, form: str) -> list[Any]:
    return list(struct.unpack(f"{form[0]}{count}{form[1]}", data))


def _texts(data: bytes, count: int, order: str) -> list[str]:
    length = struct.Struct(order + "Q").unpack_from
    texts, at = [], 0
    for _ in range(count):
        end = at + 8 + length(data, at)[0]
        texts.append(data[at + 8 : end].decode("utf-8", "replace"))
        at = end
    return texts


def shown(key: str) -> str:
    """A key from a file as messages quote it."""
    return repr(key[:80])


def brief_text(header: GgufHeader, key: str) -> str:
    """A short text of no consequence, a link or a name; empty where it is missing, long or something else."""
    entry = header.entries.get(key)
    if entry is None or entry.kind is not Kind.STRING or entry.nbytes > _MAX_BRIEF:
        return ""
    return str(header.value(key))


def published_as(header: GgufHeader, key: str) -> str | None:
    """The repository, `organization/model`, that a link of no consequence leads to."""
    match = _HUB.fullmatch(brief_text(header, key))
    return match[1] if match is not None else None
