"""libggml by ctypes, as llama-cpp-python ships it: the type table, dequantizing and quantizing.

Only plainly exported functions are called, no layout of a C struct is assumed but that of two public arguments,
and llama_cpp itself is not imported (which loads llama.cpp whole). Where the library is missing or does not load,
`library` gives None and callers take the gguf package's slower arithmetic in numpy.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from converters.gguf_types import TensorType

_log = logging.getLogger(__name__)

_NAMES = {"win32": "ggml-base.dll", "darwin": "libggml-base.dylib"}
_LogCallback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_PROBE_ELEMENTS = 1 << 20  # a multiple of every block

Dequantize = Callable[[int, int, int], None]
"""Address of the blocks, address of the float32 values, number of elements (below 2^31: the loops count in int)."""


@cache
def library() -> Library | None:
    """libggml, loaded once; None where llama-cpp-python is not installed or its library does not load."""
    path = find_library()
    if path is None:
        _log.debug("llama-cpp-python brings no libggml: tensors are dequantized by the gguf package, slower")
        return None
    try:
        return Library(path)
    except (OSError, AttributeError) as error:
        _log.debug("%s does not load, tensors are dequantized by the gguf package, slower: %s", path, error)
        return None


def find_library() -> Path | None:
    """The libggml-base of the llama_cpp package, which is looked up and not imported."""
    try:
        spec = importlib.util.find_spec("llama_cpp")
    except (ImportError, ValueError):
        return None
    for place in (spec and spec.submodule_search_locations) or ():
        path = Path(place) / "lib" / _NAMES.get(sys.platform, "libggml-base.so")
        if path.is_file():
            return path
    return None


class _InitParams(ctypes.Structure):
    """gguf_init_params of gguf.h."""

    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


class Library:
    """A loaded libggml.

    Its functions index their type table without looking at the number, or abort the process, so every number
    passes `type_of` first.

    Raises:
        OSError: it does not load. AttributeError: it is older than the functions used here.
    """

    def __init__(self, path: Path) -> None:
        self._dll = ctypes.CDLL(str(path))
        self._lock = threading.Lock()
        self._types: dict[int, tuple[TensorType, str] | None] = {}
        address, number, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
        self._declare("gguf_init_from_buffer", address, ctypes.c_char_p, ctypes.c_size_t, _InitParams)
        self._declare("gguf_free", None, address)
        self._declare("ggml_log_get", None, address, address)
        self._declare("ggml_log_set", None, address, address)
        self._declare("ggml_type_name", ctypes.c_char_p, number)
        self._declare("ggml_blck_size", size, number)
        self._declare("ggml_type_size", ctypes.c_size_t, number)
        self._declare("ggml_quantize_requires_imatrix", ctypes.c_bool, number)
        self._declare("ggml_quantize_chunk", ctypes.c_size_t, number, address, address, size, size, size, address)

    def _declare(self, name: str, result: type | None, *arguments: type) -> None:
        function = getattr(self._dll, name)
        function.restype, function.argtypes = result, arguments

    def type_of(self, qtype: int) -> TensorType | None:
        """The type by its number; None for a number that this libggml does not know or has dropped.

        Asked of its GGUF reader, the one place that checks the number, with a header of one tensor.
        """
        entry = self._entry(qtype)
        return entry and entry[0]

    def dequantizer(self, qtype: int) -> Dequantize | None:
        """What turns blocks of a type into float32; None where there is no such function."""
        function = self._exported("dequantize_row_", qtype)
        if function is not None:
            function.restype, function.argtypes = None, (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
        found: Dequantize | None = function
        return found

    def quantizes(self, qtype: int) -> bool:
        """Whether `quantize` knows the type; it would abort the process."""
        return self._exported("quantize_", qtype) is not None

    def requires_importance(self, qtype: int) -> bool:
        """Whether `quantize` would abort the process without an importance matrix."""
        return bool(self._dll.ggml_quantize_requires_imatrix(qtype))

    def quantize(
        self, qtype: int, values: int, blocks: int, *, start: int, rows: int, columns: int, importance: int | None
    ) -> None:
        """Quantizes `rows` rows of a float32 matrix from row `start` on; `values`, `blocks` and `importance`
        (float32, one weight per column) are the addresses of the whole."""
        self._dll.ggml_quantize_chunk(qtype, values, blocks, start * columns, rows, columns, importance)

    def _exported(self, prefix: str, qtype: int) -> Any:
        entry = self._entry(qtype)
        return entry and getattr(self._dll, prefix + entry[1], None)

    def _entry(self, qtype: int) -> tuple[TensorType, str] | None:
        """The type, and its name as libggml spells it."""
        with self._lock:
            if qtype not in self._types:
                self._types[qtype] = self._ask(qtype)
            return self._types[qtype]

    def _ask(self, qtype: int) -> tuple[TensorType, str] | None:
        header = struct.pack("=4sIQQQsIQIQ", b"GGUF", 3, 1, 0, 1, b"t", 1, _PROBE_ELEMENTS, qtype, 0)
        header += bytes(-len(header) % 32)
        with self._silenced():
            found = self._dll.gguf_init_from_buffer(header, len(header), _InitParams(no_alloc=True, ctx=None))
        if not found:
            return None
        self._dll.gguf_free(found)
        name: str = self._dll.ggml_type_name(qtype).decode()
        kind = TensorType(name.upper(), self._dll.ggml_blck_size(qtype), self._dll.ggml_type_size(qtype))
        return kind, name

    @contextmanager
    def _silenced(self) -> Iterator[None]:
        """Keeps ggml from writing its refusal to stderr."""
        callback, data = ctypes.c_void_p(), ctypes.c_void_p()
        self._dll.ggml_log_get(ctypes.byref(callback), ctypes.byref(data))
        silent = _LogCallback(_ignore)
        self._dll.ggml_log_set(ctypes.cast(silent, ctypes.c_void_p), None)
        try:
            yield
        finally:
            self._dll.ggml_log_set(callback, data)


def _ignore(level: int, text: bytes, data: int) -> None:
    """A log callback."""
