"""Opening what users name: every failure of the file system becomes one sentence."""

from __future__ import annotations

import contextlib
import gc
import json
import mmap
import os
import platform
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from converters.errors import FileMissingError, FormatError, system_reason

_MAX_SMALL = 4 << 20
_MAX_WIDE = 4 << 20  # bytes of JSON with letters beyond ASCII, which may take four times as much in memory
_MAX_OBJECTS = 92_000  # a pair for every expert of DeepSeek V3, the most in use, makes 89,088 tensors in one file
_MAX_COST = 101_000_000  # bytes of memory, about, that parsing takes and leaves
_OBJECT_COST, _LETTER_COST = 750, 2.5  # measured on headers with short and with long names
_MAX_MEMBERS = 150_000  # of one object: the largest index of shards has 139,000
_MAX_DEPTH = 64
_NESTED = (dict, list)
_COMMON_LINUX = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64", "riscv64")
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if _COMMON_LINUX else 0)  # Python has the name since 3.13


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


def is_there(path: Path) -> bool:
    """Whether a path names something; not if its name can't be one, or it is a link that leads nowhere.

    Raises:
        FileMissingError: its directory may not be entered.
    """
    try:
        path.stat()
    except PermissionError as error:
        raise FileMissingError(f"can't be looked at: {system_reason(error)}", file=path) from None
    except (OSError, ValueError):
        return False
    return True


def resolved(path: Path) -> Path:
    """The path without links; unlike `Path.resolve`, which raises there, a link to itself stays what it is."""
    return Path(os.path.realpath(path))


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


def read_bytes(path: Path, what: str, limit: int = _MAX_SMALL) -> bytes:
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


def is_gguf(path: Path) -> bool:
    """Whether a file is GGUF, by its first bytes, or at least claims to be by its name."""
    return path.is_file() and (path.suffix.lower() == ".gguf" or starts_with(path, b"GGUF"))


def mapped(path: Path, what: str) -> mmap.mmap:
    """A whole file as memory: torch wants it writable, and the file must never change, so pages are private.

    Nothing is set aside for them, or a file larger than this machine's memory could not be mapped.

    Raises:
        FileMissingError: it can't be read. FormatError: it has become empty.
    """
    try:
        with path.open("rb") as file:
            if sys.platform == "win32":
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            flags, prot = mmap.MAP_PRIVATE | _NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
            return mmap.mmap(file.fileno(), 0, flags=flags, prot=prot)
    except OSError as error:
        raise FileMissingError(f"{what}: {system_reason(error)}", file=path) from None
    except ValueError:
        raise FormatError("was changed while it was read", file=path) from None


def read_json_object(path: Path, what: str, limit: int = _MAX_SMALL) -> dict[str, Any]:
    """A JSON file that holds one object.

    Raises:
        FileMissingError: it can't be read. FormatError: it is no JSON object, or longer than `limit`.
    """
    return parse_json_object(bytearray(read_bytes(path, what, limit)), what, path)


def parse_json_object(data: bytes | bytearray, what: str, path: Path) -> dict[str, Any]:
    """One JSON object from bytes that came out of a file.

    Args:
        data: emptied once decoded if it is a bytearray, for the sake of large ones.

    Raises:
        FormatError: it is none; a key stands twice; it holds more values, or deeper ones, than any that is in use.
    """
    _check_cost(data, what, path)
    with without_collecting():
        value = _parsed(data, what, path)
    if not isinstance(value, dict):
        raise FormatError(f"{what} holds a {type(value).__name__}, expected a JSON object", file=path)
    if _is_deeper(value, _MAX_DEPTH):
        raise FormatError(f"{what} is nested too deeply, more than {_MAX_DEPTH} levels", file=path)
    return value


@contextlib.contextmanager
def without_collecting() -> Iterator[None]:
    """While many small objects are made, of which none refers back: looking for cycles in them doubles the time."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _parsed(data: bytes | bytearray, what: str, path: Path) -> Any:
    try:
        text = data.decode("utf-8-sig")  # editors on Windows put a byte order mark first
        if isinstance(data, bytearray):
            data.clear()
        return json.loads(text, object_pairs_hook=_unique_keys)
    except UnicodeDecodeError:
        raise FormatError(f"{what} is not UTF-8 text", file=path) from None
    except RecursionError:
        raise FormatError(f"{what} is nested too deeply", file=path) from None
    except ValueError as error:  # JSONDecodeError is one; also absurdly long integers and doubled keys
        raise FormatError(f"{what} is no valid JSON: {error}", file=path) from None


def _check_cost(data: bytes | bytearray, what: str, path: Path) -> None:
    """That a few bytes don't become a thousand times as much in memory; marks inside of texts count, too."""
    if len(data) > _MAX_WIDE and not data.isascii():
        told = f"{what} has {len(data)} bytes and letters beyond ASCII; at most {_MAX_WIDE} bytes of such are read"
        raise FormatError(told, file=path)
    objects, members = data.count(b"{"), data.count(b":")
    items = data.count(b",") + data.count(b"[")
    if objects > _MAX_OBJECTS or members > _MAX_MEMBERS + 4 * objects or items > _MAX_MEMBERS + 8 * objects:
        found = f"{what} holds about {max(objects, members, items)} values, side by side or nested"
        raise FormatError(f"{found}, more than any that is in use", file=path)
    if objects * _OBJECT_COST + len(data) * _LETTER_COST > _MAX_COST:
        told = f"{what} has {len(data)} bytes and about {objects} values, more of both than any that is in use"
        raise FormatError(told, file=path)


def _is_deeper(value: Any, most: int) -> bool:
    level = [value]
    for _ in range(most):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, _NESTED)
        ]
        if not level:
            return False
    return True


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > _MAX_MEMBERS:
        raise ValueError(f"an object has {len(pairs)} keys; at most {_MAX_MEMBERS} values of a kind are in use")
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice[:80]!r} stands twice")
    return result
