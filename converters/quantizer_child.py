"""The process that llama.cpp's quantizer runs in: `python -m converters.quantizer_child`, started by `quantizer` alone.

One JSON object comes on stdin; one goes to what was stdout, {"ok": {}} or {"failed": {"kind", "message"}}. Everything
that llama.cpp prints goes to stderr.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any, BinaryIO

from converters.errors import Error
from converters.llama_child import end_with_the_parent, reply_stream, send
from converters.quantization import PADDING

_MOST_AT_ONCE = 256 << 20  # bytes of rows in memory; llama.cpp's own limit is 8 GiB


def main() -> None:
    end_with_the_parent()
    replies = reply_stream()
    request = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=_end_at_the_end, args=(sys.stdin.buffer,), daemon=True).start()
    send(replies, _quantize(**request))
    os._exit(0)


def _end_at_the_end(stream: BinaryIO) -> None:
    stream.read()
    os._exit(0)  # the parent is gone: what is being made interests nobody


def _quantize(
    *, source: str, target: str, number: int, threads: int, requantize: bool, realign: bool, imatrix: str | None
) -> dict[str, Any]:
    """The reply; `realign` where the source is not aligned to what the quantizer pads to."""
    try:
        import llama_cpp.llama_cpp as lib

        from converters.llama_log import LlamaLog
    except Exception as error:  # a broken build raises OSError or RuntimeError, not only ImportError
        return _failed("missing", f"{type(error).__name__}: {error}")
    log = LlamaLog()
    lib.llama_backend_init()
    params = lib.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.allow_requantize = number, threads, requantize
    if hasattr(params, "max_buf_size"):
        params.max_buf_size = _MOST_AT_ONCE
    try:
        alive = realign and _set_alignment(lib, params), _set_imatrix(lib, params, imatrix)
    except Error as error:
        return _failed("imatrix", error.message)
    log.clear()
    status = lib.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(params))
    del alive
    return {"ok": {}} if status == 0 else _failed("refused", log.reason("llama.cpp did not quantize the model"))


def _set_alignment(lib: Any, params: Any) -> Any:
    """The quantizer copies `general.alignment` and pads to 32 bytes whatever that says, so it must say so.

    Gives what must stay alive as long as the parameters are in use.
    """
    overrides = (lib.llama_model_kv_override * 2)()  # the second one, without a key, ends the list
    overrides[0].key = b"general.alignment"
    overrides[0].tag = lib.LLAMA_KV_OVERRIDE_TYPE_INT
    overrides[0].value.val_i64 = PADDING
    params.kv_overrides = ctypes.cast(overrides, dict(params._fields_)["kv_overrides"])
    return overrides


def _set_imatrix(lib: Any, params: Any, path: str | None) -> Any:
    """Gives what must stay alive as long as the parameters are in use."""
    if path is None:
        return None
    from converters.errors import UnsupportedError
    from converters.imatrix import read_imatrix

    if not hasattr(lib, "llama_model_imatrix_data"):
        raise UnsupportedError("this llama-cpp-python takes no importance matrix; update it")
    weights = read_imatrix(Path(path))
    entries = (lib.llama_model_imatrix_data * (len(weights) + 1))()  # the last one, without a name, ends the list
    for entry, (name, values) in zip(entries, weights.items(), strict=False):
        entry.name = name.encode()
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entry.size = values.size
    params.imatrix = ctypes.cast(entries, ctypes.POINTER(lib.llama_model_imatrix_data))
    return entries, weights


def _failed(kind: str, message: str) -> dict[str, Any]:
    return {"failed": {"kind": kind, "message": message}}


if __name__ == "__main__":
    main()
