"""llama.cpp's log in the process that runs it: passed on to stderr, its errors kept, since calls return NULL or 1."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from typing import Any

import llama_cpp.llama_cpp as lib

_ERROR, _CONT = 4, 5  # ggml_log_level
_KEPT = 8
_FUNCTION = re.compile(r"^[\w:~]+: ")


class LlamaLog:
    """Installs itself as llama.cpp's logger for the life of the process."""

    def __init__(self) -> None:
        self._errors: list[str] = []
        self._level = 0
        self._callback = lib.llama_log_callback(self._write)  # ctypes needs it alive
        lib.llama_log_set(self._callback, ctypes.c_void_p(0))

    def clear(self) -> None:
        self._errors.clear()

    def reason(self, otherwise: str) -> str:
        """`otherwise`, followed by the error lines since the last `clear`, without the names of C++ functions."""
        lines = [_FUNCTION.sub("", line.strip()).strip() for error in self._errors for line in error.splitlines()]
        told = [line for line in dict.fromkeys(lines) if line.strip("=-")]  # no rules drawn around others
        return ": ".join([otherwise, "; ".join(told)[:1000]]) if told else otherwise

    def _write(self, level: int, text: bytes, _data: Any) -> None:
        self._level = self._level if level == _CONT else level
        with contextlib.suppress(OSError):  # nobody reads any more; an exception can't pass through C
            os.write(2, text)
        if self._level != _ERROR or len(self._errors) > _KEPT:
            return
        line = text.decode("utf-8", errors="replace")
        if level == _CONT and self._errors:
            self._errors[-1] += line
        else:
            self._errors.append(line)
