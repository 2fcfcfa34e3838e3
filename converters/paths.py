"""Opening what users name: every failure of the file system becomes one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from converters.errors import FileMissingError, FormatError, system_reason

_MAX_JSON = 64 << 20


def existing(path: str | Path, what: str) -> Path:
    """The path itself, once it is known to name something.

    Raises:
        FileMissingError: nothing is there, or it can't be looked at.
    """
    found = Path(path)
    try:
        found.stat()
    except OSError as error:
        raise FileMissingError(f"{what}: {system_reason(error)}", file=path) from None
    except ValueError:  # a NUL in the name
        raise FileMissingError(f"{what}: no such file or directory", file=repr(str(path))) from None
    return found


def regular_file(path: Path, what: str) -> int:
    """The size of a regular file in bytes.

    Raises:
        FileMissingError: it is missing, unreadable or no regular file.
    """
    existing(path, what)
    if path.is_dir():
        raise FileMissingError(f"{what} is a directory where a file is expected", file=path)
    if not path.is_file():
        raise FileMissingError(f"{what} is no regular file", file=path)
    return path.stat().st_size


def read_bytes(path: Path, what: str, limit: int = _MAX_JSON) -> bytes:
    """A small file's bytes.

    Raises:
        FileMissingError: it can't be read. FormatError: it is longer than `limit`.
    """
    size = regular_file(path, what)
    if size > limit:
        raise FormatError(f"{what} has {size} bytes, more than the {limit} that are read", file=path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise FileMissingError(f"{what}: {system_reason(error)}", file=path) from None


def starts_with(path: Path, magic: bytes) -> bool:
    """Whether a regular file begins with these bytes; not if it can't be read."""
    try:
        if not path.is_file():  # opening a pipe would wait for its other end
            return False
        with path.open("rb") as file:
            return file.read(len(magic)) == magic
    except (OSError, ValueError):
        return False


def read_json_object(path: Path, what: str) -> dict[str, Any]:
    """A JSON file that holds one object.

    Raises:
        FileMissingError: it can't be read. FormatError: it is no JSON object.
    """
    return parse_json_object(read_bytes(path, what), what, path)


def parse_json_object(data: bytes, what: str, path: Path) -> dict[str, Any]:
    """One JSON object from bytes that came out of a file; a key that stands twice is an error."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique_keys)
    except UnicodeDecodeError:
        raise FormatError(f"{what} is not UTF-8 text", file=path) from None
    except RecursionError:
        raise FormatError(f"{what} is nested too deeply", file=path) from None
    except ValueError as error:  # JSONDecodeError is one; also absurdly long integers and doubled keys
        raise FormatError(f"{what} is no valid JSON: {error}", file=path) from None
    if not isinstance(value, dict):
        raise FormatError(f"{what} holds a {type(value).__name__}, expected a JSON object", file=path)
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [key for key, _ in pairs]
        twice = next(key for key in names if names.count(key) > 1)
        raise ValueError(f"the key {twice[:80]!r} stands twice")
    return result
