"""Metadata made short: scalars and strings as they are, of arrays and objects the beginning.

A vocabulary of 262k tokens is never decoded, and what comes out is JSON: infinities and NaN become text.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from itertools import islice
from typing import Any, BinaryIO

from converters.errors import FileMissingError, FormatError, system_reason
from converters.gguf_metadata import Entry, GgufHeader
from converters.gguf_types import FIXED, Kind

MAX_TEXT = 1000
"""Characters of a string that are shown."""
MAX_ITEMS = 8
"""Items of an array that are shown."""
_MAX_MEMBERS, _MAX_DEPTH = 64, 3

ELLIPSIS = " ..."


def gguf_values(header: GgufHeader) -> dict[str, Any]:
    """All metadata of a GGUF header, shortened; an array is {"type", "count", "items"}.

    Raises:
        FileMissingError: the file is gone. FormatError: it was changed meanwhile.
    """
    order = ">" if header.byte_order == "big" else "<"
    try:
        with header.path.open("rb") as file:
            return {key: _value(file, entry, order) for key, entry in header.entries.items()}
    except OSError as error:
        raise FileMissingError(f"GGUF file: {system_reason(error)}", file=header.path) from None
    except struct.error:
        raise FormatError("was changed while it was read", file=header.path) from None


def _value(file: BinaryIO, entry: Entry, order: str) -> Any:
    file.seek(entry.offset)
    if entry.item is None:
        return _item(file, entry.kind, order)
    items = [_item(file, entry.item, order) for _ in range(min(entry.count, MAX_ITEMS))]
    return {"type": entry.item.name, "count": entry.count, "items": items}


def _item(file: BinaryIO, kind: Kind, order: str) -> Any:
    """The value at the file's position, which moves behind it."""
    if kind is not Kind.STRING:
        form = order + FIXED[kind]
        (value,) = struct.unpack(form, file.read(struct.calcsize(form)))
        return _finite(value)
    (length,) = struct.unpack(order + "Q", file.read(8))
    data = file.read(min(length, 4 * MAX_TEXT))  # a character takes up to four bytes
    file.seek(length - len(data), 1)
    text = data.decode("utf-8", "replace")
    return _cut(text) if len(data) == length else text[:MAX_TEXT] + ELLIPSIS


def json_values(value: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration file's object, shortened likewise; what is nested deeper than it needs is only counted."""
    return {str(_plain(key)): _brief(item, _MAX_DEPTH) for key, item in value.items()}


def _brief(value: Any, depth: int) -> Any:
    if isinstance(value, list):
        few = [_brief(item, depth - 1) for item in value[:MAX_ITEMS]] if depth else []
        return few if len(few) == len(value) else {"type": "ARRAY", "count": len(value), "items": few}
    if isinstance(value, dict):
        if not depth or len(value) > _MAX_MEMBERS:
            few_members = {
                _plain(key): _brief(item, 0) for key, item in islice(value.items(), MAX_ITEMS if depth else 0)
            }
            return {"type": "OBJECT", "count": len(value), "items": few_members}
        return {_plain(key): _brief(item, depth - 1) for key, item in value.items()}
    return _plain(value)


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return _cut(encodable(value))
    return _finite(value)


def _finite(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _cut(text: str) -> str:
    return text if len(text) <= MAX_TEXT else text[:MAX_TEXT] + ELLIPSIS


def encodable(text: str) -> str:
    """The text with a question mark for every lone surrogate, which JSON files may hold and no output can."""
    return text.encode("utf-8", "replace").decode()
